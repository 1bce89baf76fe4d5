"""What a model makes of the pixels of its images before anything else: a stretch, mean and std, patches."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ijepa_fast.data import DEPTHS, IMAGENET_MEAN, IMAGENET_STD
from ijepa_fast.kernels.patchify import patchify


@dataclass(frozen=True)
class Pixels:
    """What a model makes of the pixels of its images before anything else.

    mean, std: of each channel; in units of the depth's range, of stretched values where there is a
    stretch. stretch, with low and high of each channel in the same units: percentile: (x - low) / (high - low), cut
    off at 0 and 1; asinh: asinh((x - low) / (high - low)). names: of the channels, () where they have none.
    """

    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    stretch: str = "none"
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    names: tuple[str, ...] = ()

    @property
    def channels(self) -> int:
        """Of an image."""
        return len(self.mean)

    def stretched(self, images: torch.Tensor) -> torch.Tensor:
        """`images` (B, H, W, C) as they are; where there is a stretch, fp32 and stretched."""
        if self.stretch == "none":
            return images
        unit = DEPTHS[str(images.dtype).removeprefix("torch.")]
        low, high = (torch.tensor(ends, device=images.device) for ends in (self.low, self.high))
        values = (images.float() / unit - low) / (high - low)
        return values.clamp_(0, 1) if self.stretch == "percentile" else values.asinh_()

    def patches(self, images: torch.Tensor, patch: int, dtype: torch.dtype) -> torch.Tensor:
        """`images` (B, H, W, C) uint8, uint16 or float32 -> normalised patches (B*N, W) of `dtype`."""
        return patchify(self.stretched(images).contiguous(), patch, self.mean, self.std, dtype=dtype)
