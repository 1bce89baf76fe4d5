"""What a step draws beside several equal views of its images: dropped branches, and directions; on the host."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ijepa_fast.masks.draw import Draw
from ijepa_fast.masks.packing import cu_seqlens

_DIRECTIONS = 1 << 40  # beside a seed and a step: no image has this place


@dataclass(frozen=True)
class ViewDraw(Draw):
    """V views of N patches; sequences are ordered (view, image), each a class token and its patches."""

    views: int  # V
    patches: int  # N
    cu_seqlens: torch.Tensor  # (V*B + 1,) int32
    directions: torch.Tensor  # (width, K) fp32, see `directions`
    chance: torch.Tensor  # (depth, 2, V*B) fp32 in 0..1: decides which branches are dropped

    @property
    def union_lengths(self) -> torch.Tensor:
        """(B,) one row of each image: what is watched is the class token of its first view."""
        return torch.ones_like(self.cu_seqlens[: self.images])

    @property
    def union_places(self) -> torch.Tensor:
        """(B,) the place of that row: the same in all images."""
        return torch.zeros_like(self.cu_seqlens[: self.images])

    @property
    def tokens(self) -> int:
        """Tokens that pass through the network."""
        return self.views * self.images * (1 + self.patches)


def directions(width: int, count: int, seed: int, step: int) -> torch.Tensor:
    """`count` random directions of length 1: (width, count) fp32, a function of (seed, step) alone."""
    drawn = np.random.default_rng([seed, step, _DIRECTIONS]).standard_normal((width, count), dtype=np.float32)
    return torch.from_numpy(drawn / np.linalg.norm(drawn, axis=0))


@dataclass(frozen=True)
class ViewSampler:
    """Draws for `views` views of `patches` patches, a network of `depth` blocks and `slices` directions of `width`."""

    views: int
    patches: int
    depth: int
    width: int
    slices: int

    def __call__(self, images: int, seed: int, step: int, first: int = 0) -> ViewDraw:
        """The images that have the places `first` to `first + images` among all of the step."""
        chance = np.empty((self.depth, 2, self.views, images), dtype=np.float32)
        for image in range(images):
            rng = np.random.default_rng([seed, step, first + image])
            chance[..., image] = rng.random(chance.shape[:-1], dtype=np.float32)
        sequences, length = self.views * images, 1 + self.patches
        return ViewDraw(
            images=images,
            views=self.views,
            patches=self.patches,
            cu_seqlens=cu_seqlens(np.full(sequences, length)),
            directions=directions(self.width, self.slices, seed, step),
            chance=torch.from_numpy(chance.reshape(self.depth, 2, -1)),
        )
