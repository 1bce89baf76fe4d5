"""csrc's loops for bf16 on the CPU: errors against fp64 next to PyTorch's, on every kind of processor; bad luck."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from ijepa_fast.kernels.bias_gelu import bias_gelu
from ijepa_fast.kernels.bias_gelu import native as bias_gelu_native
from ijepa_fast.kernels.common import native
from ijepa_fast.kernels.layer_norm import layer_norm
from ijepa_fast.kernels.layer_norm import native as layer_norm_native
from ijepa_fast.kernels.linear import cpu as linear_cpu
from ijepa_fast.kernels.linear import linear, ops
from ijepa_fast.kernels.linear import native as linear_native
from ijepa_fast.kernels.varlen_attention import dense_attention, reference, varlen_attention, varlen_attention_qkv
from ijepa_fast.kernels.varlen_attention import native as attention_native
from ijepa_fast.masks.packing import pack
from ijepa_fast.masks.samplers import make_sampler
from tests import oracle
from tests.small import loss_of, small_ijepa, to

pytestmark = pytest.mark.skipif(not native.available(), reason="ijepa_fast._C is not built")

KINDS = ("any", "v3", "v4", "amx")
VARIABLE = "IJEPA_FAST_CPU_LOOPS"
needs_amx = pytest.mark.skipif(
    native.loops() != "amx", reason=f"this processor runs the loops of kind {native.loops()}"
)


def random(*shape):
    return torch.randn(shape).bfloat16()


def cu_seqlens(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def assert_as_good_as_pytorch(op, torch_op, inputs, names=None):
    """Outputs and gradients: root mean square error at most 1.5 times `torch_op`'s in bf16, largest at most 2 times.

    Both are errors against `torch_op` of the same inputs in fp64. The largest error is that of one value, so it varies.
    """
    upstream = oracle.random_upstream(torch_op, inputs)
    exact = oracle.differentiate(torch_op, [x.double() for x in inputs], [dy.double() for dy in upstream])
    eager = oracle.differentiate(torch_op, inputs, upstream)
    actual = oracle.differentiate(op, inputs, upstream)
    for kind in (0, 1):
        for i, (result, low, high) in enumerate(zip(actual[kind], eager[kind], exact[kind], strict=True)):
            assert_as_good(result, low, high, f"{('output', 'gradient')[kind]} {i}")


def assert_as_good(result, low, high, name="result"):
    assert result.dtype == torch.bfloat16
    assert result.shape == high.shape
    assert result.isfinite().all()
    if result.numel():
        error, allowed = ((x.double() - high).abs() for x in (result, low))
        slack = 1e-6 * high.abs().max()
        assert error.square().mean().sqrt() <= 1.5 * allowed.square().mean().sqrt() + slack, name
        assert error.max() <= 2 * allowed.max() + slack, name


@pytest.mark.parametrize(("tokens", "width"), [(0, 32), (1, 16), (7, 1408), (301, 192)])
def test_layer_norm(poisoned, tokens, width):
    x, residual, weight, bias = 3 * random(tokens, width) + 5, random(tokens, width), random(width), random(width)
    assert layer_norm_native.unsupported(x, weight) is None

    def plain(x, weight, bias, *residual):
        total = x + residual[0] if residual else x
        y = F.layer_norm(total, weight.shape, weight, bias, 1e-6)
        return (y, total) if residual else y

    for extra in ((), (residual,)):
        assert_as_good_as_pytorch(
            lambda x, weight, bias, *residual: layer_norm(x, weight, bias, 1e-6, *residual),
            plain,
            (x, weight, bias, *extra),
        )


@pytest.mark.parametrize(("tokens", "width"), [(0, 32), (1, 16), (301, 192), (1000, 64)])
def test_bias_gelu(poisoned, tokens, width):
    x, bias = 3 * random(tokens, width), random(width)
    assert bias_gelu_native.unsupported(x, bias) is None
    assert_as_good_as_pytorch(bias_gelu, lambda x, bias: F.gelu(x + bias), (x, bias))


def test_bias_gelu_over_every_number():
    """Every bf16 number, infinities and NaN included: half a unit in the last place, as long as fp32 can tell."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).short().view(torch.bfloat16).view(-1, 256)
    y, exact, finite = bias_gelu(x, torch.zeros(256).bfloat16()), F.gelu(x.double()), x.isfinite()
    assert torch.equal(y.isnan(), exact.isnan() | (x == -torch.inf))
    assert ((y - exact).abs() <= 1.01 * 2**-8 * exact.abs() + 1e-12)[finite].all()


@pytest.mark.parametrize(("tokens", "width"), [(0, 16), (1, 48), (3000, 64), (129, 1536)])
def test_column_sums(poisoned, tokens, width):
    x = random(tokens, width)
    assert_as_good(linear_native.column_sums(x), x.sum(0), x.double().sum(0))
    assert torch.equal(linear_native.column_sums(torch.ones_like(x)), x.new_full((width,), tokens))


def test_rounding_is_that_of_pytorch():
    """A sum of two numbers, over ties, denormals (which AVX512_BF16 makes zero), overflow, infinities and NaN."""
    smallest = 2**-126 if native.loops() == "amx" else 0
    x, residual = (torch.randint(-(2**15), 2**15, (64, 4096)).short().view(torch.bfloat16) for _ in range(2))
    _, total = layer_norm(x, random(4096), random(4096), 1e-6, residual)
    torch.testing.assert_close(total, x + residual, rtol=0, atol=smallest, equal_nan=True)


def test_not_a_number_stays_in_its_row():
    x, weight, bias = random(40, 64), random(64), random(64)
    others = [*range(7), *range(8, 40)]
    for spoiler in (torch.nan, torch.inf):
        x[7, 3] = spoiler
        results = oracle.differentiate(lambda x: layer_norm(x, weight, bias), (x,), (random(40, 64),))
        for (result,) in results:
            assert result[7].isnan().all()
            assert result[others].isfinite().all()
    y = bias_gelu(x, bias)
    assert y[7, 3] == torch.inf
    assert y.isinf().sum() == 1


# Around the blocks of 16, 32 and 256 queries and keys.
@pytest.mark.parametrize("head_dim", [24, 32, 48, 64, 80, 128, 7])
@pytest.mark.parametrize("lengths", [[5, 0, 63, 1, 64], [97, 15, 17, 300], [38] * 6, [1], [0, 0]], ids=str)
def test_self_attention(poisoned, lengths, head_dim):
    cu, longest = cu_seqlens(lengths), max(lengths)
    assert_as_good_as_pytorch(
        lambda qkv: varlen_attention_qkv(qkv, cu, longest, backend="native"),
        lambda qkv: reference.varlen_attention(*qkv.unbind(1), cu, cu),
        (random(sum(lengths), 3, 2, head_dim),),
    )


@pytest.mark.parametrize(("lengths_q", "lengths_k"), [([5, 9, 0, 70], [40, 0, 7, 20]), ([3, 290], [260, 1])])
def test_queries_of_other_lengths(poisoned, lengths_q, lengths_k):
    """Also queries without keys, which get exactly zero, and keys without queries; views of wider tensors."""
    cu = cu_seqlens(lengths_q), cu_seqlens(lengths_k)
    q, kv = random(sum(lengths_q), 3, 40), random(sum(lengths_k), 2, 3, 40)

    def attention(q, kv):
        return varlen_attention(q, *kv.unbind(1), *cu, max(lengths_q), max(lengths_k), backend="native")

    assert_as_good_as_pytorch(attention, lambda q, kv: reference.varlen_attention(q, *kv.unbind(1), *cu), (q, kv))
    (out,), (dq, dkv) = oracle.differentiate(attention, (q, kv), (torch.ones_like(q),))
    for s in range(len(lengths_q)):
        query, key = slice(*cu[0][s : s + 2]), slice(*cu[1][s : s + 2])
        if lengths_q[s] == 0 or lengths_k[s] == 0:
            assert not out[query].any()
            assert not dq[query].any()
            assert not dkv[key].any()


def test_large_scores_and_another_scale(poisoned):
    cu, qkv = cu_seqlens([40, 9]), 20 * random(49, 3, 1, 32)
    assert_as_good_as_pytorch(
        lambda qkv: varlen_attention_qkv(qkv, cu, 40, 0.5, "native"),
        lambda qkv: reference.varlen_attention(*qkv.unbind(1), cu, cu, 0.5),
        (qkv,),
    )


def test_equal_scores_give_exact_means():
    """Integers stay integers: the mean of 64 equal values, and counts as gradients of them."""
    qkv = torch.ones(64, 3, 2, 32).bfloat16()
    (out,), (dqkv,) = oracle.differentiate(
        lambda qkv: varlen_attention_qkv(qkv, cu_seqlens([64]), 64, backend="native"), (qkv,), (2 * qkv[:, 0],)
    )
    assert torch.equal(out, qkv[:, 0])
    assert torch.equal(dqkv, torch.tensor([0.0, 0, 2]).bfloat16()[:, None, None].expand_as(dqkv))


def test_not_a_number_stays_in_its_sequence():
    qkv, cu, upstream = random(50, 3, 1, 24), cu_seqlens([20, 30]), (random(50, 1, 24),)

    def attention(qkv):
        return varlen_attention_qkv(qkv, cu, 30, backend="native")

    whole = oracle.differentiate(attention, (qkv,), upstream)
    for spoiler in (torch.nan, torch.inf):
        qkv[25, 1] = spoiler
        for (before,), (after,) in zip(whole, oracle.differentiate(attention, (qkv,), upstream), strict=True):
            assert torch.equal(before[:20], after[:20])
            assert after[20:].isnan().any()
        if spoiler != spoiler:
            assert attention(qkv)[20:].isnan().all()
    qkv[25, 1], qkv[25, 2, 0, 3] = 0, torch.inf
    assert (attention(qkv)[20:, 0, 3] == torch.inf).all()


def test_auto_takes_the_loops():
    qkv, cu = random(12, 3, 2, 24), cu_seqlens([7, 5])
    assert attention_native.unsupported(qkv, 1.0) is None
    assert torch.equal(varlen_attention_qkv(qkv, cu, 7), varlen_attention_qkv(qkv, cu, 7, backend="native"))
    dense = qkv.unflatten(0, (3, 4))
    assert torch.equal(dense_attention(dense), dense_attention(dense, "native"))


@pytest.mark.parametrize(("tokens", "inputs", "outputs"), [(1, 16, 16), (7, 48, 5), (129, 80, 384), (600, 528, 272)])
def test_linear(poisoned, tokens, inputs, outputs):
    x, weight, bias = random(tokens, inputs), random(outputs, inputs), random(outputs)
    assert linear_cpu.unsupported(x, weight) is None or not torch.backends.mkldnn.is_available()
    assert_as_good_as_pytorch(linear, F.linear, (x, weight, bias))
    assert_as_good_as_pytorch(
        lambda x, weight, bias: ops.linear_gelu(x, weight, bias, bias_gelu),
        lambda x, weight, bias: F.gelu(F.linear(x, weight, bias)),
        (x, weight / inputs**0.5, bias),
    )


@needs_amx
@pytest.mark.parametrize(
    ("tokens", "inputs", "outputs"),
    [(0, 16, 16), (1, 16, 32), (513, 528, 272), (70, 48, 16), (1030, 1040, 48), (300, 400, 1536)],
)
def test_weight_gradient(poisoned, tokens, inputs, outputs):
    """Tokens, rows and columns beyond one block, tiles that are not full."""
    dy, x = random(tokens, outputs), random(tokens, inputs)
    assert linear_native.unsupported(dy, x) is None
    assert_as_good(linear_native.linear_dweight(dy, x), dy.t() @ x, dy.double().t() @ x.double())


@needs_amx
def test_weight_gradient_of_integers_is_exact_on_any_threads():
    dy, x = (torch.randint(-1, 2, (120, n)).bfloat16() for n in (112, 96))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(linear_native.linear_dweight(dy, x))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result.double(), dy.double().t() @ x.double()) for result in results)


def test_gradients_of_a_whole_step_are_within_two_percent():
    """Of the fp64 ones with unrounded weights; the norm of the difference, of all parameters."""
    images = torch.randint(0, 256, (8, 64, 64, 3), dtype=torch.uint8)
    draw = pack(make_sampler("multiblock", (8, 8), min_keep=3)(8, 0, 0))

    def loss_and_gradients(dtype):
        model = to(small_ijepa(dim=96, heads=3, predictor_dim=48), dtype)
        loss = loss_of(model, images, draw)
        loss.backward()
        parameters = [p for network in model.trained.values() for p in network.parameters()]
        return loss.item(), torch.cat([p.grad.double().flatten() for p in parameters])

    loss, gradient = loss_and_gradients(torch.bfloat16)
    exact_loss, exact = loss_and_gradients(torch.float64)
    assert loss == pytest.approx(exact_loss, rel=1e-3)
    assert (gradient - exact).norm() <= 2e-2 * exact.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_of_processors(kind):
    """The same tests with the loops of each kind of processor that this one can stand for."""
    if os.environ.get(VARIABLE):
        pytest.skip("this is such a run")
    if KINDS.index(kind) >= KINDS.index(native.loops()):
        pytest.skip(f"this processor stands for kinds below its own, {native.loops()}")
    done = pytest_with({VARIABLE: kind}, "not processors and not permission")
    assert done.returncode == 0, done.stdout[-3000:]


def pytest_with(variables, tests):
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k", tests]
    return subprocess.run(command, env=os.environ | variables, capture_output=True, text=True)


def python_with(variables, program):
    return subprocess.run([sys.executable, "-c", program], env=os.environ | variables, capture_output=True, text=True)


def test_a_kind_that_does_not_exist_is_named():
    done = python_with({VARIABLE: "fast"}, "from ijepa_fast.kernels.common import native; print(native.loops())")
    assert done.stderr.count("IJEPA_FAST_CPU_LOOPS is none of any, v3, v4 and amx, and is ignored") == 1
    assert done.stdout.strip() in KINDS


# A filter in the kernel, as containers have it, that refuses arch_prctl's request for the tiles (0x1023).
REFUSE_TILES = """
import ctypes, struct
instructions = [
    (0x20, 0, 0, 0),       # the system call's number
    (0x15, 0, 3, 158),     # other than arch_prctl: allow
    (0x20, 0, 0, 16),      # its first argument
    (0x15, 0, 1, 0x1023),  # other than this: allow
    (0x06, 0, 0, 0x50001), # EPERM
    (0x06, 0, 0, 0x7fff0000),
]
code = b"".join(struct.pack("HBBI", *instruction) for instruction in instructions)
program = struct.pack("HxxxxxxP", len(instructions), ctypes.addressof(buffer := ctypes.create_string_buffer(code)))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, program, 0, 0) == 0, ctypes.get_errno()
"""

STEP = """
import torch
from ijepa_fast.kernels.common import native
from ijepa_fast.kernels.linear import linear
from ijepa_fast.kernels.varlen_attention import dense_attention
x, weight = torch.randn(64, 96).bfloat16(), torch.randn(96, 96).bfloat16().requires_grad_()
for _ in range(2):
    dense_attention(linear(x, weight).view(2, 32, 3, 2, 16)).sum().backward()
assert weight.grad.isfinite().all()
print(native.loops())
"""


@needs_amx
def test_without_permission_for_tiles_the_run_goes_on():
    done = python_with({}, REFUSE_TILES + STEP)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "v4"
    assert done.stderr.count("does not permit its tiles") == 1


def test_without_a_product_of_onednn_the_run_goes_on():
    done = python_with({"ONEDNN_MAX_CPU_ISA": "AVX2"}, STEP)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("oneDNN has no bfloat16 product") == torch.backends.mkldnn.is_available()


def test_opcheck():
    library, x, dy = torch.ops.ijepa_fast, random(7, 32), random(7, 16)
    torch.library.opcheck(library.column_sums_cpu_.default, (x, random(32)))
    if linear_native.unsupported(dy, x) is None:
        torch.library.opcheck(library.linear_dweight_cpu_.default, (dy, x, random(16, 32)))
