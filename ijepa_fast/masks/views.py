"""What a step draws beside views of its images, all equal or some smaller: dropped branches, and directions."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from ijepa_fast.masks.crops import Grid
from ijepa_fast.masks.draw import Draw, chances, generators
from ijepa_fast.masks.packing import cu_seqlens

_DIRECTIONS = 1 << 40  # beside a seed and a step: no image has this place


@dataclass(frozen=True)
class ViewDraw(Draw):
    """V views of N patches, then L of n; sequences are ordered (view, image), each a class token and its patches."""

    views: int  # V
    small: int  # L
    grid: Grid  # of a view
    small_grid: Grid  # of a small one
    cu_seqlens: torch.Tensor  # ((V + L)*B + 1,) int32
    max_seqlen: int
    directions: torch.Tensor  # (width, K) fp32, see `directions`
    chance: torch.Tensor  # (depth, 2, (V + L)*B) fp32 in 0..1: decides which branches are dropped

    @property
    def union_lengths(self) -> torch.Tensor:
        """(B,) one row of each image: what is watched is the class token of its first view."""
        return torch.ones_like(self.cu_seqlens[: self.images])

    @property
    def union_places(self) -> torch.Tensor:
        """(B,) the place of that row: the same in all images."""
        return torch.zeros_like(self.cu_seqlens[: self.images])

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence, a class token among them."""
        large, small = (1 + math.prod(grid) for grid in (self.grid, self.small_grid))
        return [large] * self.views * self.images + [small] * self.small * self.images

    @property
    def tokens(self) -> int:
        """Tokens that pass through the network."""
        return sum(self.lengths)


def directions(width: int, count: int, seed: int, step: int) -> torch.Tensor:
    """`count` random directions of length 1: (width, count) fp32, a function of (seed, step) alone."""
    drawn = np.random.default_rng([seed, step, _DIRECTIONS]).standard_normal((width, count), dtype=np.float32)
    return torch.from_numpy(drawn / np.linalg.norm(drawn, axis=0))


@dataclass(frozen=True)
class ViewSampler:
    """Draws for `views` views of `grid` patches and `small` ones of `small_grid`.

    depth: blocks of the network. width, slices: of directions, and their number.
    """

    views: int
    small: int
    grid: Grid
    small_grid: Grid
    depth: int
    width: int
    slices: int

    def __call__(self, images: int, seed: int, step: int, first: int = 0) -> ViewDraw:
        """The images that have the places `first` to `first + images` among all of the step."""
        large, small = (1 + math.prod(grid) for grid in (self.grid, self.small_grid))
        by_sequence = chances(generators(images, seed, step, first), self.depth, self.views + self.small)
        return ViewDraw(
            images=images,
            views=self.views,
            small=self.small,
            grid=self.grid,
            small_grid=self.small_grid,
            cu_seqlens=cu_seqlens(np.repeat([large, small], [self.views * images, self.small * images])),
            max_seqlen=large,
            directions=directions(self.width, self.slices, seed, step),
            chance=torch.from_numpy(by_sequence),
        )
