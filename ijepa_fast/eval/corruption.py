"""Images made worse in three ways at five levels, and how far a head's confidence is from its accuracy.

Levels are those of ImageNet-C (Hendrycks & Dietterich 2019, gaussian_noise, gaussian_blur and jpeg_compression), whose
images have 224 pixels: a blur is as wide in proportion to the image.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

LEVELS = {
    "noise": (0.08, 0.12, 0.18, 0.26, 0.38),  # standard deviation, share of the pixels' range
    "blur": (1.0, 2.0, 3.0, 4.0, 6.0),  # standard deviation, pixels of 224
    "jpeg": (25, 18, 15, 10, 7),  # quality
}
BINS = 15  # of confidence
_RANGES = {torch.uint8: 255.0, torch.uint16: 65535.0}


def kinds_for(depth: str, channels: int) -> list[str]:
    """The kinds of LEVELS that images of this depth and these channels can have: JPEG holds 8 bits, grey or RGB."""
    return [kind for kind in LEVELS if kind != "jpeg" or (depth == "uint8" and channels in (1, 3))]


def corrupt(images: torch.Tensor, kind: str, level: int, rows: Iterable[int]) -> torch.Tensor:
    """Images (b, H, W, C) of any depth at `level`, 1 to 5, of a kind of LEVELS: of their shape, dtype and device.

    rows: number of each image, which the noise is drawn by. The range of floats is that of each image.
    """
    strength = LEVELS[kind][level - 1]
    if kind == "jpeg":
        pixels = [_jpeg(image, int(strength)) for image in images.cpu().numpy()]
        return torch.from_numpy(np.stack(pixels)).to(images.device)
    x = images.float()
    bound = _RANGES.get(images.dtype)
    if kind == "blur":
        x = _blur(x, strength * min(images.shape[1:3]) / 224)
    else:
        drawn = [torch.randn(x.shape[1:], generator=torch.Generator().manual_seed(row * 8 + level)) for row in rows]
        extent = bound or x.amax((1, 2, 3), keepdim=True) - x.amin((1, 2, 3), keepdim=True)
        x = x + strength * extent * torch.stack(drawn).to(x.device)
    return x if bound is None else x.round().clamp(0, bound).to(images.dtype)


def _jpeg(image: np.ndarray, quality: int) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(file, "JPEG", quality=quality)
    with Image.open(file) as decoded:
        return np.array(decoded).reshape(image.shape)


def _blur(images: torch.Tensor, sigma: float) -> torch.Tensor:
    """Convolve (b, H, W, C) with a Gaussian of `sigma` pixels, cut at four of them; borders are repeated."""
    radius = math.ceil(4 * sigma)
    at = torch.arange(-radius, radius + 1, device=images.device, dtype=images.dtype)
    weights = torch.exp(-0.5 * (at / sigma).square())
    weights = (weights / weights.sum()).view(1, 1, -1)
    b, height, width, channels = images.shape
    x = images.permute(0, 3, 1, 2).reshape(b * channels * height, 1, width)
    x = F.conv1d(F.pad(x, (radius, radius), mode="replicate"), weights)
    x = x.view(b * channels, height, width).transpose(1, 2).reshape(b * channels * width, 1, height)
    x = F.conv1d(F.pad(x, (radius, radius), mode="replicate"), weights)
    return x.view(b, channels, width, height).permute(0, 3, 2, 1)


def calibration_terms(scores: torch.Tensor, right: torch.Tensor, bins: int = BINS) -> np.ndarray:
    """Terms fp64 (n,) whose mean is the expected calibration error (Guo et al. 2017) of logits (n, C).

    right (n,): whether the answer, of the largest logit, is right. Images are put into `bins` of equal width by their
    confidence, the largest probability; the error is the mean over images of |accuracy - confidence| of their bin. A
    term is an image's confidence less whether it is right, with the sign that its bin has.
    """
    confidence = scores.double().softmax(1).amax(1).cpu()
    gap = confidence - right.double().cpu()
    which = (confidence * bins).ceil().long().clamp(1, bins) - 1
    sums = torch.zeros(bins, dtype=torch.float64).index_add_(0, which, gap)
    return (gap * sums.sign()[which]).numpy()
