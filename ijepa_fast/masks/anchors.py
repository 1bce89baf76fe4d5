"""What a step of MSN draws beside its views: the patches that are kept, dropped branches; index tensors, on the host.

Shapes: B images; A large and L small anchors of each, of N and n patches; k patches kept of a large one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from ijepa_fast.masks.crops import Grid
from ijepa_fast.masks.draw import Draw, chances, generators
from ijepa_fast.masks.packing import cu_seqlens


@dataclass(frozen=True)
class AnchorDraw(Draw):
    """One batch. Anchors are ordered (view, image), large ones first, a class token before the patches."""

    large: int  # A
    small: int  # L
    grid: Grid  # of a large view
    small_grid: Grid
    kept: torch.Tensor  # (k,) int64 places of the patches that every large anchor keeps
    cu_seqlens: torch.Tensor  # ((A + L)*B + 1,) int32, of the anchors
    max_seqlen: int
    target_cu_seqlens: torch.Tensor  # (B + 1,) int32, of the target views
    chance: torch.Tensor | None = None  # (depth, 2, (A + L)*B) fp32 in 0..1: decides which branches are dropped

    @property
    def groups(self) -> list[int]:
        """Anchors of one size: the large, then the small ones."""
        return [count * self.images for count in (self.large, self.small) if count]

    @property
    def tokens(self) -> int:
        """Tokens that pass through a network: those of anchors and targets."""
        anchors = self.large * (1 + len(self.kept)) + self.small * (1 + math.prod(self.small_grid))
        return self.images * (anchors + 1 + math.prod(self.grid))


def lay_out(
    images: int,
    kept: np.ndarray,
    large: int,
    small: int,
    grid: Grid,
    small_grid: Grid,
    chance: np.ndarray | None = None,
) -> AnchorDraw:
    """The batch whose large anchors keep the places `kept` (k,); other arguments as in AnchorDraw."""
    lengths = np.repeat([1 + len(kept), 1 + math.prod(small_grid)], [large * images, small * images])
    return AnchorDraw(
        images=images,
        large=large,
        small=small,
        grid=grid,
        small_grid=small_grid,
        kept=torch.from_numpy(kept.astype(np.int64)),
        cu_seqlens=cu_seqlens(lengths),
        max_seqlen=int(lengths.max()),
        target_cu_seqlens=cu_seqlens(np.full(images, 1 + math.prod(grid))),
        chance=None if chance is None else torch.from_numpy(chance),
    )


@dataclass(frozen=True)
class AnchorSampler:
    """Draws the kept patches, once for all images of a step as published, and dropped branches by image.

    dropped: the share of patches that large anchors drop. depth: blocks; 0: no branch is dropped.
    """

    grid: Grid
    small_grid: Grid
    large: int
    small: int
    dropped: float
    depth: int = 0

    @property
    def keeps(self) -> int:
        """Patches that are kept of a large anchor."""
        return math.floor(math.prod(self.grid) * (1 - self.dropped))

    def __call__(self, images: int, seed: int, step: int, first: int = 0) -> AnchorDraw:
        """The images that have the places `first` to `first + images` among all of the step."""
        kept = np.sort(np.random.default_rng([seed, step]).permutation(math.prod(self.grid))[: self.keeps])
        by_sequence = None
        if self.depth:
            by_sequence = chances(generators(images, seed, step, first), self.depth, self.large + self.small)
        return lay_out(images, kept, self.large, self.small, self.grid, self.small_grid, by_sequence)
