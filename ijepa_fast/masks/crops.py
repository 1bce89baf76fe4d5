"""What a step of iBOT draws beside its views: masks and all that follows from them, as index tensors, on the host.

Shapes: B images, L small crops per image, N and n patches of a large and a small crop, R masked patches.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ijepa_fast.masks.blocks import fill
from ijepa_fast.masks.draw import Draw
from ijepa_fast.masks.packing import cu_seqlens

LARGE = 2  # large crops per image
PUBLISHED = 224  # pixels of a large crop, beside which a small one has 96
SMALL_SIDE = 96


@dataclass(frozen=True)
class CropDraw(Draw):
    """One batch's masks as index tensors (int32 where not said otherwise), and the settings of its step.

    Tokens of the student are ordered (crop, image, token), large crops first, a class token before the patches.
    """

    small: int  # L
    side: int  # patches along a large crop
    small_side: int
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
        large = LARGE * self.images * (1 + self.side**2)
        return 2 * large + self.small * self.images * (1 + self.small_side**2)


def lay_out(
    mask: np.ndarray,
    small: int,
    small_side: int,
    temperature: float,
    frozen: bool = False,
    chance: np.ndarray | None = None,
) -> CropDraw:
    """The batch whose large crops are masked by `mask` (2, B, N) bool; other arguments as in CropDraw."""
    _, images, patches = mask.shape
    crops = LARGE * images
    lengths = np.repeat([1 + patches, 1 + small_side**2], [crops, small * images])
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
        side=round(patches**0.5),
        small_side=small_side,
        temperature=temperature,
        frozen=frozen,
        mask=torch.from_numpy(mask.reshape(-1)),
        cu_seqlens=cu_seqlens(lengths),
        max_seqlen=int(lengths.max()),
        used=_int32(used),
        used_cu_seqlens=cu_seqlens(used_lengths),
        used_max_seqlen=int(used_lengths.max()),
        class_rows=_int32(np.cumsum(used_lengths) - used_lengths),
        patch_rows=_int32(patch_rows),
        teacher_rows=_int32(used[patch_rows]),
        patch_weight=torch.from_numpy(np.repeat(1 / (np.maximum(counts, 1) * crops), counts).astype(np.float32)),
        chance=None if chance is None else torch.from_numpy(chance),
    )


def _int32(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.int32))


@dataclass(frozen=True)
class CropSampler:
    """Draws masks and dropped branches, of each image by (seed, step, its place), and the step's settings.

    side, small_side: patches along a large and a small crop. small: small crops per image. depth: blocks.
    warmup_steps: over which the teacher's temperature rises, from the first to the second of `temperatures`.
    frozen_steps: in which the prototypes do not learn. masked: whether patches of large crops are masked.
    """

    side: int
    small_side: int
    small: int
    depth: int
    temperatures: tuple[float, float]
    warmup_steps: int = 0
    frozen_steps: int = 0
    masked: bool = True

    def __call__(self, images: int, seed: int, step: int, first: int = 0) -> CropDraw:
        """The images that have the places `first` to `first + images` among all of the step."""
        mask = np.zeros((LARGE, images, self.side**2), dtype=bool)
        chance = np.empty((self.depth, 2, LARGE + self.small, images), dtype=np.float32)
        for image in range(images):
            rng = np.random.default_rng([seed, step, first + image])
            if self.masked:
                mask[:, image] = draw_masks(rng, LARGE, self.side)
            chance[..., image] = rng.random(chance.shape[:-1], dtype=np.float32)
        temperature = teacher_temperature(step, self.warmup_steps, self.temperatures)
        frozen, by_sequence = step < self.frozen_steps, chance.reshape(self.depth, 2, -1)
        return lay_out(mask, self.small, self.small_side, temperature, frozen, by_sequence)


def small_side(side: int) -> int:
    """Patches along a small crop beside a large one of `side`: as 96 pixels beside 224."""
    return max(1, round(side * SMALL_SIDE / PUBLISHED))


def teacher_temperature(step: int, warmup: int, temperatures: tuple[float, float]) -> float:
    """The teacher's temperature in `step`: from the first to the second of `temperatures`, reached after `warmup`."""
    progress = min(1.0, step / warmup) if warmup else 1.0
    return temperatures[0] + progress * (temperatures[1] - temperatures[0])


def draw_masks(rng: np.random.Generator, crops: int, side: int) -> np.ndarray:
    """Block masks of `crops` large crops of side x side patches -> (crops, N) bool.

    A crop is masked by nothing or, as often, by a share of .3 +- .2 of its patches, in blocks (iBOT, section 3.4; the
    blocks are BEiT's, algorithm 1).
    """
    return np.stack([_block_mask(rng, side) for _ in range(crops)]).reshape(crops, -1)


def _block_mask(rng: np.random.Generator, side: int) -> np.ndarray:
    mask = np.zeros((side, side), dtype=bool)
    left = round(rng.uniform(0.1, 0.5) * side**2) if rng.random() < 0.5 else 0
    smallest = min((side // 3) ** 2, left)
    fill(rng, mask, left, lambda left: (min(smallest, left), left))
    return mask
