"""Antialiased resizing of decoded images on the CPU: csrc's, four times as fast as PyTorch's, or else PyTorch's."""

from __future__ import annotations

import functools

import numpy as np
import torch
import torch.nn.functional as F

from ijepa_fast.kernels.common import native
from ijepa_fast.kernels.common.library import NAMESPACE

_resize = native.define("resize_cpu_(Tensor[] images, bool bicubic, Tensor(a!) out) -> ()")


def resize_(out: np.ndarray, images: list[np.ndarray], interpolation: str) -> None:
    """Resize `images`, uint8 (height, width, 3) each, to those of `out`, uint8 (n, H, W, 3), on the calling thread.

    interpolation: bilinear | bicubic. As Pillow's: the filter widens where an image shrinks.
    """
    if _has_csrc():
        _resize([torch.from_numpy(image) for image in images], interpolation == "bicubic", torch.from_numpy(out))
        return
    for row, image in enumerate(images):
        # Laid out as channels-last in PyTorch's eyes, so that the result is, and is copied as it lies.
        planes = torch.from_numpy(image).unsqueeze(0).permute(0, 3, 1, 2)
        planes = F.interpolate(planes, out.shape[1:3], mode=interpolation, antialias=True)
        out[row] = planes[0].permute(1, 2, 0).numpy()  # PyTorch's copy would start a thread pool in each thread


@functools.cache
def _has_csrc() -> bool:
    return native.available() and torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::resize_cpu_", "CPU")
