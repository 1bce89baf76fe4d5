"""bias_gelu: kernel against reference, gradients, registration, compilation, bad input."""

import pytest
import torch

from ijepa_fast.kernels.bias_gelu import bias_gelu, reference
from tests import oracle

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def make(tokens, width, dtype, device):
    return torch.randn(tokens, width).mul(2).to(device, dtype), torch.randn(width).to(device, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize(("tokens", "width"), [(14081, 5120), (78849, 1536)])
def test_large_on_gpu(triton_everywhere, tokens, width):
    oracle.check_against_reference(
        bias_gelu, reference.bias_gelu, make(tokens, width, torch.bfloat16, triton_everywhere), names=("x", "bias")
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "width"), [(1, 24), (5, 257), (37, 384), (33, 768)])
def test_matches_reference(triton_everywhere, poisoned, tokens, width, dtype):
    oracle.check_against_reference(
        bias_gelu, reference.bias_gelu, make(tokens, width, dtype, triton_everywhere), names=("x", "bias")
    )


def test_fp32_bias_with_low_precision_tokens(triton_everywhere, poisoned):
    x, bias = make(9, 192, torch.bfloat16, triton_everywhere)
    oracle.check_against_reference(bias_gelu, reference.bias_gelu, (x, bias.float()))


def test_is_the_exact_gelu_to_fp32(triton_everywhere):
    """Over the whole range the error is rounding's, and the tails vanish as they should."""
    x = torch.linspace(-12, 12, 64 * 256).view(64, 256)
    x[0, 0], x[0, 1] = -1e4, 1e4
    x, zero = x.to(triton_everywhere), torch.zeros(256, device=triton_everywhere)
    upstream = (torch.ones_like(x),)
    (y,), (dx, _) = oracle.differentiate(bias_gelu, (x, zero), upstream)
    (exact,), (dexact, _) = oracle.differentiate(reference.bias_gelu, (x.double(), zero.double()), upstream)
    assert ((y - exact).abs() / x.abs().clamp(min=1)).max() < 2e-7
    assert (dx - dexact).abs().max() < 5e-7
    assert (y[0, 0], y[0, 1]) == (0, 1e4)


def test_no_tokens(triton_everywhere, poisoned):
    x, bias = make(0, 96, torch.float32, triton_everywhere)
    (y,), (dx, dbias) = oracle.differentiate(bias_gelu, (x, bias), (torch.empty_like(x),))
    assert y.shape == dx.shape == (0, 96)
    assert not dbias.any()


def test_upstream_not_contiguous(triton_everywhere):
    inputs = make(6, 96, torch.float32, triton_everywhere)
    scale = torch.randn(96, 1, device=triton_everywhere)
    oracle.check_against_reference(
        lambda *args: bias_gelu(*args).mT * scale.to(args[0].dtype),
        lambda *args: reference.bias_gelu(*args).mT * scale.to(args[0].dtype),
        inputs,
    )


def test_deterministic(triton_everywhere):
    inputs = make(301, 96, torch.bfloat16, triton_everywhere)
    upstream = (torch.randn_like(inputs[0]),)
    first, second = (oracle.differentiate(bias_gelu, inputs, upstream)[1] for _ in range(2))
    for a, b in zip(first, second):
        assert torch.equal(a, b)


def test_gradcheck_of_reference():
    oracle.gradcheck(reference.bias_gelu, *(x.requires_grad_() for x in make(3, 8, torch.float64, "cpu")))


def test_opcheck(triton_everywhere):
    x, bias = make(5, 96, torch.float32, triton_everywhere)
    oracle.opcheck(torch.ops.ijepa_fast.bias_gelu_fwd, x, bias)
    oracle.opcheck(torch.ops.ijepa_fast.bias_gelu_bwd, torch.randn_like(x), x, bias)


def test_compiles_once(triton_everywhere):
    calls = [make(tokens, 96, torch.float32, triton_everywhere) for tokens in (5, 9, 17)]
    assert oracle.count_compiles(bias_gelu, [[x.requires_grad_() for x in call] for call in calls]) == 1


@pytest.mark.parametrize(
    ("argument", "change", "message"),
    [
        ("x", lambda x: None, "x: expected a tensor"),
        ("x", lambda x: x[0], "x: expected shape"),
        ("x", lambda x: x.int(), "x: expected dtype"),
        ("x", lambda x: x.mT.contiguous().mT, "x: expected a contiguous"),
        ("bias", lambda x: x[:4], "bias: expected shape"),
        ("bias", lambda x: x.long(), "bias: expected dtype"),
        ("bias", lambda x: x.to("meta"), "bias: expected device"),
    ],
)
def test_bad_input_is_named(argument, change, message):
    good = dict(zip(("x", "bias"), make(4, 8, torch.float32, "cpu")))
    good[argument] = change(good[argument])
    with pytest.raises(ValueError, match=message):
        bias_gelu(**good)
