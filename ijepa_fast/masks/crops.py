"""What a step on large and small crops draws beside its views: masks and what follows from them, as index tensors.

Shapes: B images, L small crops per image, N and n patches of a large and a small crop, R masked patches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from ijepa_fast.data import Size, crop_of
from ijepa_fast.data.crops import View
from ijepa_fast.masks.blocks import fill
from ijepa_fast.masks.draw import Draw, chances, generators, int32
from ijepa_fast.masks.packing import cu_seqlens

LARGE = 2  # large crops per image
PUBLISHED, SMALL_SIDE = 224, 96  # pixels of a side of a large and a small crop, as published
Grid = tuple[int, int]  # rows and columns of patches


@dataclass(frozen=True)
class CropDraw(Draw):
    """One batch's masks as index tensors (int32 where not said otherwise), and the settings of its step.

    Tokens of the student are ordered (crop, image, token), large crops first, a class token before the patches.
    """

    small: int  # L
    grid: Grid  # of a large crop
    small_grid: Grid
    temperature: float  # of the teacher
    frozen: bool  # the prototypes do not learn yet
    mask: torch.Tensor  # (2*B*N,) bool
    cu_seqlens: torch.Tensor  # ((2 + L)*B + 1,)
    max_seqlen: int
    used: torch.Tensor  # (U,) rows whose output is wanted: class tokens and masked patches
    used_cu_seqlens: torch.Tensor  # ((2 + L)*B + 1,)
    used_max_seqlen: int
    class_rows: torch.Tensor  # ((2 + L)*B,) of `used`
    patch_rows: torch.Tensor  # (R,) of `used`
    teacher_rows: torch.Tensor  # (R,) of the tokens of the large crops
    patch_weight: torch.Tensor  # (R,) fp32, 1 / (masked patches of the crop * crops)
    chance: torch.Tensor | None = None  # (depth, 2, (2 + L)*B) fp32 in 0..1: decides which branches are dropped

    @property
    def tokens(self) -> int:
        """Tokens that pass through a network: student and teacher."""
        large = LARGE * self.images * (1 + self.patches)
        return 2 * large + self.small * self.images * (1 + self.small_patches)

    @property
    def patches(self) -> int:
        """N."""
        return math.prod(self.grid)

    @property
    def small_patches(self) -> int:
        """n."""
        return math.prod(self.small_grid)


def lay_out(
    mask: np.ndarray,
    grid: Grid,
    small: int,
    small_grid: Grid,
    temperature: float,
    frozen: bool = False,
    chance: np.ndarray | None = None,
) -> CropDraw:
    """The batch whose large crops are masked by `mask` (2, B, N) bool; other arguments as in CropDraw."""
    _, images, patches = mask.shape
    crops = LARGE * images
    lengths = np.repeat([1 + patches, 1 + math.prod(small_grid)], [crops, small * images])
    starts = np.cumsum(lengths) - lengths
    counts = np.count_nonzero(mask.reshape(crops, patches), axis=1)
    wanted = np.zeros(lengths.sum(), dtype=bool)
    wanted[starts] = True
    wanted[: crops * (1 + patches)].reshape(crops, 1 + patches)[:, 1:] = mask.reshape(crops, patches)
    used = np.flatnonzero(wanted)
    used_lengths = np.concatenate([1 + counts, np.ones(small * images, dtype=np.int64)])
    patch_rows = np.flatnonzero(~np.isin(used, starts, assume_unique=True))
    return CropDraw(
        images=images,
        small=small,
        grid=grid,
        small_grid=small_grid,
        temperature=temperature,
        frozen=frozen,
        mask=torch.from_numpy(mask.reshape(-1)),
        cu_seqlens=cu_seqlens(lengths),
        max_seqlen=int(lengths.max()),
        used=int32(used),
        used_cu_seqlens=cu_seqlens(used_lengths),
        used_max_seqlen=int(used_lengths.max()),
        class_rows=int32(np.cumsum(used_lengths) - used_lengths),
        patch_rows=int32(patch_rows),
        teacher_rows=int32(used[patch_rows]),
        patch_weight=torch.from_numpy(np.repeat(1 / (np.maximum(counts, 1) * crops), counts).astype(np.float32)),
        chance=None if chance is None else torch.from_numpy(chance),
    )


@dataclass(frozen=True)
class CropSampler:
    """Draws masks and dropped branches, of each image by (seed, step, its place), and the step's settings.

    grid: of a large crop; a small one's is `smaller` than it. small: small crops per image. depth: blocks.
    warmup_steps: over which the teacher's temperature rises, from the first to the second of `temperatures`.
    frozen_steps: in which the prototypes do not learn. masked: whether patches of large crops are masked.
    """

    grid: Grid
    small: int
    depth: int
    temperatures: tuple[float, float]
    warmup_steps: int = 0
    frozen_steps: int = 0
    masked: bool = True

    def __call__(self, images: int, seed: int, step: int, first: int = 0) -> CropDraw:
        """The images that have the places `first` to `first + images` among all of the step."""
        mask = np.zeros((LARGE, images, math.prod(self.grid)), dtype=bool)
        own = generators(images, seed, step, first)
        if self.masked:
            for image, rng in enumerate(own):
                mask[:, image] = draw_masks(rng, LARGE, self.grid)
        by_sequence = chances(own, self.depth, LARGE + self.small)
        temperature = teacher_temperature(step, self.warmup_steps, self.temperatures)
        frozen = step < self.frozen_steps
        return lay_out(mask, self.grid, self.small, smaller(self.grid), temperature, frozen, by_sequence)


def teacher_temperature(step: int, warmup: int, temperatures: tuple[float, float]) -> float:
    """The teacher's temperature in `step`: from the first to the second of `temperatures`, reached after `warmup`."""
    progress = min(1.0, step / warmup) if warmup else 1.0
    return temperatures[0] + progress * (temperatures[1] - temperatures[0])


def smaller(grid: Grid) -> Grid:
    """The grid of a small crop beside a large one of `grid`: each side as 96 pixels are beside 224."""
    rows, columns = (max(1, round(side * SMALL_SIDE / PUBLISHED)) for side in grid)
    return rows, columns


def crops_of(
    large: Sequence[View],
    small: View,
    size: Size,
    patch: int,
    scale: tuple[float, float],
    count: int,
    published: int = PUBLISHED,
) -> list[View]:
    """The views `large`, and `count` times `small`, of a run whose crops are of `size` and `scale`.

    Small ones have what is below `scale`, down to where theirs begins. All are blurred by the same share of a crop's
    mean side as published, where it is of `published` pixels.
    """
    low, high = (sigma * math.sqrt(math.prod(size)) / published for sigma in large[0].sigma)
    rows, columns = smaller((size[0] // patch, size[1] // patch))
    share = (min(small.scale[0], scale[0]), scale[0])
    views = [replace(view, crop=crop_of(size), scale=scale, sigma=(low, high)) for view in large]
    return (
        views + [replace(small, crop=crop_of((rows * patch, columns * patch)), scale=share, sigma=(low, high))] * count
    )


def draw_masks(rng: np.random.Generator, crops: int, grid: Grid) -> np.ndarray:
    """Block masks of `crops` large crops of `grid` -> (crops, N) bool.

    A crop is masked by nothing or, as often, by a share of .3 +- .2 of its patches, in blocks (iBOT, section 3.4; the
    blocks are BEiT's, algorithm 1).
    """
    return np.stack([_block_mask(rng, grid) for _ in range(crops)]).reshape(crops, -1)


def _block_mask(rng: np.random.Generator, grid: Grid) -> np.ndarray:
    mask = np.zeros(grid, dtype=bool)
    left = round(rng.uniform(0.1, 0.5) * mask.size) if rng.random() < 0.5 else 0
    smallest = min((grid[0] // 3) * (grid[1] // 3), left)
    fill(rng, mask, left, lambda left: (min(smallest, left), left))
    return mask
