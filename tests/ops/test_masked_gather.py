"""masked_gather: copies are exact, gradients, index layouts, registration, compilation, bad input."""

import pytest
import torch

from ijepa_fast.kernels.common import checks
from ijepa_fast.kernels.masked_gather import masked_gather, reference
from tests import oracle

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
PERIOD = 6


def make(rows, width, dtype, device, index):
    x = torch.randn(rows, width).to(device, dtype)
    positions = torch.randn(PERIOD, width).to(device, dtype)
    return x, torch.tensor(index, dtype=torch.int32, device=device), positions


def with_positions(unique):
    return lambda x, index, positions: masked_gather(x, index, positions, unique=unique)


def reference_with_positions(x, index, positions):
    return reference.masked_gather(x, index, positions, PERIOD)


@pytest.mark.gpu
@pytest.mark.parametrize("unique", [True, False])
def test_large_on_gpu(triton_everywhere, unique):
    index = torch.randperm(32768)[:14081] if unique else torch.randint(0, 32768, (14081,))
    inputs = make(32768, 1280, torch.bfloat16, triton_everywhere, index.tolist())
    oracle.check_against_reference(with_positions(unique), reference_with_positions, inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [24, 300, 384])
@pytest.mark.parametrize(
    ("index", "unique"),
    [([7], True), ([0, 3, 23, 22, 5], True), ([*range(23, -1, -1)], True), ([2, 2, 2, 0, 23, 0], False)],
    ids=["one", "some", "all", "repeated"],
)
def test_matches_reference(triton_everywhere, poisoned, index, unique, width, dtype):
    x, index, positions = make(24, width, dtype, triton_everywhere, index)
    assert torch.equal(masked_gather(x, index, unique=unique), x[index.long()])
    oracle.check_against_reference(
        with_positions(unique), reference_with_positions, (x, index, positions), names=("x", "positions")
    )
    oracle.check_against_reference(
        lambda x: masked_gather(x, index, unique=unique), lambda x: reference.masked_gather(x, index, None, 1), (x,)
    )


def test_index_layouts(triton_everywhere, poisoned):
    """Any index, empty and all alike included: the sum for repeated rows is exact on whole numbers."""
    hypothesis = pytest.importorskip("hypothesis")
    strategies = hypothesis.strategies

    @hypothesis.settings(max_examples=25, deadline=None)
    @hypothesis.given(rows=strategies.integers(1, 40), data=strategies.data())
    def check(rows, data):
        index = data.draw(strategies.lists(strategies.integers(0, rows - 1), max_size=50))
        x, index, _ = make(rows, 8, torch.float32, triton_everywhere, index)
        upstream = torch.randint(-9, 9, (len(index), 8), device=x.device).float()
        (y,), (dx,) = oracle.differentiate(lambda x: masked_gather(x, index), (x,), (upstream,))
        assert torch.equal(y, x[index.long()])
        assert torch.equal(dx, torch.zeros_like(x).index_add_(0, index, upstream))
        distinct = index.unique()
        (_,), (dx,) = oracle.differentiate(
            lambda x: masked_gather(x, distinct, unique=True), (x,), (upstream[: len(distinct)],)
        )
        assert torch.equal(dx, torch.zeros_like(x).index_add_(0, distinct, upstream[: len(distinct)]))

    check()


def test_period_shorter_than_positions(triton_everywhere):
    x, index, positions = make(24, 8, torch.float32, triton_everywhere, [0, 5, 23])
    expected = x[index.long()] + positions[(index % 4).long()]
    assert torch.equal(masked_gather(x, index, positions, period=4), expected)


def test_fp32_positions_with_low_precision_tokens(triton_everywhere, poisoned):
    x, index, positions = make(24, 96, torch.bfloat16, triton_everywhere, [1, 1, 9, 23])
    oracle.check_against_reference(with_positions(False), reference_with_positions, (x, index, positions.float()))


def test_index_out_of_range_writes_nothing_outside(triton_everywhere):
    """Without the debug check such a row is lost, but no foreign memory is written."""
    buffer = torch.zeros(12, 8, device=triton_everywhere)
    index = torch.tensor([-1, 2, 4], dtype=torch.int32, device=triton_everywhere)
    dx = torch.ops.ijepa_fast.masked_gather_bwd(buffer[:3] + 1, index, 4, True, torch.float32)
    assert dx.sum(1).tolist() == [0, 0, 8, 0]
    dx = torch.ops.ijepa_fast.masked_gather_bwd(buffer[:3] + 1, index, 4, False, torch.float32)
    assert dx.sum(1).tolist() == [0, 0, 8, 0]


def test_deterministic(triton_everywhere):
    x, index, positions = make(24, 32, torch.bfloat16, triton_everywhere, torch.randint(0, 24, (150,)).tolist())
    upstream = (torch.randn(150, 32, device=x.device),)
    first, second = (oracle.differentiate(with_positions(False), (x, index, positions), upstream)[1] for _ in range(2))
    for a, b in zip(first, second):
        assert torch.equal(a, b)


def test_gradcheck_of_reference():
    x, index, positions = make(24, 3, torch.float64, "cpu", [4, 4, 0, 17])
    oracle.gradcheck(
        lambda x, positions: reference.masked_gather(x, index, positions, PERIOD),
        x.requires_grad_(),
        positions.requires_grad_(),
    )


def test_opcheck(triton_everywhere):
    x, index, positions = make(24, 32, torch.float32, triton_everywhere, [4, 4, 0, 17])
    library = torch.ops.ijepa_fast
    oracle.opcheck(library.masked_gather_fwd, x, index, None, 1)
    oracle.opcheck(library.masked_gather_fwd, x, index, positions, PERIOD)
    oracle.opcheck(library.masked_gather_bwd, torch.randn_like(x[:4]), index, 24, False, torch.bfloat16)
    oracle.opcheck(library.masked_gather_bwd, torch.randn_like(x[:3]), index[1:], 24, True, torch.float32)


@pytest.mark.parametrize("unique", [True, False])
def test_compiles_once(triton_everywhere, unique):
    calls = [make(24, 32, torch.float32, triton_everywhere, list(range(tokens))) for tokens in (5, 9, 17)]
    for x, _, positions in calls:
        x.requires_grad_()
        positions.requires_grad_()
    assert oracle.count_compiles(with_positions(unique), calls) == 1


@pytest.mark.parametrize(
    ("argument", "change", "message"),
    [
        ("x", lambda x: x[0], "x: expected shape"),
        ("x", lambda x: x.int(), "x: expected dtype"),
        ("x", lambda x: x.mT.contiguous().mT, "x: expected a contiguous"),
        ("index", lambda x: x.long(), "index: expected dtype torch.int32, got torch.int64"),
        ("index", lambda x: x[None], "index: expected shape"),
        ("index", lambda x: x.to("meta"), "index: expected device"),
        ("positions", lambda x: x[:, :4], "positions: expected shape"),
        ("period", lambda x: 7, "period: expected 1 to 6"),
    ],
)
def test_bad_input_is_named(argument, change, message):
    x, index, positions = make(24, 8, torch.float32, "cpu", [1, 2])
    good = dict(x=x, index=index, positions=positions, period=None)
    good[argument] = change(good[argument])
    with pytest.raises(ValueError, match=message):
        masked_gather(**good)


def test_debug_mode_reads_the_index(monkeypatch):
    x, index, _ = make(24, 8, torch.float32, "cpu", [1, 2])
    monkeypatch.setattr(checks, "debug", True)
    with pytest.raises(ValueError, match=r"index: expected values in \[0, 2\), got values from 1 to 2"):
        masked_gather(x[:2], index)
    with pytest.raises(ValueError, match="index: expected no value twice, got 1 distinct of 2"):
        masked_gather(x, torch.ones_like(index), unique=True)
