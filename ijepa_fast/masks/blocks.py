"""Masks of methods that hide patches of an image and predict what they were: index tensors, on the host.

Shapes: B images of N patches, n = 1 + N tokens with a class token; R masked patches in all, K in an image at most.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from ijepa_fast.masks.draw import Draw, chances, generators, int32

ASPECT = (0.3, 1 / 0.3)  # of a block, height over width


@dataclass(frozen=True)
class MaskedRows:
    """Where the masked patches lie among the tokens of B sequences of n; int32 where not said otherwise."""

    index: torch.Tensor  # (R,) token rows
    lengths: torch.Tensor  # (B,) int64, of each sequence
    padded: torch.Tensor  # (B*K,) token rows: K of each sequence, its class token behind those it has
    places: torch.Tensor  # (B*K,) int64, the same as token numbers within the sequence
    kept: torch.Tensor | None  # (R,) int64, which of the padded rows are masked patches; None: all


@dataclass(frozen=True)
class PatchDraw(Draw):
    """A batch's masked patches; fields of MaskedRows, and what else a step draws."""

    patches: int  # N
    mask: torch.Tensor  # (B*N,) bool
    patch_index: torch.Tensor  # (R,) int32 flat patch rows of the masked ones, image-major
    index: torch.Tensor
    lengths: torch.Tensor
    padded: torch.Tensor
    places: torch.Tensor
    kept: torch.Tensor | None = None
    chance: torch.Tensor | None = None  # (depth, 2, B) fp32 in 0..1: decides which branches are dropped
    passes: int = 1  # of whole images through a network

    @property
    def rows(self) -> MaskedRows:
        """The rows of the masked patches."""
        return MaskedRows(self.index, self.lengths, self.padded, self.places, self.kept)

    @property
    def union_lengths(self) -> torch.Tensor:
        """(B,) masked patches of each image; as in a MaskDraw, where they are targets."""
        return self.lengths

    @property
    def union_places(self) -> torch.Tensor:
        """(R,) int32 places of the masked patches."""
        return self.patch_index % self.patches

    @property
    def tokens(self) -> int:
        """Tokens that pass through a network."""
        return self.passes * self.images * (1 + self.patches)


def lay_out(mask: np.ndarray, chance: np.ndarray | None = None, passes: int = 1) -> PatchDraw:
    """The batch whose images are masked by `mask` (B, N) bool; other arguments as in PatchDraw."""
    images, patches = mask.shape
    image, place = np.nonzero(mask)
    lengths = mask.sum(1)
    longest = int(lengths.max(initial=0))
    column = np.arange(len(image)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    places = np.zeros((images, longest), dtype=np.int64)
    places[image, column] = 1 + place
    padded = places + np.arange(images)[:, None] * (1 + patches)
    kept = None if (lengths == longest).all() else torch.from_numpy(image * longest + column)
    return PatchDraw(
        images=images,
        patches=patches,
        mask=torch.from_numpy(mask.reshape(-1)),
        patch_index=int32(image * patches + place),
        index=int32(image * (1 + patches) + 1 + place),
        lengths=torch.from_numpy(lengths.astype(np.int64)),
        padded=int32(padded.reshape(-1)),
        places=torch.from_numpy(places.reshape(-1)),
        kept=kept,
        chance=None if chance is None else torch.from_numpy(chance),
        passes=passes,
    )


@dataclass(frozen=True)
class PatchSampler:
    """Draws masks and dropped branches, of each image by (seed, step, its place).

    mask: from a generator to (N,) bool. depth: blocks of the encoder. passes: see PatchDraw.
    """

    mask: Callable[[np.random.Generator], np.ndarray]
    depth: int
    passes: int = 1

    def __call__(self, images: int, seed: int, step: int, first: int = 0) -> PatchDraw:
        """The images that have the places `first` to `first + images` among all of the step."""
        own = generators(images, seed, step, first)
        masks = np.stack([self.mask(rng) for rng in own])
        return lay_out(masks, chances(own, self.depth), self.passes)


def squares(rng: np.random.Generator, grid: tuple[int, int], square: int, share: float) -> np.ndarray:
    """A mask (N,) bool of `grid` of squares of `square` x `square` patches, a `share` of them rounded up (SimMIM)."""
    rows, columns = grid[0] // square, grid[1] // square
    coarse = np.zeros(rows * columns, dtype=bool)
    coarse[rng.permutation(len(coarse))[: math.ceil(len(coarse) * share)]] = True
    return coarse.reshape(rows, columns).repeat(square, 0).repeat(square, 1).reshape(-1)


def blocks(
    rng: np.random.Generator, grid: tuple[int, int], count: int, smallest: int, largest: int | None = None
) -> np.ndarray:
    """A mask (N,) bool of `grid` of `count` patches in blocks of `smallest` to `largest` of them (BEiT, algorithm 1).

    The published code gives up where no block fits the rest, and leaves an image with fewer masked patches; here the
    rest is made up of single ones, so that all images have as many and a step is the same on any number of ranks.
    """
    mask = np.zeros(grid, dtype=bool)
    left = count - fill(rng, mask, count, lambda left: (smallest, min(left, largest or left)))
    flat = mask.reshape(-1)
    flat[rng.permutation(np.flatnonzero(~flat))[:left]] = True
    return flat


def fill(
    rng: np.random.Generator, mask: np.ndarray, left: int, areas: Callable[[int], tuple[float, float]], tries: int = 10
) -> int:
    """Mask blocks of `mask` (rows, columns) until `left` more patches are masked or `tries` in a row do not fit.

    areas: the range of a block's area, from the patches that are still to be masked. Returns how many were masked.
    """
    (rows, columns), wanted, failures = mask.shape, left, 0
    while left > 0 and failures < tries:
        low, high = areas(left)
        area = low + (high - low) * rng.random()
        aspect = math.exp(rng.uniform(math.log(ASPECT[0]), math.log(ASPECT[1])))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        failures += 1
        if not (0 < height < rows and 0 < width < columns):
            continue
        top, first = rng.integers(rows - height + 1), rng.integers(columns - width + 1)
        block = mask[top : top + height, first : first + width]
        added = block.size - int(np.count_nonzero(block))
        if 0 < added <= left:
            block[:] = True
            left -= added
            failures = 0
    return wanted - left
