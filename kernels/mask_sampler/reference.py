"""The meaning of the mask sampler, in NumPy: rectangles at random corners and random subsets.

Every number is Philox4x32-10 of (seed; step, place of the image, purpose and index), turned into an integer below n by
a multiplication, so the C++ and the Triton sampler draw the same masks bit for bit, in any order and on any thread.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

Size = tuple[int, int]

# What a draw is for: the top byte of the counter's first word. The rest of that word is the index of the draw.
TARGET, CONTEXT, SUBSET, BATCH = (purpose << 24 for purpose in range(4))
# A context block that keeps too little is drawn again; after this many failures one target fewer is cut out of it.
TRIES_PER_TARGET = 20

_LOW = 2**32 - 1


@dataclass(frozen=True)
class Key:
    """What a batch's masks are a function of: the run's seed (63 bits), the step and the place of the batch's first
    image among all images of the step (32 bits each).
    """

    seed: int
    step: int
    first: int = 0


def words(key: Key, image: np.ndarray | int, draw: np.ndarray | int) -> np.ndarray:
    """The four random words of the batch's `image`, by its place, for the purpose and index `draw`; both broadcast.

    -> (4, ...) uint64, below 2**32.
    """
    draw, image = (x if isinstance(x, int) else np.asarray(x, np.uint64) for x in (draw, image))
    return philox(key.seed, (draw, key.first + image & _LOW, 0, key.step))


def philox(seed: int, counter: tuple[Any, Any, Any, Any]) -> np.ndarray:
    """Philox4x32-10 (Salmon et al., 2011) of a counter of four words; integers or uint64 arrays, which broadcast.

    -> (4, ...) uint64: four words below 2**32 a counter.
    """
    # Numbers stay Python's, which one counter by itself is several times faster in.
    words = counter
    k0, k1 = seed & _LOW, seed >> 32 & _LOW
    for _ in range(10):
        product0, product1 = words[0] * 0xD2511F53, words[2] * 0xCD9E8D57
        words = (product1 >> 32 ^ words[1] ^ k0, product1 & _LOW, product0 >> 32 ^ words[3] ^ k1, product0 & _LOW)
        k0, k1 = k0 + 0x9E3779B9 & _LOW, k1 + 0xBB67AE85 & _LOW
    return np.array(words, dtype=np.uint64)


def below(words: np.ndarray, n: int) -> np.ndarray:
    """32-bit words -> integers uniform in [0, n), int64 (biased by less than n / 2**32)."""
    return (words * np.uint64(n) >> np.uint64(32)).astype(np.int64)


def _rectangles(top: np.ndarray, left: np.ndarray, size: Size, grid: Size) -> np.ndarray:
    """Corners (...) -> which patches of the grid the block covers (..., H, W) bool."""
    row = np.arange(grid[0]) - top[..., None]
    column = np.arange(grid[1]) - left[..., None]
    return ((row >= 0) & (row < size[0]))[..., :, None] & ((column >= 0) & (column < size[1]))[..., None, :]


def sample_blocks(
    key: Key,
    batch: int,
    grid: Size,
    targets: int,
    target_size: Size,
    contexts: int,
    context_size: Size,
    min_keep: int,
    skip_last: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """Target blocks, and context blocks minus the union of the targets, for a batch of images (I-JEPA, section 3).

    All blocks of a kind have one size (height, width). A context keeps more than `min_keep` patches: until it does, its
    block is drawn again, and after every 20 failures one target fewer, from the last, is cut out of it. The block
    itself must hold more than `min_keep`. `skip_last` leaves out the last possible row and column of corners, as the
    published sampler does.

    -> context (C, B, N) bool: the patches kept; target (M, B, K) int32: patch numbers, row-major.
    """
    (height, width), (h, w) = grid, target_size
    image = np.arange(batch)
    drawn = words(key, image, TARGET + np.arange(targets)[:, None])
    top = below(drawn[0], height - h + 1 - skip_last)
    left = below(drawn[1], width - w + 1 - skip_last)
    offsets = (np.arange(h)[:, None] * width + np.arange(w)).ravel()
    target = ((top * width + left)[..., None] + offsets).astype(np.int32)
    covered = _rectangles(top, left, target_size, grid)
    union = covered.any(0)

    context = np.empty((contexts, batch, height * width), dtype=bool)
    for c in range(contexts):
        image, cut, tries = np.arange(batch), union, 0
        while image.size:
            drawn = words(key, image, CONTEXT + (c << 16) + tries)
            top = below(drawn[0], height - context_size[0] + 1 - skip_last)
            left = below(drawn[1], width - context_size[1] + 1 - skip_last)
            kept = (_rectangles(top, left, context_size, grid) & ~cut).reshape(image.size, -1)
            context[c, image] = kept
            image = image[np.count_nonzero(kept, axis=1) <= min_keep]
            tries += 1
            cut = covered[: targets - tries // TRIES_PER_TARGET, image].any(0)
    return context, target


def random_subset(key: Key, kept: np.ndarray, count: np.ndarray, draw: int = 0) -> np.ndarray:
    """`count` (B,) of the patches that are True in `kept` (B, N), all subsets equally likely. -> (B, N) bool.

    Patches are ranked by a 32-bit random word, ties by their number, and the lowest are taken. `draw` numbers the
    independent subsets of one batch.
    """
    batch, patches = kept.shape
    blocks = -(-patches // 4)
    drawn = words(key, np.arange(batch)[:, None], SUBSET + (draw << 16) + np.arange(blocks))
    drawn = np.moveaxis(drawn, 0, -1).reshape(batch, -1)[:, :patches]
    order = np.where(kept, drawn << np.uint64(32) | np.arange(patches, dtype=np.uint64), np.uint64(2**64 - 1))
    ranked = np.sort(order, axis=1)
    highest = np.where(count > 0, ranked[np.arange(batch), np.maximum(count, 1) - 1], 0)
    return kept & (order <= highest[:, None]) & (count > 0)[:, None]
