"""layer_norm: kernel against reference, gradients, registration, compilation, bad input."""

import pytest
import torch

from ijepa_fast.kernels.layer_norm import layer_norm, reference
from tests import oracle

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def make(tokens, width, dtype, device, parameter_dtype=None):
    parameter_dtype = parameter_dtype or dtype
    x = torch.randn(tokens, width).mul(2).add(0.5).to(device, dtype)
    residual = torch.randn(tokens, width).to(device, dtype)
    weight = torch.randn(width).to(device, parameter_dtype)
    bias = torch.randn(width).to(device, parameter_dtype)
    return x, residual, weight, bias


def plain(function):
    return lambda x, weight, bias: function(x, weight, bias, 1e-6, None)


def fused(function):
    return lambda x, residual, weight, bias: function(x, weight, bias, 1e-6, residual)


@pytest.mark.gpu
def test_large_on_gpu(triton_everywhere):
    test_matches_reference(triton_everywhere, None, 20011, 1280, torch.bfloat16)
    test_matches_reference(triton_everywhere, None, 70001, 384, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "width"), [(1, 96), (5, 192), (37, 384), (7, 1280), (3, 1408)])
def test_matches_reference(triton_everywhere, poisoned, tokens, width, dtype):
    x, residual, weight, bias = make(tokens, width, dtype, triton_everywhere)
    oracle.check_against_reference(
        plain(layer_norm), plain(reference.layer_norm), (x, weight, bias), names=("x", "weight", "bias")
    )
    oracle.check_against_reference(
        fused(layer_norm),
        fused(reference.layer_norm),
        (x, residual, weight, bias),
        names=("x", "residual", "weight", "bias"),
    )


def test_fp32_parameters_with_low_precision_tokens(triton_everywhere, poisoned):
    inputs = make(9, 192, torch.bfloat16, triton_everywhere, parameter_dtype=torch.float32)
    oracle.check_against_reference(fused(layer_norm), fused(reference.layer_norm), inputs)


def test_no_tokens(triton_everywhere, poisoned):
    x, residual, weight, bias = make(0, 96, torch.float32, triton_everywhere)
    (y, total), gradients = oracle.differentiate(
        fused(layer_norm), (x, residual, weight, bias), (torch.empty_like(x), torch.empty_like(x))
    )
    assert y.shape == total.shape == (0, 96)
    assert [g.shape for g in gradients] == [(0, 96), (0, 96), (96,), (96,)]
    assert not gradients[2].any()
    assert not gradients[3].any()


@pytest.mark.parametrize("used", [0, 1])
def test_one_output_unused(triton_everywhere, poisoned, used):
    inputs = make(6, 96, torch.float32, triton_everywhere)
    oracle.check_against_reference(
        lambda *args: fused(layer_norm)(*args)[used] * 1,
        lambda *args: fused(reference.layer_norm)(*args)[used] + 0 * args[2].sum() + 0 * args[3].sum(),
        inputs,
    )


def test_upstream_not_contiguous(triton_everywhere):
    inputs = make(6, 96, torch.float32, triton_everywhere)
    scale = torch.randn(6, 1, device=triton_everywhere)
    oracle.check_against_reference(
        lambda *args: fused(layer_norm)(*args)[0].mT.mul(scale.mT.to(args[0].dtype)),
        lambda *args: fused(reference.layer_norm)(*args)[0].mT.mul(scale.mT.to(args[0].dtype)),
        inputs,
    )


def test_shared_gradient_is_not_written_into(triton_everywhere):
    """x and residual get one gradient tensor: accumulating into one must not change the other."""
    x, residual, weight, bias = make(4, 96, torch.float32, triton_everywhere)
    x.requires_grad_()
    residual.requires_grad_()
    for _ in range(2):
        y, total = layer_norm(x, weight, bias, residual=residual)
        (y.square().sum() + total.sum() + 3 * x.sum()).backward()
    torch.testing.assert_close(x.grad - residual.grad, torch.full_like(x, 6), rtol=0, atol=1e-5)


def test_deterministic(triton_everywhere):
    x, residual, weight, bias = make(301, 96, torch.bfloat16, triton_everywhere)
    upstream = (torch.randn_like(x), torch.randn_like(x))
    first, second = (
        oracle.differentiate(fused(layer_norm), (x, residual, weight, bias), upstream)[1] for _ in range(2)
    )
    for a, b in zip(first, second):
        assert torch.equal(a, b)


def test_gradcheck_of_reference():
    inputs = [t.requires_grad_() for t in make(3, 8, torch.float64, "cpu")]
    oracle.gradcheck(fused(reference.layer_norm), *inputs)
    oracle.gradcheck(plain(reference.layer_norm), inputs[0], *inputs[2:])


def test_opcheck(triton_everywhere):
    x, residual, weight, bias = make(5, 96, torch.float32, triton_everywhere)
    ops = torch.ops.ijepa_fast
    oracle.opcheck(ops.layer_norm_fwd, x, weight, bias, 1e-6)
    oracle.opcheck(ops.add_layer_norm_fwd, x, residual, weight, bias, 1e-6)
    mean, rstd = torch.randn(5, device=x.device), torch.rand(5, device=x.device)
    oracle.opcheck(ops.layer_norm_bwd, x, residual, x, weight, mean, rstd)
    oracle.opcheck(ops.layer_norm_bwd, x, None, x, weight, mean, rstd)


def test_compiles_once(triton_everywhere):
    calls = [make(tokens, 96, torch.float32, triton_everywhere) for tokens in (5, 9, 17)]
    calls = [[x.requires_grad_() for x in call] for call in calls]
    assert oracle.count_compiles(lambda *args: fused(layer_norm)(*args), calls) == 1
    calls = [[call[0], *call[2:]] for call in calls]
    assert oracle.count_compiles(lambda *args: plain(layer_norm)(*args), calls) == 1


@pytest.mark.parametrize(
    ("argument", "change", "message"),
    [
        ("x", lambda x: x[0], "x: expected shape"),
        ("x", lambda x: x.int(), "x: expected dtype"),
        ("x", lambda x: x.mT.contiguous().mT, "x: expected a contiguous"),
        ("weight", lambda x: x[:4], "weight: expected shape"),
        ("bias", lambda x: x.half(), "bias: expected dtype"),
        ("bias", lambda x: x.to("meta"), "bias: expected device"),
        ("residual", lambda x: x.half(), "residual: expected dtype"),
        ("residual", lambda x: x[:2], "residual: expected shape"),
    ],
)
def test_bad_input_is_named(argument, change, message):
    good = dict(zip(("x", "residual", "weight", "bias"), make(4, 8, torch.float32, "cpu")))
    good[argument] = change(good[argument])
    with pytest.raises(ValueError, match=message):
        layer_norm(**good)
