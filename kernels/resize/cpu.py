"""The registered op by PyTorch's interpolation, where csrc has no loops for the processor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F


def resize_cpu_(images: Sequence[torch.Tensor], bicubic: bool, out: torch.Tensor) -> None:
    """Fill `out` (n, H, W, 3) with `images` (height, width, 3), all uint8."""
    for target, image in zip(out.numpy(), images, strict=True):
        # Laid out as channels-last in PyTorch's eyes, so that the result is, and is copied as it lies.
        planes = image.unsqueeze(0).permute(0, 3, 1, 2)
        planes = F.interpolate(planes, target.shape[:2], mode="bicubic" if bicubic else "bilinear", antialias=True)
        target[:] = planes[0].permute(1, 2, 0).numpy()  # PyTorch's copy would start a thread pool in each thread
