"""fp8: values and scales against their meaning, kernels against the reference, products, registration, bad input."""

import pytest
import torch

from ijepa_fast.kernels.fp8 import bias_gelu_quantise, layer_norm_quantise, quantise, reference, scaled_linear
from tests import oracle

DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(1, 16), (5, 257), (37, 384)]


def rows(tokens, width, dtype, device):
    """Rows of very different sizes, one of zeros."""
    x = torch.randn(tokens, width) * torch.logspace(-3, 3, tokens)[:, None]
    x[tokens // 2] = 0
    return x.to(device, dtype)


def parameters(width, device):
    return torch.randn(width, device=device) * 0.3 + 1, torch.randn(width, device=device)


def assert_quantised(found, exact):
    """Values and scale of the fp64 row `exact`: the largest is 448, nothing is further away than e4m3's rounding."""
    values, scale = found
    assert values.dtype == torch.float8_e4m3fn
    assert scale.dtype == torch.float32
    values = values.double().cpu()
    scale, exact = scale.double().cpu()[:, None], exact.cpu()
    largest = exact.abs().amax(1, keepdim=True)
    assert (values.abs().amax(1)[largest[:, 0] > 0] == 448).all()
    assert not values[largest[:, 0] == 0].any()
    # Half a unit of the last of three bits, and half the smallest subnormal, 2^-9; some rounding of fp32 before.
    allowed = exact.abs() * 2**-4 * 1.001 + 2**-10 * 1.001 * largest / 448
    excess = (values * scale - exact).abs() - allowed - 1e-6 * largest
    assert excess.max() <= 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "width"), SHAPES)
def test_rows(triton_everywhere, tokens, width, dtype):
    x = rows(tokens, width, dtype, triton_everywhere)
    found, wanted = quantise(x), reference.quantise(x)
    assert_quantised(found, x.double())
    assert_quantised(wanted, x.double())
    torch.testing.assert_close(found[1], wanted[1], rtol=1e-6, atol=0)
    # A quotient that differs by one rounding of fp32 may fall to the neighbour.
    assert (found[0].float() != wanted[0].float()).float().mean() < 1e-3


def test_rows_are_written_where_they_were(triton_everywhere):
    """As a CUDA graph needs it, which reads the weights there."""
    x, other = (rows(5, 48, torch.float32, triton_everywhere) * scale for scale in (1, 3))
    values, scale = quantise(other)
    found = quantise(x, out=(values, scale))
    assert found[0] is values
    assert found[1] is scale
    for a, b in zip(found, quantise(x), strict=True):
        assert torch.equal(a.float(), b.float())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(("tokens", "width"), SHAPES)
def test_layer_norm(triton_everywhere, tokens, width, residual, dtype):
    x = rows(tokens, width, dtype, triton_everywhere)
    branch = torch.randn(tokens, width).to(x) if residual else None
    weight, bias = parameters(width, triton_everywhere)
    values, scale, total = layer_norm_quantise(x, branch, weight, bias)
    assert torch.equal(total, x if branch is None else x + branch)
    exact = torch.nn.functional.layer_norm(total.double(), (width,), weight.double(), bias.double(), 1e-6)
    assert_quantised((values, scale), exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "width"), SHAPES)
def test_bias_gelu(triton_everywhere, tokens, width, dtype):
    x, (_, bias) = rows(tokens, width, dtype, triton_everywhere), parameters(width, triton_everywhere)
    exact = torch.nn.functional.gelu(x.double() + bias.double())
    assert_quantised(bias_gelu_quantise(x, bias), exact)


def test_no_rows(triton_everywhere):
    x, (weight, bias) = torch.empty(0, 32, device=triton_everywhere), parameters(32, triton_everywhere)
    assert quantise(x)[0].shape == bias_gelu_quantise(x, bias)[0].shape == (0, 32)
    assert layer_norm_quantise(x, x, weight, bias)[1].shape == (0,)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_product(dtype):
    """The emulation sums what the scaled values say; against the unquantised product it is as far off as e4m3 is."""
    x, weight, bias = torch.randn(40, 256), torch.randn(48, 256) / 16, torch.randn(48)
    found = scaled_linear(quantise(x), quantise(weight), bias, dtype)
    assert found.dtype == dtype
    (a, sa), (b, sb) = quantise(x), quantise(weight)
    exact = (a.double() * sa[:, None]) @ (b.double() * sb[:, None]).t() + bias.double()
    eager = exact.float().to(dtype)
    oracle.assert_within_budget(found, eager, exact)
    error = (exact - (x.double() @ weight.double().t() + bias.double())).std() / (x @ weight.t()).std()
    assert 0.01 < error < 0.05


@pytest.mark.gpu
def test_product_on_gpu():
    x, weight = (torch.randn(n, 256, device="cuda", dtype=torch.bfloat16) for n in (40, 48))
    found = scaled_linear(quantise(x), quantise(weight))
    (a, sa), (b, sb) = quantise(x), quantise(weight)
    wanted = reference.scaled_linear(a, sa, b, sb, None, torch.float32)
    torch.testing.assert_close(found.float(), wanted, rtol=2**-7, atol=2**-7 * wanted.abs().max().item())


def test_opcheck(triton_everywhere):
    x, (weight, bias) = rows(4, 24, torch.float32, triton_everywhere), parameters(24, triton_everywhere)
    library = torch.ops.ijepa_fast
    torch.library.opcheck(library.fp8_bias_gelu.default, (x, bias))
    torch.library.opcheck(library.fp8_layer_norm.default, (x, weight, bias, 1e-6))
    torch.library.opcheck(library.fp8_add_layer_norm.default, (x, x, weight, bias, 1e-6))
    # Its other checks compare what is written in place by arithmetic, which e4m3 has not.
    torch.library.opcheck(library.fp8_quantise.default, (x, *quantise(x)), test_utils="test_faketensor")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, w, b: quantise(x[0]), "fp8.quantise: x"),
        (lambda x, w, b: quantise(x, out=quantise(x[1:])), "out's values"),
        (lambda x, w, b: layer_norm_quantise(x, x[1:], w, b), "residual"),
        (lambda x, w, b: layer_norm_quantise(x, None, w[1:], b), "weight"),
        (lambda x, w, b: bias_gelu_quantise(x, b[1:]), "bias"),
        (lambda x, w, b: scaled_linear((x, b), quantise(x)), "dtype"),
        (lambda x, w, b: scaled_linear(quantise(x), quantise(x)), "multiples of 16"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.randn(4, 32), torch.randn(32), torch.randn(32))
