"""The mask sampler of reference.py in Triton, bit for bit: one program per image.

Every random number is a function of the image and its purpose, so nothing is shared between programs, and a program
draws again by itself until its context keeps enough. A random subset needs no sort: the count-th smallest key of
(random word, patch number) is found bit by bit, each bit one count over the patches.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ijepa_fast.kernels.common.aot import Case
from ijepa_fast.kernels.mask_sampler.reference import CONTEXT, SUBSET, TARGET, TRIES_PER_TARGET


def _launch_sizes(patches: int) -> tuple[int, int]:
    """(block, warps) for the patches of an image."""
    block = triton.next_power_of_2(patches)
    return block, min(4, max(1, block // 256))


@triton.jit
def _corner(seed, step, place, draw, rows, columns):
    """Row and column of a block that has `rows` x `columns` places to be."""
    row_word, column_word, _c, _d = tl.philox(seed, draw, place, 0, step)
    row = tl.umulhi(row_word, tl.cast(rows, tl.uint32)).to(tl.int32)
    column = tl.umulhi(column_word, tl.cast(columns, tl.uint32)).to(tl.int32)
    return row, column


@triton.jit
def _covers(row, column, patch_row, patch_column, height, width):
    """Whether the block whose first patch is (row, column) covers each patch."""
    in_rows = (patch_row >= row) & (patch_row < row + height)
    return in_rows & (patch_column >= column) & (patch_column < column + width)


_SIZES = ["height", "width", "targets", "target_h", "target_w", "contexts", "context_h", "context_w", "min_keep"]
_KEY = ["seed", "step", "first"]


@triton.jit(do_not_specialize=[*_KEY, *_SIZES, "skip_last"])
def _sample_blocks_kernel(
    context_ptr,  # (contexts, B, N) uint8, 0 or 1
    target_ptr,  # (targets, B, K) int32
    seed,
    step,
    first,
    height,  # of the grid, as is width
    width,
    targets,
    target_h,
    target_w,
    contexts,
    context_h,
    context_w,
    min_keep,
    skip_last,  # 0 or 1
    TARGET: tl.constexpr,
    CONTEXT: tl.constexpr,
    TRIES_PER_TARGET: tl.constexpr,
    BLOCK: tl.constexpr,
):
    image, batch = tl.program_id(0), tl.num_programs(0)
    place = first + image
    patch = tl.arange(0, BLOCK)
    patch_row, patch_column = patch // width, patch % width
    in_grid = patch < height * width
    target_rows, target_columns = height - target_h + 1 - skip_last, width - target_w + 1 - skip_last
    context_rows, context_columns = height - context_h + 1 - skip_last, width - context_w + 1 - skip_last

    for m in range(targets):
        row, column = _corner(seed, step, place, TARGET + m, target_rows, target_columns)
        begin = (tl.cast(m, tl.int64) * batch + image) * target_h * target_w
        number = (row + patch // target_w) * width + column + patch % target_w
        tl.store(target_ptr + begin + patch, number, mask=patch < target_h * target_w)

    for c in range(contexts):
        kept, count, tries = tl.zeros((BLOCK,), tl.int32), -1, 0
        while count <= min_keep:
            row, column = _corner(seed, step, place, CONTEXT + (c << 16) + tries, context_rows, context_columns)
            inside = in_grid & _covers(row, column, patch_row, patch_column, context_h, context_w)
            for m in range(targets - tries // TRIES_PER_TARGET):
                row, column = _corner(seed, step, place, TARGET + m, target_rows, target_columns)
                inside = inside & (_covers(row, column, patch_row, patch_column, target_h, target_w) == 0)
            kept = inside.to(tl.int32)
            count = tl.sum(kept)
            tries += 1
        begin = (tl.cast(c, tl.int64) * batch + image) * height * width
        tl.store(context_ptr + begin + patch, kept.to(tl.uint8), mask=in_grid)


@triton.jit(do_not_specialize=[*_KEY, "draw", "patches"])
def _random_subset_kernel(
    subset_ptr,  # (B, N) uint8, 0 or 1
    kept_ptr,  # (B, N) uint8, 0 or 1
    count_ptr,  # (B,) int32
    seed,
    step,
    first,
    draw,
    patches,
    SUBSET: tl.constexpr,
    BLOCK: tl.constexpr,
    BITS: tl.constexpr,  # of a key: 32 + log2(BLOCK)
):
    image = tl.program_id(0)
    patch = tl.arange(0, BLOCK)
    in_grid = patch < patches
    offsets = tl.cast(image, tl.int64) * patches + patch
    kept = tl.load(kept_ptr + offsets, mask=in_grid, other=0) != 0
    count = tl.load(count_ptr + image)

    w0, w1, w2, w3 = tl.philox(seed, SUBSET + (draw << 16) + patch // 4, first + image, 0, step)
    word = tl.where(patch % 4 < 2, tl.where(patch % 4 == 0, w0, w1), tl.where(patch % 4 == 2, w2, w3))
    key = word.to(tl.int64) * BLOCK + patch

    # The largest number that fewer than `count` keys lie below is the count-th smallest key.
    highest = tl.full((1,), 0, tl.int64)
    bit = tl.full((1,), 1 << (BITS - 1), tl.int64)
    for _ in range(BITS):
        below = tl.sum((kept & (key < highest + bit)).to(tl.int32))
        highest = tl.where(below < count, highest + bit, highest)
        bit = bit >> 1
    subset = kept & (key <= highest) & (count > 0)
    tl.store(subset_ptr + offsets, subset.to(tl.uint8), mask=in_grid)


def _key(seed: int, step: int, first: int) -> tuple[int, int, int]:
    """Step and place as signed 32-bit numbers of the same bits."""
    return seed, *((number + 2**31) % 2**32 - 2**31 for number in (step, first))


def sample_blocks_(context, target, seed, step, first, grid, target_size, context_size, min_keep, skip_last):
    """Fill context (C, B, N) bool and target (M, B, K) int32; see ops.sample_blocks."""
    contexts, batch, patches = context.shape
    block, warps = _launch_sizes(patches)
    _sample_blocks_kernel[(batch,)](
        context.view(torch.uint8),
        target,
        *_key(seed, step, first),
        *grid,
        target.shape[0],
        *target_size,
        contexts,
        *context_size,
        min_keep,
        int(skip_last),
        TARGET,
        CONTEXT,
        TRIES_PER_TARGET,
        block,
        num_warps=warps,
    )


def random_subset_(subset, kept, count, seed, step, first, draw):
    """Fill subset (B, N) bool; see ops.random_subset."""
    batch, patches = kept.shape
    block, warps = _launch_sizes(patches)
    _random_subset_kernel[(batch,)](
        subset.view(torch.uint8),
        kept.view(torch.uint8),
        count,
        *_key(seed, step, first),
        draw,
        patches,
        SUBSET,
        block,
        31 + block.bit_length(),
        num_warps=warps,
    )


def aot_cases(capability: int = 9) -> list[Case]:
    """The 14x14 and 16x16 grids, which share a kernel, and 28x28."""
    purposes = {"TARGET": TARGET, "CONTEXT": CONTEXT, "TRIES_PER_TARGET": TRIES_PER_TARGET}
    types = {"context_ptr": "*u8", "target_ptr": "*i32", "subset_ptr": "*u8", "kept_ptr": "*u8", "count_ptr": "*i32"}
    types["seed"] = "i64"
    cases = []
    for patches in (14 * 14, 28 * 28):
        block, warps = _launch_sizes(patches)
        blocks = {**purposes, "BLOCK": block}
        subset = {"SUBSET": SUBSET, "BLOCK": block, "BITS": 31 + block.bit_length()}
        cases.append(Case(f"sample_blocks N<={block}", _sample_blocks_kernel, blocks, warps, types=types))
        cases.append(Case(f"random_subset N<={block}", _random_subset_kernel, subset, warps, types=types))
    return cases
