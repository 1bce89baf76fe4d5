"""csrc's loops for bf16 on the CPU: no worse than 1.5 times PyTorch's bf16 against fp64, on every kind of processor."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from ijepa_fast.kernels.bias_gelu import native as bias_gelu
from ijepa_fast.kernels.common import native
from ijepa_fast.kernels.layer_norm import native as layer_norm
from ijepa_fast.kernels.linear import native as linear

pytestmark = pytest.mark.skipif(not native.available(), reason="ijepa_fast._C is not built")


def random(*shape):
    return torch.randn(shape).bfloat16()


def assert_as_good_as_torch(results, function, inputs, upstream=()):
    """`results` against `function` of fp64 `inputs`, and against the error of `function` of the bf16 ones.

    `results` are its outputs, then the gradients of all inputs if there are upstream ones.
    """
    exact, eager = (_evaluate(function, inputs, upstream, dtype) for dtype in (torch.float64, torch.bfloat16))
    assert len(results) == len(exact)
    for i, (result, low, high) in enumerate(zip(results, eager, exact, strict=True)):
        assert result.dtype == torch.bfloat16
        assert result.shape == high.shape
        assert result.isfinite().all()
        if result.numel():
            error, allowed = ((x.double() - high).abs().max() for x in (result, low))
            assert error <= 1.5 * allowed + 1e-6 * high.abs().max(), f"result {i}: {error:.3g} against {allowed:.3g}"


def _evaluate(function, inputs, upstream, dtype):
    inputs = [x.detach().to(dtype).requires_grad_() for x in inputs]
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    gradients = torch.autograd.grad(outputs, inputs, [dy.to(dtype) for dy in upstream]) if upstream else ()
    return [x.detach() for x in (*outputs, *gradients)]


@pytest.mark.parametrize(("tokens", "width"), [(0, 32), (1, 16), (7, 1408), (301, 192)])
def test_layer_norm(poisoned, tokens, width):
    x, residual, dy, ds = (random(tokens, width) for _ in range(4))
    x = 3 * x + 5
    weight, bias = random(width), random(width)
    y, mean, rstd = layer_norm.layer_norm_fwd(x, weight, bias, 1e-6)
    dx, (dweight, dbias) = layer_norm.layer_norm_bwd(dy, None, x, weight, mean, rstd)

    def norm(x, weight, bias):
        return F.layer_norm(x, weight.shape, weight, bias, 1e-6)

    assert_as_good_as_torch((y, dx, dweight, dbias), norm, (x, weight, bias), (dy,))

    y, s, mean, rstd = layer_norm.add_layer_norm_fwd(x, residual, weight, bias, 1e-6)
    dx, (dweight, dbias) = layer_norm.layer_norm_bwd(dy, ds, s, weight, mean, rstd)

    def add_norm(x, residual, weight, bias):
        return norm(x + residual, weight, bias), x + residual

    assert_as_good_as_torch((y, s, dx, dx, dweight, dbias), add_norm, (x, residual, weight, bias), (dy, ds))


@pytest.mark.parametrize(("tokens", "width"), [(0, 32), (1, 16), (301, 192), (1000, 64)])
def test_bias_gelu(poisoned, tokens, width):
    x, bias, dy = 3 * random(tokens, width), random(width), random(tokens, width)
    results = bias_gelu.bias_gelu_fwd(x, bias), *bias_gelu.bias_gelu_bwd(dy, x, bias)
    assert_as_good_as_torch(results, lambda x, bias: F.gelu(x + bias), (x, bias), (dy,))


def test_bias_gelu_over_every_number():
    """Every bf16 number, infinities and NaN included: half a unit in the last place, as long as fp32 can tell."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).short().view(torch.bfloat16).view(-1, 256)
    y, exact, finite = bias_gelu.bias_gelu_fwd(x, torch.zeros(256).bfloat16()), F.gelu(x.double()), x.isfinite()
    assert torch.equal(y.isnan(), exact.isnan() | (x == -torch.inf))
    assert ((y - exact).abs() <= 1.01 * 2**-8 * exact.abs() + 1e-12)[finite].all()


@pytest.mark.parametrize(("tokens", "width"), [(0, 16), (1, 48), (3000, 64), (129, 1536)])
def test_column_sums(poisoned, tokens, width):
    x = random(tokens, width)
    assert_as_good_as_torch((linear.column_sums(x),), lambda x: x.sum(0), (x,))
    assert torch.equal(linear.column_sums(torch.ones_like(x)), x.new_full((width,), tokens))


def test_rounding_is_that_of_pytorch():
    """A sum of two numbers, over ties, denormals, overflow, infinities and NaN."""
    x = torch.randint(-(2**15), 2**15, (64, 4096)).short().view(torch.bfloat16)
    residual = torch.randint(-(2**15), 2**15, (64, 4096)).short().view(torch.bfloat16)
    _, s, _, _ = layer_norm.add_layer_norm_fwd(x, residual, random(4096), random(4096), 1e-6)
    torch.testing.assert_close(s, x + residual, rtol=0, atol=0, equal_nan=True)


def test_not_a_number_stays_in_its_row():
    x, weight, bias, dy = random(40, 64), random(64), random(64), random(40, 64)
    for spoiler in (torch.nan, torch.inf):
        x[7, 3] = spoiler
        y, mean, rstd = layer_norm.layer_norm_fwd(x, weight, bias, 1e-6)
        dx, _ = layer_norm.layer_norm_bwd(dy, None, x, weight, mean, rstd)
        for result in (y, dx):
            assert result[7].isnan().all()
            assert result[[*range(7), *range(8, 40)]].isfinite().all()
    y = bias_gelu.bias_gelu_fwd(x, bias)
    assert y[7, 3] == torch.inf
    assert y.isinf().sum() == 1


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_other_generations_of_processors(capability):
    """The same tests with the loops of an older processor, as PyTorch's variable asks for."""
    if os.environ.get("ATEN_CPU_CAPABILITY"):
        pytest.skip("this is such a run")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k", "not processors"]
    done = subprocess.run(command, env=os.environ | {"ATEN_CPU_CAPABILITY": capability}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
