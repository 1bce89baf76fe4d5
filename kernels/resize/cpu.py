"""The registered op by PyTorch's interpolation, where csrc has no loops for the processor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F


def resize_cpu_(images: Sequence[torch.Tensor], bicubic: bool, out: torch.Tensor) -> None:
    """Fill `out` (n, H, W, C) with `images` (height, width, C) of its dtype."""
    for target, image in zip(out.numpy(), images, strict=True):
        rgb = image.dtype == torch.uint8 and image.shape[2] == 3
        # Laid out as channels-last in PyTorch's eyes, so that the result is, and is copied as it lies.
        planes = (image if rgb else image.float()).unsqueeze(0).permute(0, 3, 1, 2)
        planes = F.interpolate(planes, target.shape[:2], mode="bicubic" if bicubic else "bilinear", antialias=True)
        if not rgb and image.dtype != torch.float32:
            planes = planes.round_().clamp_(0, torch.iinfo(image.dtype).max)
        target[:] = planes[0].permute(1, 2, 0).numpy()  # PyTorch's copy would start a thread pool in each thread
