"""csrc's loops for fp32 on the CPU: values and gradients against the references, every generation of x86, bad input."""

import os
import subprocess
import sys

import pytest
import torch

from ijepa_fast.kernels.bias_gelu import bias_gelu
from ijepa_fast.kernels.bias_gelu import native as bias_gelu_native
from ijepa_fast.kernels.bias_gelu import reference as bias_gelu_reference
from ijepa_fast.kernels.common import dispatch, native
from ijepa_fast.kernels.layer_norm import layer_norm
from ijepa_fast.kernels.layer_norm import native as layer_norm_native
from ijepa_fast.kernels.layer_norm import reference as layer_norm_reference
from ijepa_fast.kernels.linear import linear
from ijepa_fast.kernels.linear import native as linear_native
from ijepa_fast.kernels.varlen_attention import dense_attention, reference, varlen_attention, varlen_attention_qkv
from tests import oracle

pytestmark = pytest.mark.skipif(not native.available(), reason="ijepa_fast._C is not built")


def cu_seqlens(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


@pytest.mark.parametrize("head_dim", [16, 32, 48, 64, 80, 128])
@pytest.mark.parametrize("lengths", [[5, 0, 63, 1, 64], [97, 15, 17, 200], [1], [0, 0], [96, 192]], ids=str)
def test_self_attention(poisoned, lengths, head_dim):
    cu, longest = cu_seqlens(lengths), max(lengths)
    oracle.check_against_reference(
        lambda qkv: varlen_attention_qkv(qkv, cu, longest, backend="native"),
        lambda qkv: reference.varlen_attention(*qkv.unbind(1), cu, cu),
        (torch.randn(sum(lengths), 3, 2, head_dim),),
        names=("qkv",),
    )


@pytest.mark.parametrize(("lengths_q", "lengths_k"), [([5, 9, 0, 70], [40, 0, 7, 20]), ([3, 101], [260, 1])], ids=str)
def test_queries_of_other_lengths(poisoned, lengths_q, lengths_k):
    """Also queries without keys, and keys without queries; views of wider tensors, as the models give them."""
    cu = cu_seqlens(lengths_q), cu_seqlens(lengths_k)
    oracle.check_against_reference(
        lambda q, kv: varlen_attention(q, *kv.unbind(1), *cu, max(lengths_q), max(lengths_k), backend="native"),
        lambda q, kv: reference.varlen_attention(q, *kv.unbind(1), *cu),
        (torch.randn(sum(lengths_q), 3, 32), torch.randn(sum(lengths_k), 2, 3, 32)),
        names=("q", "kv"),
    )


def test_large_scores_and_another_scale(poisoned):
    cu, qkv = cu_seqlens([40, 9]), 20 * torch.randn(49, 3, 1, 32)
    oracle.check_against_reference(
        lambda qkv: varlen_attention_qkv(qkv, cu, 40, 0.5, "native"),
        lambda qkv: reference.varlen_attention(*qkv.unbind(1), cu, cu, 0.5),
        (qkv,),
    )


def test_auto_gives_other_scales_to_pytorch():
    cu, qkv = cu_seqlens([40, 9]), torch.randn(49, 3, 1, 32)
    for scale in (-0.5, 0.0):
        expected = varlen_attention_qkv(qkv, cu, 40, scale, "reference")
        torch.testing.assert_close(varlen_attention_qkv(qkv, cu, 40, scale), expected)


def test_not_a_number_stays_in_its_sequence():
    qkv = torch.randn(50, 3, 1, 16)
    whole = varlen_attention_qkv(qkv, cu_seqlens([20, 30]), 30, backend="native")
    qkv[25, 1] = float("nan")
    spoiled = varlen_attention_qkv(qkv, cu_seqlens([20, 30]), 30, backend="native")
    assert torch.equal(whole[:20], spoiled[:20])
    assert spoiled[20:].isnan().all()


def test_dense_attention_is_that_of_each_image():
    qkv = torch.randn(3, 21, 3, 2, 16)
    expected = dense_attention(qkv, "reference")
    torch.testing.assert_close(dense_attention(qkv, "native"), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("tokens", "width"), [(0, 32), (1, 16), (7, 1408), (301, 192)])
def test_layer_norm(poisoned, tokens, width):
    x, residual, weight, bias = (
        torch.randn(tokens, width),
        torch.randn(tokens, width),
        torch.randn(width),
        torch.randn(width),
    )
    assert layer_norm_native.unsupported(x, weight) is None
    for extra in ((), (residual,)):
        oracle.check_against_reference(
            lambda x, weight, bias, *residual: layer_norm(x, weight, bias, 1e-6, *residual),
            lambda x, weight, bias, *residual: layer_norm_reference.layer_norm(
                x, weight, bias, 1e-6, residual[0] if residual else None
            ),
            (3 * x + 5, weight, bias, *extra),
        )


@pytest.mark.parametrize(("tokens", "width"), [(0, 32), (1, 16), (301, 192), (1000, 64)])
def test_bias_gelu(poisoned, tokens, width):
    x, bias = 3 * torch.randn(tokens, width), torch.randn(width)
    assert bias_gelu_native.unsupported(x, bias) is None
    oracle.check_against_reference(bias_gelu, bias_gelu_reference.bias_gelu, (x, bias), names=("x", "bias"))


def test_bias_gelu_is_exact_over_the_whole_range():
    x = torch.linspace(-12, 12, 64 * 256).view(64, 256)
    x[0, 0], x[0, 1] = -1e4, 1e4
    zero, upstream = torch.zeros(256), (torch.ones_like(x),)
    (y,), (dx, _) = oracle.differentiate(bias_gelu, (x, zero), upstream)
    (exact,), (dexact, _) = oracle.differentiate(bias_gelu_reference.bias_gelu, (x.double(), zero.double()), upstream)
    assert ((y - exact).abs() / x.abs().clamp(min=1)).max() < 2e-7
    assert (dx - dexact).abs().max() < 5e-7
    assert (y[0, 0], y[0, 1]) == (0, 1e4)


@pytest.mark.parametrize(
    ("tokens", "inputs", "outputs"),
    [(0, 16, 5), (1, 16, 1), (7, 48, 6), (129, 80, 385), (300, 208, 800), (257, 192, 25)],
)
def test_weight_gradient(poisoned, tokens, inputs, outputs):
    """Tokens and rows beyond one block, and panels, row tiles and chunks that are not full."""
    dy, x = torch.randn(tokens, outputs), torch.randn(tokens, inputs)
    oracle.assert_within_budget(linear_native.linear_dweight(dy, x), dy.t() @ x, dy.double().t() @ x.double())


def test_weight_gradient_is_what_linear_uses():
    dy, x, weight = torch.randn(200, 30), torch.randn(200, 64), torch.randn(30, 64, requires_grad=True)
    if reason := linear_native.unsupported(dy, x):
        pytest.skip(f"csrc's weight gradient {reason}")
    linear(x, weight, None).backward(dy)
    assert torch.equal(weight.grad, linear_native.linear_dweight(dy, x))


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_other_generations_of_processors(capability):
    """The same tests with the loops of an older processor, as PyTorch's variable asks for."""
    if os.environ.get("ATEN_CPU_CAPABILITY"):
        pytest.skip("this is such a run")
    tests = ["attention and not generations", "layer_norm", "bias_gelu", "weight_gradient"]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k", " or ".join(tests)]
    done = subprocess.run(command, env=os.environ | {"ATEN_CPU_CAPABILITY": capability}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


def test_the_results_do_not_depend_on_what_else_runs():
    """Same threads, same bits: sums over rows are added in the order of the rows."""
    x, bias, dy = torch.randn(3000, 64), torch.randn(64), (torch.randn(3000, 64),)
    first = oracle.differentiate(bias_gelu, (x, bias), dy)[1]
    for _ in range(5):
        again = oracle.differentiate(bias_gelu, (x, bias), dy)[1]
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_weight_gradient_does_not_depend_on_the_number_of_threads():
    dy, x, before = torch.randn(500, 100), torch.randn(500, 96), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(linear_native.linear_dweight(dy, x))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize(
    ("x", "weight", "reason"),
    [
        (torch.zeros(2, 32, device="meta"), torch.ones(32), "needs CPU tensors, got one on meta"),
        (torch.zeros(2, 32).double(), torch.ones(32).double(), "takes float32 or bfloat16, got torch.float64"),
        (torch.zeros(2, 32), torch.ones(32).double(), "one dtype, got torch.float32, torch.float64"),
        (torch.zeros(2, 24), torch.ones(24), "a multiple of 16, got 24"),
    ],
    ids=["device", "dtype", "two dtypes", "width"],
)
def test_which_tensors_the_loops_do_not_take(x, weight, reason):
    assert reason in layer_norm_native.unsupported(x, weight)


@pytest.mark.parametrize(("setting", "node"), [("auto", "_LayerNorm"), ("reference", "NativeLayerNorm")])
def test_the_loops_run_unless_the_op_is_set_otherwise(setting, node):
    x, weight = torch.zeros(2, 32, requires_grad=True), torch.ones(32)
    before = dispatch.choice("layer_norm")
    dispatch.use({"layer_norm": setting})
    try:
        assert layer_norm(x, weight, weight).grad_fn.name().partition("Backward")[0] == node
    finally:
        dispatch.use({"layer_norm": before})


def test_opcheck():
    x, residual, dy, weight, row = (
        torch.randn(7, 32),
        torch.randn(7, 32),
        torch.randn(7, 32),
        torch.randn(32),
        torch.rand(7),
    )
    library, out, pair = torch.ops.ijepa_fast, torch.empty_like(x), torch.empty(2, 32)
    torch.library.opcheck(library.bias_gelu_cpu_.default, (x, weight, out))
    torch.library.opcheck(library.bias_gelu_bwd_cpu_.default, (dy, x, weight, out, torch.empty(32)))
    rows = torch.empty(7), torch.empty(7)
    torch.library.opcheck(library.layer_norm_cpu_.default, (x, residual, weight, weight, 1e-6, out, x.clone(), *rows))
    torch.library.opcheck(library.layer_norm_bwd_cpu_.default, (dy, residual, x, weight, row, row, out, pair))
    q, k, v, dq, dk, dv = (torch.randn(7, 2, 16) for _ in range(6))
    cu, statistics = cu_seqlens([4, 3]), torch.zeros(2, 2, 7)
    torch.library.opcheck(library.varlen_attention_cpu_.default, (q, k, v, cu, cu, 0.25, dq, statistics))
    gradients = dq, dk, dv
    torch.library.opcheck(library.varlen_attention_bwd_cpu_.default, (q, q, k, v, statistics, cu, cu, 0.25, *gradients))


def test_wrong_input_is_refused():
    qkv, cu = torch.randn(5, 3, 1, 24), cu_seqlens([5])
    with pytest.raises(RuntimeError, match="backend='native' takes a last dimension that is a multiple of 16, got 24"):
        varlen_attention_qkv(qkv, cu, 5, backend="native")
    with pytest.raises(RuntimeError, match="backend='native' takes float32 or bfloat16"):
        varlen_attention_qkv(torch.randn(5, 3, 1, 16).half(), cu, 5, backend="native")
    with pytest.raises(RuntimeError, match="backend='native' needs a positive scale, got -1"):
        varlen_attention_qkv(torch.randn(5, 3, 1, 16), cu, 5, -1.0, "native")
    q, out = torch.randn(5, 1, 16), torch.empty(5, 1, 16)
    op = torch.ops.ijepa_fast.varlen_attention_cpu_
    with pytest.raises(ValueError, match="cu_seqlens in order"):
        op(q, q, q, cu_seqlens([9]), cu_seqlens([9]), 1.0, out, torch.empty(2, 1, 5))
    with pytest.raises(ValueError, match="contiguous float32 tensors of 32 values"):
        torch.ops.ijepa_fast.bias_gelu_cpu_(torch.randn(2, 16), torch.randn(16), torch.empty(1, 16))
    with pytest.raises(ValueError, match="multiple of 16"):
        torch.ops.ijepa_fast.linear_dweight_cpu_(torch.randn(2, 5), torch.randn(2, 24), torch.empty(5, 24))
    with pytest.raises(ValueError, match="dy and x of equal length"):
        torch.ops.ijepa_fast.linear_dweight_cpu_(torch.randn(2, 5), torch.randn(3, 16), torch.empty(5, 16))
    with pytest.raises(ValueError, match="contiguous float32"):
        torch.ops.ijepa_fast.linear_dweight_cpu_(torch.randn(5, 2).t(), torch.randn(2, 16), torch.empty(5, 16))
