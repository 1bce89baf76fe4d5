"""Random resized crops: a window is a function of the seed, the position in the sample stream and the image size.

The random numbers come from a counter, not from a generator with a state. So a resumed run draws the same windows as an
unbroken one, and so does a run on another number of ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ijepa_fast.data import Size

TRIES = 10  # as torchvision's RandomResizedCrop, which the published recipe uses


@dataclass(frozen=True)
class View:
    """How one view is made.

    crop: its side, or its height and width, pixels. scale: lowest and highest share of the image's area. blur,
    solarise, jitter, grey: the chances of blur, of solarisation, of colour jitter and of grey. sigma: range of the
    blur's standard deviation, pixels of the view. strengths: the jitter's largest changes of brightness, contrast and
    saturation, as shares, and of the hue, in turns. like: the number of the view whose window, mirroring and colours it
    has; None: its own.
    """

    crop: int | Size
    scale: tuple[float, float]
    blur: float = 0.0
    solarise: float = 0.0
    sigma: tuple[float, float] = (0.1, 2.0)
    jitter: float = 0.8
    strengths: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
    grey: float = 0.2
    like: int | None = None


_WINDOWS = 0  # the stream of random numbers of windows, see counter_bits
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: np.ndarray) -> np.ndarray:
    """Mix the bits of uint64 numbers, one to one: the finaliser of splitmix64 (Steele et al., 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def counter_bits(seed: int, positions: np.ndarray, draws: int, stream: int = 0) -> np.ndarray:
    """Random bits: uint64 (B, draws), independent for every seed, stream, position and draw.

    positions: (B,) integers >= 0. stream: separates the uses of one seed.
    """
    with np.errstate(over="ignore"):
        key = _mix(np.array([seed % 2**64], np.uint64) + _GOLDEN * np.uint64(stream + 1))
        rows = _mix(key + _GOLDEN * (np.asarray(positions).astype(np.uint64) + np.uint64(1)))
        return _mix(rows[:, None] + _GOLDEN * np.arange(1, draws + 1, dtype=np.uint64))


def counter_uniform(seed: int, positions: np.ndarray, draws: int, stream: int = 0) -> np.ndarray:
    """Uniform random numbers: float64 (B, draws) in [0, 1), made from `counter_bits` with the same arguments."""
    return (counter_bits(seed, positions, draws, stream) >> np.uint64(11)) * 2.0**-53


def crop_keys(positions: np.ndarray, ids: np.ndarray, count: int, per_image: int) -> np.ndarray:
    """What the crop of each sample follows from, with the seed: (B,), for the `positions` (B,) of the stream.

    That is its position; or where there are so many crops `per_image`, taken in turn by epoch, the number of the crop
    among those of all `count` samples, of which these are `ids` (B,).
    """
    return ids * per_image + positions // count % per_image if per_image else positions


def drawn_crops(
    seed: int, positions: np.ndarray, sizes: np.ndarray, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[np.ndarray, np.ndarray]:
    """The windows of samples by `positions` (B,) of the stream, or `crop_keys`, as `random_resized_crop` gives them,
    and whether each is mirrored where half of them are: bool (B,).
    """
    uniform = counter_uniform(seed, positions, 2 * TRIES + 3, _WINDOWS)
    return random_resized_crop(sizes, uniform[:, :-1], scale, ratio), uniform[:, -1] < 0.5


def random_resized_crop(
    sizes: np.ndarray, uniform: np.ndarray, scale: tuple[float, float], ratio: tuple[float, float]
) -> np.ndarray:
    """The windows that torchvision's RandomResizedCrop would draw from these random numbers.

    Each of ten tries draws a share of the image's area, uniform in `scale`, and an aspect ratio, log-uniform in
    `ratio`. The first window that fits is taken; if none does, the largest central window whose aspect ratio is within
    `ratio`.

    sizes: (B, 2) integers, height and width in pixels. uniform: (B, 2 * TRIES + 2) in [0, 1). scale: lowest and highest
    share of the area. ratio: lowest and highest width over height. Returns int32 (B, 4): x, y, width, height in pixels.
    """
    height, width = sizes[:, 0].astype(np.int64), sizes[:, 1].astype(np.int64)
    area = (height * width)[:, None] * (scale[0] + (scale[1] - scale[0]) * uniform[:, :TRIES])
    log_ratio = np.log(ratio)
    aspect = np.exp(log_ratio[0] + (log_ratio[1] - log_ratio[0]) * uniform[:, TRIES : 2 * TRIES])
    w = np.rint(np.sqrt(area * aspect)).astype(np.int64)
    h = np.rint(np.sqrt(area / aspect)).astype(np.int64)
    fits = (w > 0) & (h > 0) & (w <= width[:, None]) & (h <= height[:, None])
    first = fits.argmax(1)
    rows = np.arange(len(sizes))
    w, h = w[rows, first], h[rows, first]
    x = (uniform[:, -2] * (width - w + 1)).astype(np.int64)
    y = (uniform[:, -1] * (height - h + 1)).astype(np.int64)

    # No try fits: the central window.
    fallback = ~fits.any(1)
    narrow, wide = width < ratio[0] * height, width > ratio[1] * height
    central_w = np.where(wide, np.rint(height * ratio[1]).astype(np.int64), width)
    central_h = np.where(narrow, np.rint(width / ratio[0]).astype(np.int64), height)
    w, h = np.where(fallback, central_w, w), np.where(fallback, central_h, h)
    x, y = np.where(fallback, (width - w) // 2, x), np.where(fallback, (height - h) // 2, y)
    return np.stack([x, y, w, h], axis=1).astype(np.int32)
