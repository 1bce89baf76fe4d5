"""mask_sampler: NumPy, C++ and Triton draw the same masks; their distribution is the published one, or the paper's."""

import sys
import threading
import time

import numpy as np
import pytest
import torch

from ijepa_fast.kernels.common import checks, dispatch, native
from ijepa_fast.kernels.mask_sampler import Key, below, random_subset, sample_blocks, words
from ijepa_fast.kernels.mask_sampler.reference import philox
from ijepa_fast.masks.packing import pack
from ijepa_fast.masks.samplers import make_sampler
from tests import oracle

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# grid, targets, target size, contexts, context size, min_keep, skip_last
LAYOUTS = {
    "published": ((16, 16), 4, (7, 6), 1, (15, 15), 10, True),
    "corrected": ((16, 16), 4, (6, 8), 1, (16, 15), 10, False),
    "oblong": ((5, 9), 3, (3, 4), 2, (5, 8), 7, False),
    # No context block keeps enough beside such targets: each is drawn 20 times before a target is left out.
    "hard": ((7, 7), 2, (5, 5), 1, (4, 4), 13, True),
    "smallest": ((2, 2), 1, (1, 1), 1, (1, 1), 0, False),
    "none": ((4, 4), 0, (1, 1), 1, (2, 3), 5, False),
}
KEYS = [Key(0, 0, 0), Key(2**63 - 1, 2**32 - 1, 2**32 - 2), Key(1, 16, 1)]


@pytest.fixture(params=["csrc", "triton"])
def implementation(request):
    """Masks by the C++ extension (CPU), or by Triton (GPU, else the interpreter). Gives the device."""
    before = {op: dispatch.choice(op) for op in dispatch.OPS}
    if request.param == "csrc":
        if not native.available():
            pytest.skip("the extension ijepa_fast._C is not built")
        dispatch.use("auto")
        yield "cpu"
    else:
        pytest.importorskip("triton")
        dispatch.use("triton")
        yield DEVICE
    dispatch.use(before)


def by_reference(function, *args, **kwargs):
    """`function` by the NumPy reference, on the CPU."""
    before = dispatch.choice("mask_sampler")
    dispatch.use({"mask_sampler": "reference"})
    try:
        return function(*args, **kwargs)
    finally:
        dispatch.use({"mask_sampler": before})


def check_blocks(device, key, batch, layout):
    context, target = sample_blocks(key, batch, *layout, device=device)
    expected = by_reference(sample_blocks, key, batch, *layout)
    assert torch.equal(context.cpu(), expected[0])
    assert torch.equal(target.cpu(), expected[1])


def check_subset(device, key, kept, count, draw):
    subset = random_subset(key, kept.to(device), count.to(device), draw).cpu()
    assert torch.equal(subset, by_reference(random_subset, key, kept, count, draw))
    assert torch.equal(subset.sum(1), count.long())
    assert not (subset & ~kept).any()


def test_philox_gives_the_published_numbers():
    """The known answers that Salmon et al. publish with their generator."""
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)
    answers = {
        ((0,) * 4, (0, 0)): (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2): (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        pi: (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    }
    for (counter, (low, high)), answer in answers.items():
        assert tuple(philox(high << 32 | low, counter)) == answer
        assert tuple(philox(high << 32 | low, (*counter[:3], np.array(counter[3:], np.uint64)))[:, 0]) == answer


@pytest.mark.parametrize("layout", LAYOUTS)
def test_blocks_are_the_reference_bit_for_bit(implementation, poisoned, layout):
    for key in KEYS:
        check_blocks(implementation, key, 1 if layout == "hard" else 3, LAYOUTS[layout])


def test_no_images(implementation):
    context, target = sample_blocks(KEYS[0], 0, *LAYOUTS["published"], device=implementation)
    assert (context.shape, target.shape) == ((1, 0, 256), (4, 0, 42))


@pytest.mark.parametrize("patches", [1, 5, 49, 256, 300])
def test_subset_is_the_reference_bit_for_bit(implementation, poisoned, patches):
    kept = torch.rand(6, patches) < 0.6
    kept[0], kept[1] = True, False
    available = kept.sum(1)
    count = (available * torch.tensor([0.3, 0, 1, 0, 0.5, 0.9])).ceil().int()
    for key in KEYS:
        check_subset(implementation, key, kept, count, draw=2)


@pytest.mark.gpu
def test_large_on_gpu():
    for layout in (LAYOUTS["published"], ((28, 28), 4, (13, 11), 1, (26, 27), 10, False)):
        context, target = sample_blocks(Key(7, 8, 9), 4096, *layout, device="cuda")
        expected = by_reference(sample_blocks, Key(7, 8, 9), 4096, *layout)
        assert torch.equal(context.cpu(), expected[0])
        assert torch.equal(target.cpu(), expected[1])
        check_subset("cuda", Key(7, 8, 9), expected[0][0], expected[0][0].sum(1).int() // 2, 0)


@pytest.mark.skipif(not native.available(), reason="the extension ijepa_fast._C is not built")
def test_any_blocks():
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies

    @hypothesis.settings(max_examples=60, deadline=None)
    @hypothesis.given(data=st.data())
    def check_one(data):
        skip_last = data.draw(st.booleans())
        grid = data.draw(st.tuples(st.integers(2, 20), st.integers(2, 20)))
        sizes = [st.tuples(*(st.integers(1, side - skip_last) for side in grid)) for _ in range(2)]
        target_size, context_size = (data.draw(size) for size in sizes)
        min_keep = data.draw(st.integers(0, context_size[0] * context_size[1] - 1))
        targets, contexts = data.draw(st.integers(0, 5)), data.draw(st.integers(1, 3))
        key = Key(*(data.draw(st.integers(0, 2**bits - 1)) for bits in (63, 32, 32)))
        layout = (grid, targets, target_size, contexts, context_size, min_keep, skip_last)
        check_blocks("cpu", key, data.draw(st.integers(1, 4)), layout)

    check_one()


@pytest.mark.parametrize("layout", ["published", "corrected", "oblong", "hard"])
def test_blocks_are_blocks_and_contexts_avoid_them(layout):
    """What the masks promise, without the reference: rectangles inside the grid, nothing shared, enough kept."""
    grid, _, (h, w), _, _, min_keep, skip_last = LAYOUTS[layout]
    context, target = sample_blocks(Key(3, 4, 5), 200, *LAYOUTS[layout])
    rows, columns = target // grid[1], target % grid[1]
    top, left = rows[..., :1], columns[..., :1]
    assert torch.equal(rows - top, (torch.arange(h * w) // w).expand_as(rows))
    assert torch.equal(columns - left, (torch.arange(h * w) % w).expand_as(rows))
    assert rows.min() == columns.min() == 0
    assert (rows.max(), columns.max()) == (grid[0] - 1 - skip_last, grid[1] - 1 - skip_last)
    assert (context.sum(2) > min_keep).all()
    shared = torch.stack([context.gather(2, t.long().expand(len(context), -1, -1)) for t in target]).any(-1).any(0)
    # 20 failures are as good as impossible in the others: no target is left out there.
    assert shared.any() == (layout == "hard")


def test_masks_of_an_image_are_its_own():
    """They depend on seed, step and the image's place in the step, not on the batch around it."""
    layout = LAYOUTS["published"]
    many, few = sample_blocks(Key(1, 2, 3), 50, *layout)[1], sample_blocks(Key(1, 2, 33), 20, *layout)[1]
    assert torch.equal(many[:, 30:], few)
    for other in (Key(0, 2, 3), Key(1, 1, 3), Key(1, 2, 4), Key(1 + 2**32, 2, 3)):
        assert (sample_blocks(other, 50, *layout)[1] == many).all(2).float().mean() < 0.1


# Grid, batch: context per image, after truncation, target block, union of the targets; measured of the published code.
PUBLISHED = {
    (16, 8): (110, 88, 44, 115),
    (16, 32): (110, 78, 44, 115),
    (16, 128): (110, 68, 44, 115),
    (16, 512): (110, 63, 44, 115),
    (14, 128): (82, 50, 33, 87),
    (28, 16): (357, 272, 137, 353),
}


@pytest.mark.parametrize(("side", "batch"), PUBLISHED)
def test_statistics_of_the_published_sampler(side, batch):
    sampler = make_sampler("multiblock-reference", (side, side))
    sizes = []
    for step in range(max(60, 2000 // batch)):
        masks = sampler(batch, 11, step)
        truncated = pack(masks, "truncate").context_max_seqlen
        union = pack(masks).union_index.numel() / batch
        sizes.append((masks.context.sum(-1).float().mean().item(), truncated, masks.target.shape[2], union))
    mean = np.mean(sizes, axis=0)
    # Three standard errors of these many batches, at least the rounding of the table.
    allowed = np.maximum(3 * np.std(sizes, axis=0) / len(sizes) ** 0.5, 0.01 * mean) + 0.5
    assert np.all(np.abs(mean - PUBLISHED[side, batch]) < allowed), mean


def test_extremes_of_the_published_sampler():
    """Context sizes after truncation at 16x16 and batch 128 lie in [42, 99]; context 15x15; the target sizes.

    6x6 comes of aspects within 0.6 % of 1, so once in 63 batches: five sizes are what one usually sees.
    """
    sampler = make_sampler("multiblock-reference", (16, 16))
    assert sampler.target_sizes == [(5, 7), (6, 6), (6, 7), (7, 6), (8, 6), (9, 6)]
    sizes = [sampler(1, 5, step).target.shape[2] for step in range(1000)]
    assert 5 <= sizes.count(36) <= 30
    batches = [sampler(128, 5, step) for step in range(120)]
    truncated = [pack(masks, "truncate").context_max_seqlen for masks in batches]
    assert min(truncated) >= 42
    assert max(truncated) <= 99
    context = torch.stack([masks.context.any(0).any(0) for masks in batches]).any(0).view(16, 16)
    assert context[:15, :15].all()
    assert context.sum() == 15 * 15


@pytest.mark.parametrize(("strategy", "unused"), [("multiblock-reference", 1), ("multiblock", 0)])
@pytest.mark.parametrize("side", [14, 16])
def test_positions_never_used(strategy, unused, side):
    """The published sampler never touches the last row and column; the corrected one reaches every patch."""
    sampler = make_sampler(strategy, (side, side))
    target, context = torch.zeros(side * side), torch.zeros(side * side)
    for step in range(40):
        masks = sampler(64, 1, step)
        target += torch.bincount(masks.target.flatten(), minlength=side * side)
        context += masks.context.sum((0, 1))
    for used in (target, context):
        used = used.view(side, side) > 0
        assert used[: side - unused, : side - unused].all()
        assert used.sum() == (side - unused) ** 2


def test_statistics_of_the_corrected_sampler():
    """Scale and aspect of its targets are drawn apart, each over its whole range; contexts are up to the whole grid."""
    sampler = make_sampler("multiblock", (16, 16))
    heights, widths, contexts = [], [], []
    for step in range(400):
        masks = sampler(4, 2, step)
        first = masks.target[0, 0]
        heights.append(int(first.max() // 16 - first.min() // 16) + 1)
        widths.append(int(first.max() % 16 - first.min() % 16) + 1)
        contexts.append(masks.context.sum(-1).float().mean().item())
    area, aspect = np.multiply(heights, widths), np.divide(heights, widths)
    # Rounding to whole patches makes 35 to 56 of 38 to 51, and aspects near the ends of [.75, 1.5].
    assert area.min() >= 35
    assert area.max() <= 56
    assert abs(area.mean() - 256 * 0.175) < 1
    assert 0.7 < aspect.min() < 0.78
    assert 1.4 < aspect.max() <= 1.6
    assert abs(np.corrcoef(area, aspect)[0, 1]) < 0.2
    assert abs(np.mean(contexts) - 119) < 3
    published = make_sampler("multiblock-reference", (16, 16))
    shapes = {m.target.shape[2] for m in (published(1, 2, step) for step in range(400))}
    assert len(shapes) < len(set(area.tolist()))


def test_corners_and_subsets_are_uniform():
    """Chi-squared of 20,000 draws: corners over all places, patches over a subset."""
    _, target = sample_blocks(Key(4, 0, 0), 20_000, (9, 9), 1, (3, 4), 1, (9, 9), 10, False)
    corners = np.bincount(target[0, :, 0].numpy(), minlength=81).reshape(9, 9)
    assert not corners[7:].any()
    assert not corners[:, 6:].any()
    assert chi_squared(corners[:7, :6].ravel()) < 5
    subset = random_subset(Key(4, 0, 0), torch.ones(20_000, 50, dtype=torch.bool), torch.full((20_000,), 20).int())
    assert chi_squared(subset.sum(0).numpy()) < 5
    again = random_subset(Key(4, 0, 0), torch.ones(20_000, 50, dtype=torch.bool), torch.full((20_000,), 20).int(), 1)
    assert abs((subset & again).float().mean() - 0.16) < 0.002
    counts = np.bincount(below(words(Key(4, 0, 0), np.arange(20_000), 0)[0], 10), minlength=10)
    assert chi_squared(counts) < 5


def chi_squared(counts):
    """Distance of counts from equal ones, in standard deviations of the chi-squared distribution."""
    expected, freedom = counts.mean(), counts.size - 1
    return abs(((counts - expected) ** 2 / expected).sum() - freedom) / (2 * freedom) ** 0.5


@pytest.mark.timing
@pytest.mark.skipif(not native.available(), reason="the extension ijepa_fast._C is not built")
def test_other_threads_run_meanwhile():
    """The C++ sampler holds no interpreter lock: this thread reads the clock in the middle of the other's call."""
    times, done = [], threading.Event()

    def work():
        times.append(time.perf_counter())
        sample_blocks(Key(0, 0, 0), 150_000, *LAYOUTS["published"])
        times.append(time.perf_counter())
        done.set()

    worker, ticks = threading.Thread(target=work), []
    worker.start()
    while not done.is_set():
        ticks.append(time.perf_counter())
        time.sleep(sys.getswitchinterval() / 10)
    worker.join()
    begin, end = times
    assert any(begin + 0.2 * (end - begin) < tick < begin + 0.8 * (end - begin) for tick in ticks)


def test_opcheck():
    context, target = sample_blocks(Key(0, 0, 0), 2, (4, 4), 2, (2, 2), 1, (3, 3), 1, False, device=DEVICE)
    library = torch.ops.ijepa_fast
    torch.library.opcheck(library.sample_blocks_.default, (context, target, 1, 2, 3, [4, 4], [2, 2], [3, 3], 1, False))
    count = torch.ones(2, dtype=torch.int32, device=DEVICE)
    torch.library.opcheck(
        library.random_subset_.default, (torch.empty_like(context[0]), context[0].clone(), count, 1, 2, 3, 0)
    )


def test_compiles_once():
    def draw(kept, count):
        subset = torch.empty_like(kept)
        torch.ops.ijepa_fast.random_subset_(subset, kept, count, 1, 2, 3, 0)
        return subset

    calls = [(torch.ones(batch, 30, dtype=torch.bool), torch.full((batch,), 7).int()) for batch in (5, 9, 17)]
    assert oracle.count_compiles(draw, [[x.to(DEVICE) for x in call] for call in calls]) == 1


@pytest.mark.parametrize(
    ("message", "argument", "wrong"),
    [
        ("target_size: expected between 1x1 and 6x6, got 7x3", 2, (7, 3)),
        ("target_size: expected between 1x1 and 6x6, got 0x3", 2, (0, 3)),
        ("context_size: expected between 1x1 and 6x6, got 5x7", 4, (5, 7)),
        ("min_keep: expected less than the 25 patches of a context block, got 25", 5, 25),
    ],
    ids=str,
)
def test_bad_blocks_are_named(message, argument, wrong):
    layout = [(6, 6), 2, (3, 3), 1, (5, 5), 4, False]
    layout[argument] = wrong
    with pytest.raises(ValueError, match=f"sample_blocks: {message}"):
        sample_blocks(Key(0, 0, 0), 2, *layout)


def test_the_last_row_and_column_that_are_left_out_are_no_place_for_a_block():
    with pytest.raises(ValueError, match="context_size: expected between 1x1 and 5x5, got 6x6"):
        sample_blocks(Key(0, 0, 0), 2, (6, 6), 2, (3, 3), 1, (6, 6), 4, True)


def kept_and_count():
    return torch.ones(2, 9, dtype=torch.bool), torch.tensor([3, 9], dtype=torch.int32)


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("kept: expected dtype torch.bool", lambda kept, count: (kept.int(), count)),
        ("kept: expected shape", lambda kept, count: (kept[0], count)),
        ("kept: expected a contiguous", lambda kept, count: (kept.mT.contiguous().mT, count)),
        ("count: expected dtype torch.int32, got torch.int64", lambda kept, count: (kept, count.long())),
        ("count: expected shape", lambda kept, count: (kept, count[:1])),
        ("count: expected device", lambda kept, count: (kept, count.to("meta"))),
        (r"count\[1\]: expected between 0 and the 9 patches kept, got 10", lambda kept, count: (kept, count + 1)),
        (r"count\[0\]: expected between 0 and the 9 patches kept, got -1", lambda kept, count: (kept, count - 4)),
    ],
)
def test_bad_subsets_are_named(message, change):
    with pytest.raises(ValueError, match=f"random_subset: {message}"):
        random_subset(Key(0, 0, 0), *change(*kept_and_count()))


@pytest.mark.gpu
def test_debug_mode_reads_the_counts_on_a_gpu(monkeypatch):
    kept, count = kept_and_count()
    monkeypatch.setattr(checks, "debug", True)
    with pytest.raises(ValueError, match=r"count\[1\]: expected between 0 and"):
        random_subset(Key(0, 0, 0), kept.cuda(), count.cuda() + 1)
