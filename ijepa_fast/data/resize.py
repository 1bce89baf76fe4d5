"""Antialiased resizing of decoded images on the CPU, as arrays."""

from __future__ import annotations

import numpy as np
import torch

from ijepa_fast.kernels.resize import resize_ as resize_tensors_


def resize_(out: np.ndarray, images: list[np.ndarray], interpolation: str) -> None:
    """Resize `images`, (height, width, C) each, to those of `out`, (n, H, W, C) of their depth, on the calling thread.

    interpolation: bilinear | bicubic, as for `ijepa_fast.kernels.resize.resize_`.
    """
    resize_tensors_(torch.from_numpy(out), [torch.from_numpy(image) for image in images], interpolation)
