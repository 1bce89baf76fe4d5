"""linear and linear_gelu: oneDNN's products against PyTorch's, gradients, compilation, bad input."""

import subprocess
import sys

import pytest
import torch

from ijepa_fast.kernels.bias_gelu import bias_gelu
from ijepa_fast.kernels.common import dispatch
from ijepa_fast.kernels.common import native as extension
from ijepa_fast.kernels.linear import cpu, linear, native, ops, reference
from tests import oracle
from tests.launch import ROOT, unlaunched

SHAPES = [(1, 8, 24), (7, 300, 65), (94, 384, 96), (33, 16, 1)]  # T, I, O


def linear_gelu(x, weight, bias):
    return ops.linear_gelu(x, weight, bias, bias_gelu)


def make(tokens, inputs, outputs, dtype=torch.float32):
    weight = torch.randn(outputs, inputs, dtype=dtype) * inputs**-0.5
    return torch.randn(tokens, inputs, dtype=dtype), weight, torch.randn(outputs, dtype=dtype)


CAPACITY = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"


@pytest.mark.parametrize(("given", "found"), [({}, "4096"), ({CAPACITY: "17"}, "17")])
def test_onednn_keeps_a_steps_products_of_many_token_counts(given, found):
    """Whoever sets the variable is heard."""
    environment = {name: value for name, value in unlaunched().items() if name != CAPACITY} | given
    code = f"import os, ijepa_fast.kernels.linear; print(os.environ['{CAPACITY}'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == found, done.stderr


def test_onednn_is_used_here():
    x, weight, _ = make(3, 8, 16)
    assert cpu.unsupported(x, weight) is None
    assert "one dtype" in cpu.unsupported(x.double(), weight.double())
    assert "empty" in cpu.unsupported(x[:0], weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert "autocast" in cpu.unsupported(x, weight)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("op", [linear, linear_gelu], ids=lambda op: op.__name__)
def test_matches_reference(op, shape, poisoned):
    oracle.check_against_reference(op, getattr(reference, op.__name__), make(*shape), names=("x", "weight", "bias"))


@pytest.mark.parametrize("op", [linear, linear_gelu], ids=lambda op: op.__name__)
def test_reference_is_what_runs_where_it_is_asked_for(op, monkeypatch):
    monkeypatch.setattr(cpu, "_product", None)
    before = dispatch.choice("linear")
    dispatch.use({"linear": "reference"})
    try:
        inputs = make(5, 16, 32)
        assert torch.equal(op(*inputs), getattr(reference, op.__name__)(*inputs))
    finally:
        dispatch.use({"linear": before})


def test_the_triton_kernel_takes_the_bias(triton_everywhere):
    """Where bias_gelu is a kernel the product comes without bias, and the kernel adds it."""
    x, weight, bias = (value.to(triton_everywhere) for value in make(5, 16, 32))
    given = []
    ops.linear_gelu(x, weight, bias, lambda product, bias: given.append((product, bias)))
    ((product, passed),) = given
    torch.testing.assert_close(product, x @ weight.t())
    assert passed is bias


def test_gradient_of_the_bias_alone():
    x, weight, bias = make(5, 16, 32)
    oracle.check_against_reference(
        lambda bias: linear_gelu(x.to(bias.dtype), weight.to(bias.dtype), bias),
        lambda bias: reference.linear_gelu(x.to(bias.dtype), weight.to(bias.dtype), bias),
        (bias,),
    )


def test_opcheck_of_the_weight_gradient():
    x, dy = torch.randn(7, 32), torch.randn(7, 5)
    if reason := native.unsupported(dy, x):
        pytest.skip(f"csrc's weight gradient {reason}")
    torch.library.opcheck(torch.ops.ijepa_fast.linear_dweight_cpu_.default, (dy, x, torch.empty(5, 32)))


def test_without_bias():
    x, weight, _ = make(5, 12, 20)
    oracle.check_against_reference(linear, lambda x, w: reference.linear(x, w, None), (x, weight))


def test_gelu_in_the_product_is_the_exact_one():
    x, weight, bias = make(40, 64, 96)
    with torch.no_grad():
        inside = linear_gelu(x, weight, bias)
    wanted = reference.linear_gelu(x.double(), weight.double(), bias.double())
    oracle.assert_within_budget(inside, reference.linear_gelu(x, weight, bias), wanted)


def test_only_the_gradients_asked_for():
    x, weight, bias = make(5, 12, 20)
    linear(x, weight.requires_grad_(), bias.requires_grad_()).sum().backward()
    assert x.grad is None
    torch.testing.assert_close(weight.grad, x.sum(0).expand(20, 12))
    assert (bias.grad == 5).all()


def test_second_derivatives_are_refused():
    x, weight, _ = make(5, 16, 20)
    (gradient,) = torch.autograd.grad(linear(x, weight.requires_grad_()).square().sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_slices_of_a_weight_and_strided_upstream():
    """As QKV calls it for selected rows: a contiguous slice of a parameter; and a gradient with a stride."""
    x, weight, bias = make(9, 16, 48)
    weight.requires_grad_()
    out = linear(x, weight[16:], bias[16:])
    upstream = torch.randn(32, 9).t()
    out.backward(upstream)
    torch.testing.assert_close(weight.grad[16:], upstream.t() @ x)
    assert not weight.grad[:16].any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_and_no_tokens(dtype):
    x, weight, bias = make(4, 6, 10, dtype)
    assert torch.equal(linear(x, weight, bias), reference.linear(x, weight, bias))
    assert linear_gelu(*make(0, 6, 10)).shape == (0, 10)


def test_gradcheck():
    inputs = [x.requires_grad_() for x in make(3, 5, 4, torch.float64)]
    oracle.gradcheck(linear_gelu, *inputs)


def test_compiles_once_for_many_token_counts():
    _, weight, bias = make(1, 16, 24, torch.float64)  # compiled products are PyTorch's own in every dtype
    weight.requires_grad_()
    assert (
        oracle.count_compiles(
            linear_gelu, [(torch.randn(n, 16, dtype=torch.float64), weight, bias) for n in (5, 9, 77)]
        )
        == 1
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, w, b: (x[None], w, b), "x: expected shape"),
        (lambda x, w, b: (x, w[:, 1:], b), "weight: expected shape"),
        (lambda x, w, b: (x, w, b[1:]), "bias: expected shape"),
        (lambda x, w, b: (x, w.t().contiguous().t(), b), "weight: expected a contiguous"),
    ],
)
def test_bad_input_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        linear(*change(*make(4, 6, 10)))


def test_bfloat16_without_the_extension(monkeypatch):
    """Where csrc is not built, the bias's gradient is PyTorch's sum."""
    monkeypatch.setattr(extension, "_has_loops", lambda: False)
    monkeypatch.setattr(cpu.native, "_column_sums", None)
    monkeypatch.setattr(cpu.native, "_dweight", None)
    x, weight, bias = (torch.randn(*shape).bfloat16().requires_grad_() for shape in ((5, 32), (48, 32), (48,)))
    dy = torch.randn(5, 48).bfloat16()
    if cpu.unsupported(x, weight):
        pytest.skip("oneDNN has no bfloat16 product here")
    cpu.linear(x, weight, bias).backward(dy)
    assert torch.equal(bias.grad, dy.sum(0))
    torch.testing.assert_close(weight.grad.float(), dy.float().T @ x.detach().float(), rtol=0.02, atol=0.05)
