"""varlen_attention: kernels and CPU path against the reference, backends, registration, compilation, bad input."""

import logging
import warnings

import pytest
import torch
import torch.nn.functional as F

from ijepa_fast.kernels.common import dispatch
from ijepa_fast.kernels.common.native import available
from ijepa_fast.kernels.varlen_attention import (
    backends,
    cpu,
    dense_attention,
    ops,
    reference,
    tiles,
    varlen_attention,
    varlen_attention_qkv,
)
from tests import oracle

HEAD_DIMS = [24, 32, 64, 80, 88]
# Where the Triton kernels run: on the GPU if there is one, in the interpreter otherwise.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Both sides of the tiles' edges, length 1, empty.
LENGTHS = {"short": [5, 0, 63, 1, 64], "two tiles": [65, 128], "mixed": [129, 3]}


def cu_seqlens(lengths, device="cpu"):
    return torch.tensor([0, *lengths]).cumsum(0).int().to(device)


def make(tokens, heads, head_dim, dtype, device="cpu"):
    return torch.randn(tokens, 3, heads, head_dim).to(device, dtype)


def self_attention(lengths, backend="triton", scale=None):
    """varlen_attention_qkv of `lengths` as a function of qkv."""
    return lambda qkv: varlen_attention_qkv(qkv, cu_seqlens(lengths, qkv.device), max(lengths), scale, backend)


def self_reference(lengths, scale=None):
    cu = cu_seqlens(lengths)
    return lambda qkv: reference.varlen_attention(*qkv.unbind(1), cu, cu, scale)


def cross_attention(lengths_q, lengths_k, backend="triton"):
    """varlen_attention as a function of q and of keys-values (Tk, 2, H, d)."""
    return lambda q, kv: varlen_attention(
        q,
        *kv.unbind(1),
        cu_seqlens(lengths_q, q.device),
        cu_seqlens(lengths_k, q.device),
        max(lengths_q),
        max(lengths_k),
        backend=backend,
    )


def cross_reference(lengths_q, lengths_k):
    lengths = (cu_seqlens(lengths_q), cu_seqlens(lengths_k))
    return lambda q, kv: reference.varlen_attention(q, *kv.unbind(1), *lengths)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_on_gpu(head_dim, dtype):
    for lengths in (
        [1024, 1, 257],
        [256] * 8,
        torch.randint(50, 200, (96,)).tolist(),
        torch.randint(1, 128, (64,)).tolist(),
    ):
        qkv = make(sum(lengths), 16, head_dim, dtype, "cuda")
        oracle.check_against_reference(self_attention(lengths), self_reference(lengths), (qkv,))
        queries = [min(length, 44) for length in lengths]
        q = torch.randn(sum(queries), 16, head_dim, device="cuda", dtype=dtype)
        oracle.check_against_reference(
            cross_attention(queries, lengths), cross_reference(queries, lengths), (q, qkv[:, 1:])
        )


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["torch", "flash2", "flash4", "xformers"])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_libraries_on_gpu(name, head_dim):
    lengths = [70, 1, 130]
    qkv = make(sum(lengths), 4, head_dim, torch.bfloat16, "cuda")
    try:
        self_attention(lengths, name)(qkv)
    except RuntimeError as error:
        pytest.skip(str(error))
    oracle.check_against_reference(self_attention(lengths, name), self_reference(lengths), (qkv,))


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_kernel_matches_reference(triton_everywhere, poisoned, lengths, head_dim):
    qkv = make(sum(lengths), 2, head_dim, torch.float16, triton_everywhere)
    oracle.check_against_reference(self_attention(lengths), self_reference(lengths), (qkv,), names=("qkv",))


def test_longest_sequence(triton_everywhere, poisoned):
    """1,024 tokens, as at 448 pixels with every patch, beside a single one."""
    qkv = make(1025, 1, 32, torch.float16, triton_everywhere)
    oracle.check_against_reference(self_attention([1024, 1]), self_reference([1024, 1]), (qkv,), names=("qkv",))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [16, 24, 80])
def test_kernel_matches_reference_in_other_dtypes(triton_everywhere, poisoned, head_dim, dtype):
    lengths = [31, 1, 0, 70, 32]
    qkv = make(sum(lengths), 3, head_dim, dtype, triton_everywhere)
    oracle.check_against_reference(self_attention(lengths), self_reference(lengths), (qkv,), names=("qkv",))


@pytest.mark.parametrize(("lengths_q", "lengths_k"), [([5, 9, 0, 70], [40, 0, 7, 20]), ([3, 66], [260, 1])], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_queries_of_other_lengths(triton_everywhere, poisoned, lengths_q, lengths_k, dtype):
    """What the last blocks ask for; also queries without keys, and keys without queries."""
    q = torch.randn(sum(lengths_q), 2, 24).to(triton_everywhere, dtype)
    kv = torch.randn(sum(lengths_k), 2, 2, 24).to(triton_everywhere, dtype)
    oracle.check_against_reference(
        cross_attention(lengths_q, lengths_k), cross_reference(lengths_q, lengths_k), (q, kv), names=("q", "kv")
    )


@pytest.mark.parametrize("capability", [8, 9, 10])
@pytest.mark.parametrize("head_dim", [32, 88])
def test_tiles_of_every_device(triton_everywhere, poisoned, monkeypatch, capability, head_dim):
    """On a CPU the interpreter runs the tiles of each device family; on a GPU, those that fit it."""
    from ijepa_fast.kernels.varlen_attention import kernel

    if triton_everywhere.type == "cuda" and capability > torch.cuda.get_device_capability()[0]:
        pytest.skip("tiles of a newer device")
    monkeypatch.setattr(kernel, "_capability", lambda x: capability)
    for lengths in ([9, 64], [100, 20], [150, 20]):
        qkv = make(sum(lengths), 1, head_dim, torch.float16, triton_everywhere)
        oracle.check_against_reference(self_attention(lengths), self_reference(lengths), (qkv,))


@pytest.mark.parametrize(("exact", "scale"), [(False, None), (True, None), (True, 0.125)])
def test_large_scores(triton_everywhere, poisoned, exact, scale):
    """Scores of several hundred, on both sides of zero: the softmax neither overflows nor loses the masked keys.

    exact: of integers, whose products are exact in any order; with a scale of .125 scores are, too.
    """
    lengths = [33, 7]
    qkv = make(sum(lengths), 2, 32, torch.float32, triton_everywhere)
    qkv[:, :2] *= 8
    qkv[:, 0, 0] = -qkv[:, 1, 0].mean(0)
    if exact:
        qkv[:, :2] = qkv[:, :2].round()
    oracle.check_against_reference(self_attention(lengths, scale=scale), self_reference(lengths, scale), (qkv,))


def test_scale(triton_everywhere):
    qkv = make(12, 2, 16, torch.float32, triton_everywhere)
    oracle.check_against_reference(self_attention([8, 4], scale=-0.3), self_reference([8, 4], -0.3), (qkv,))


def test_any_lengths():
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies

    @hypothesis.settings(max_examples=8, deadline=None)
    @hypothesis.given(lengths=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 70)), min_size=1, max_size=4))
    def check_one(lengths):
        # With one key a gradient is exactly zero, and so would be its budget; the last sequence gives that its scale.
        lengths_q, lengths_k = (list(side) for side in zip(*lengths, (8, 8)))
        q = torch.randn(sum(lengths_q), 1, 24)
        kv = torch.randn(sum(lengths_k), 2, 1, 24)
        expected = cross_reference(lengths_q, lengths_k)
        for backend, device in (("triton", DEVICE), ("sdpa", "cpu")):
            inputs = q.to(device), kv.to(device)
            oracle.check_against_reference(cross_attention(lengths_q, lengths_k, backend), expected, inputs)

    check_one()


def test_deterministic(triton_everywhere):
    qkv = make(200, 2, 64, torch.float16, triton_everywhere)
    upstream = (torch.randn(200, 2, 64).to(qkv),)
    first, second = (oracle.differentiate(self_attention([150, 50]), (qkv,), upstream) for _ in range(2))
    assert torch.equal(first[0][0], second[0][0])
    assert torch.equal(first[1][0], second[1][0])


def test_neighbouring_sequences_do_not_matter(triton_everywhere):
    qkv = make(100, 2, 80, torch.float16, triton_everywhere)
    together = self_attention([30, 70])(qkv)
    qkv[30:] = float("nan")
    assert torch.equal(self_attention([30, 70])(qkv)[:30], together[:30])


@pytest.mark.parametrize("lengths", [[8, 8, 8], [5, 0, 12, 1], [70, 3, 90], [0, 0]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cpu_path_matches_reference(lengths, dtype):
    qkv = make(sum(lengths), 2, 24, dtype)
    oracle.check_against_reference(self_attention(lengths, "sdpa"), self_reference(lengths), (qkv,))


def test_cpu_path_with_uniform_keys_and_ragged_queries():
    q, kv = torch.randn(12, 2, 24), torch.randn(24, 2, 2, 24)
    oracle.check_against_reference(
        cross_attention([5, 7], [12, 12], "sdpa"), cross_reference([5, 7], [12, 12]), (q, kv)
    )


def test_dense_attention():
    qkv = torch.randn(2, 19, 3, 2, 24)
    expected = self_reference([19, 19])(qkv.flatten(0, 1)).unflatten(0, (2, 19))
    for backend in ("auto", "sdpa", "triton", "reference"):
        actual = dense_attention(qkv.to(DEVICE if backend == "triton" else "cpu"), backend)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5, check_device=False)


def test_reference_is_attention_of_each_sequence():
    q, k, v = make(14, 2, 8, torch.float64).unbind(1)
    out = reference.varlen_attention(q, k, v, cu_seqlens([5, 9]), cu_seqlens([5, 9]))
    for rows in (slice(0, 5), slice(5, 14)):
        expected = F.scaled_dot_product_attention(*(x[rows].transpose(0, 1) for x in (q, k, v))).transpose(0, 1)
        torch.testing.assert_close(out[rows], expected)


def test_gradcheck_of_reference():
    q = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    kv = torch.randn(7, 2, 2, 3, dtype=torch.float64, requires_grad=True)
    oracle.gradcheck(cross_reference([2, 0, 3], [3, 4, 0]), q, kv)


def test_plain_implementation_of_the_ops(triton_everywhere):
    """What the registered ops do on a CPU without Triton's interpreter: the kernels' results, lse included."""
    lengths = [7, 0, 40]
    qkv, cu = make(47, 2, 24, torch.float32, triton_everywhere), cu_seqlens(lengths, triton_everywhere)
    arguments = (cu, cu, 40, 40, 24**-0.5)
    where = (cpu, torch.ops.ijepa_fast)
    plain, kernel = (w.varlen_attention_fwd(*qkv.unbind(1), *arguments) for w in where)
    torch.testing.assert_close(kernel, plain, rtol=1e-5, atol=1e-5)
    dout = torch.randn_like(plain[0])
    plain, kernel = (w.varlen_attention_bwd(dout, *qkv.unbind(1), *plain, *arguments) for w in where)
    torch.testing.assert_close(kernel, plain, rtol=1e-4, atol=1e-5)
    packed = cpu.varlen_attention_qkv_bwd(dout, qkv, None, None, cu, 40, 24**-0.5)
    assert torch.equal(packed, torch.stack(plain, 1))


def test_split_of_head_dims():
    widths = {dim: tuple(tiles.split(dim).values()) for dim in (8, 16, 24, 32, 48, 64, 80, 88, 96, 128)}
    assert widths == {
        8: (16, 0),
        16: (16, 0),
        24: (32, 0),
        32: (32, 0),
        48: (32, 16),
        64: (64, 0),
        80: (64, 16),
        88: (64, 32),
        96: (64, 32),
        128: (128, 0),
    }


def test_opcheck(triton_everywhere):
    qkv, cu = make(20, 2, 24, torch.float32, triton_everywhere), cu_seqlens([13, 7], triton_everywhere)
    q, k, v = qkv.unbind(1)
    lengths = (cu, cu, 13, 13, 0.2)
    library = torch.ops.ijepa_fast
    oracle.opcheck(library.varlen_attention_fwd, q, k, v, *lengths)
    out, lse = library.varlen_attention_fwd(q, k, v, *lengths)
    dout = torch.randn_like(out)
    oracle.opcheck(library.varlen_attention_bwd, dout, q, k, v, out, lse, *lengths)
    oracle.opcheck(library.varlen_attention_qkv_bwd, dout, qkv, out, lse, cu, 13, 0.2)


def test_compiles_once(triton_everywhere):
    def step(qkv, q, cu, cu_q, length, length_q):
        out = varlen_attention_qkv(qkv, cu, length)
        return out, varlen_attention(q, out, qkv[:, 2], cu_q, cu, length_q, length)

    calls = []
    # Not two sequences first: torch.compile would take their three bounds for the constant 3 of qkv's shape.
    for lengths, queries in (([21, 30, 9], [5, 4, 4]), ([13, 7], [3, 2]), ([18, 3], [2, 9])):
        qkv = make(sum(lengths), 2, 16, torch.float32, triton_everywhere).requires_grad_()
        q = torch.randn(sum(queries), 2, 16).to(triton_everywhere).requires_grad_()
        cus = (cu_seqlens(lengths, triton_everywhere), cu_seqlens(queries, triton_everywhere))
        calls.append((qkv, q, *cus, max(lengths), max(queries)))
    assert oracle.count_compiles(step, calls) == 1


def test_auto_takes_the_measured_backend_and_says_so_once(monkeypatch, caplog):
    class OnGPU:
        """A stand-in for a CUDA tensor: what the choice looks at."""

        is_cuda, device, shape = True, torch.device("cuda", 0), (10, 4, 64)

    monkeypatch.setattr(backends, "_capability", lambda device: (9, 0))
    row = backends.Measured((9, 0), (64, 80), max_seqlen=256, training=True, backend="flash2")
    monkeypatch.setattr(backends, "MEASURED", (row,))
    backends._log_once.cache_clear()
    with caplog.at_level(logging.INFO, "ijepa_fast"):
        assert [backends.choose(OnGPU, 200, 1.0, training=True) for _ in range(2)] == ["flash2", "flash2"]
        assert backends.choose(OnGPU, 300, 1.0, training=True) == backends.NOT_MEASURED
        assert backends.choose(OnGPU, 200, 1.0, training=False) == backends.NOT_MEASURED
    assert [record.getMessage() for record in caplog.records] == [
        "varlen_attention: flash2 for head dim 64, training, on compute capability 9.0 (measured)",
        "varlen_attention: triton for head dim 64, training, on compute capability 9.0 (not measured)",
        "varlen_attention: triton for head dim 64, inference, on compute capability 9.0 (not measured)",
    ]
    assert backends.choose(torch.randn(1, 1, 16), 1, 1.0, training=True) == ("native" if available() else "sdpa")
    assert backends.choose(torch.randn(1, 1, 24), 1, 1.0, training=True) == "sdpa"


def test_dispatch_setting_decides_what_auto_is(triton_everywhere, monkeypatch):
    qkv, cu = make(5, 1, 16, torch.float32, triton_everywhere), cu_seqlens([5], triton_everywhere)
    used = []
    for name in ("sdpa", "reference"):
        monkeypatch.setitem(backends.FUNCTIONS, name, lambda *args, name=name: used.append(name))
    monkeypatch.setattr(ops._AttentionQKV, "apply", lambda *args: used.append("triton"))
    for setting in ("triton", "reference"):
        dispatch.use({"varlen_attention": setting})
        varlen_attention_qkv(qkv, cu, 5)
    assert used == ["triton", "reference"]


def test_the_choice_is_traced_without_a_warning(monkeypatch):
    """Under torch.compile the device's capability is a constant; with it, the measured case is found."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    measured = backends.MEASURED[0]

    @torch.compile(backend="eager", fullgraph=True)
    def function(x):
        return x + (1 if backends._capability(x.device) == measured.capability else 2)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert function(torch.zeros(1)) == 1


@pytest.mark.parametrize("name", ["torch", "flash2", "flash4", "xformers"])
def test_a_backend_that_cannot_be_had_is_an_error(name):
    qkv, cu = make(5, 1, 16, torch.float32), cu_seqlens([5])
    with pytest.raises(RuntimeError, match=f"backend='{name}' needs a CUDA device, q is on cpu"):
        varlen_attention_qkv(qkv, cu, 5, backend=name)


@pytest.mark.parametrize(
    ("reason", "head_dim", "dtype"),
    [
        ("computes in float32; q is float64", 16, torch.float64),
        ("takes head dims up to 128, got 136", 136, torch.float32),
    ],
    ids=["dtype", "head dim"],
)
def test_what_triton_does_not_take(reason, head_dim, dtype):
    with pytest.raises(RuntimeError, match=f"backend='triton' {reason}"):
        varlen_attention_qkv(make(5, 1, head_dim, dtype).to(DEVICE), cu_seqlens([5]).to(DEVICE), 5, backend="triton")


def test_what_cannot_be_had_is_named(monkeypatch):
    qkv, cu = make(5, 1, 16, torch.float32), cu_seqlens([5])
    monkeypatch.setattr(backends, "interpreted", lambda: False)
    with pytest.raises(RuntimeError, match="backend='triton' needs a CUDA device or"):
        varlen_attention_qkv(qkv, cu, 5, backend="triton")
    monkeypatch.setattr(backends, "_HAS_TRITON", False)
    with pytest.raises(RuntimeError, match="needs the package triton, which is not installed"):
        varlen_attention_qkv(qkv, cu, 5, backend="triton")
    with pytest.raises(RuntimeError, match="backend='flash2' needs the package flash-attn 2, which cannot be imported"):
        backends._import("a_package_nobody_has", "flash2", "flash-attn 2")


@pytest.mark.parametrize(
    ("argument", "change", "message"),
    [
        ("q", lambda x: x[0], "q: expected shape"),
        ("q", lambda x: x.int(), "q: expected dtype"),
        ("q", lambda x: x.mT.contiguous().mT, "q: expected the 2 heads of a row side by side"),
        ("k", lambda x: x[:, :1], "k: expected shape"),
        ("k", lambda x: x.half(), "k: expected dtype"),
        ("v", lambda x: x[:7], "v: expected shape"),
        ("v", lambda x: x.to("meta"), "v: expected device"),
        ("cu_seqlens_q", lambda x: x.long(), "cu_seqlens_q: expected dtype"),
        ("cu_seqlens_k", lambda x: x[None], "cu_seqlens_k: expected shape"),
        ("cu_seqlens_k", lambda x: cu_seqlens([5, 3, 0]), "cu_seqlens_k: expected as many"),
        ("cu_seqlens_q", lambda x: cu_seqlens([4, -1, 5]), "cu_seqlens_q: expected .* never decrease"),
        ("cu_seqlens_q", lambda x: cu_seqlens([5, 2]), r"cu_seqlens_q: .* end at the row count 8, got \[0, 5, 7\]"),
        ("cu_seqlens_k", lambda x: x + 1, "cu_seqlens_k: expected values that start at 0"),
        ("max_seqlen_k", lambda x: 4, "max_seqlen_k: expected at least 5"),
        ("backend", lambda x: "flash3", "backend: expected one of"),
    ],
)
def test_bad_input_is_named(argument, change, message):
    (q, k, v), cu = make(8, 2, 16, torch.float32).unbind(1), cu_seqlens([5, 3])
    good = dict(q=q, k=k, v=v, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=5, max_seqlen_k=5, backend="auto")
    good[argument] = change(good[argument])
    with pytest.raises(ValueError, match=f"varlen_attention: {message}"):
        varlen_attention(**good)


def test_bad_input_of_self_attention_is_named():
    q, cu = make(8, 2, 16, torch.float32)[:, 0], cu_seqlens([5, 3])
    with pytest.raises(ValueError, match="qkv: expected shape"):
        varlen_attention_qkv(q, cu, 5)
    with pytest.raises(ValueError, match="qkv: expected a contiguous"):
        varlen_attention_qkv(torch.randn(8, 3, 16, 2).mT, cu, 5)
    with pytest.raises(ValueError, match="dense_attention: qkv: expected shape"):
        dense_attention(q)


def test_the_target_takes_the_fastest_backend(monkeypatch):
    """Measured; without a gradient only, and none that is hardly faster, so that two starts choose alike."""
    from ijepa_fast.kernels.common import timing
    from ijepa_fast.kernels.varlen_attention import dense, measure_dense_attention, native

    monkeypatch.setattr(dense, "FASTEST", {})
    monkeypatch.setattr(timing, "ROUNDS", 1)
    monkeypatch.setattr(native, "unsupported", lambda *arguments: "not here")
    state, where = torch.get_rng_state(), torch.device("cpu")
    found = measure_dense_attention(2, 9, 2, 16, torch.float32, where)
    assert torch.equal(torch.get_rng_state(), state)
    assert {"default", "flash"} <= found.keys()
    assert list(found.values()) == sorted(found.values())
    qkv, asked = torch.randn(2, 9, 3, 2, 16), []
    attend = dense.attend
    monkeypatch.setattr(dense, "attend", lambda qkv, name: (asked.append(name), attend(qkv, name))[1])
    expected = dense_attention(qkv, "sdpa")
    for fastest in ("default", "flash"):
        dense.FASTEST[2, 16] = fastest
        torch.testing.assert_close(dense_attention(qkv), expected)
        dense_attention(qkv.clone().requires_grad_())
    assert asked == ["default", "default", "default", "flash", "default"]
    monkeypatch.setattr(dense, "SDPA", {"flash": dense.SDPBackend.FLASH_ATTENTION})
    now, times = [], {}
    monkeypatch.setattr(dense, "attend", lambda qkv, name: (now.append(times[name]), qkv)[1])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: sum(now))
    for slower, taken in ((1.0, "default"), (1.2, "flash")):
        times.update(default=slower, flash=1.0)
        dense.measure(qkv, lambda qkv: qkv / 0)  # what is wrong is left out
        assert dense.FASTEST[2, 16] == taken
