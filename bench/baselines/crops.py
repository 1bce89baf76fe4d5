"""iBOT's crops and masks: drawn on the host as a function of (seed, step, rank), applied to images on their device.

Shapes: B images, V views an image (large crops first), N patches of a large crop, S side of a crop in pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

LARGE = 2  # large crops an image
LARGE_SCALE, SMALL_SCALE = (0.25, 1.0), (0.05, 0.25)  # share of the image's area
ASPECT = (3 / 4, 4 / 3)
LUMA = np.array([0.299, 0.587, 0.114])


@dataclass(frozen=True)
class Views:
    """How to make the views of a batch; all tensors (V, B, ...) fp32."""

    boxes: torch.Tensor  # (V, B, 4) left, top, width, height in 0..1; a negative width mirrors the view
    colours: torch.Tensor  # (V, B, 3, 4) linear map of RGB in 0..1, and an offset
    contrast: torch.Tensor  # (V, B) factor about the view's mean grey
    blur: torch.Tensor  # (V, B) standard deviation in pixels, 0: none
    solarise: torch.Tensor  # (V, B) 1 where values from 0.5 on are inverted

    def of(self, part: slice) -> Views:
        """The views `part` alone."""
        return Views(*(getattr(self, name)[part] for name in self.__dataclass_fields__))

    def map(self, change) -> Views:
        """`change` applied to every tensor."""
        return Views(*(change(getattr(self, name)) for name in self.__dataclass_fields__))


def draw_views(rng: np.random.Generator, images: int, small: int) -> Views:
    """Two large and `small` small views an image, with DINO's augmentations."""
    views = LARGE + small
    shape = (views, images)
    scale = np.array([LARGE_SCALE] * LARGE + [SMALL_SCALE] * small)
    area = rng.uniform(scale[:, :1], scale[:, 1:], shape)
    aspect = np.exp(rng.uniform(*np.log(ASPECT), shape))
    width, height = np.minimum(np.sqrt(area * aspect), 1), np.minimum(np.sqrt(area / aspect), 1)
    left, top = rng.uniform(size=shape) * (1 - width), rng.uniform(size=shape) * (1 - height)
    mirrored = rng.random(shape) < 0.5
    boxes = np.stack([np.where(mirrored, left + width, left), top, np.where(mirrored, -width, width), height], -1)

    jitter = (rng.random(shape) < 0.8)[..., None] * rng.uniform(-1, 1, (*shape, 4))
    brightness, contrast, saturation, hue = np.moveaxis(jitter * [0.4, 0.4, 0.2, 0.1], -1, 0)
    saturation = np.where(rng.random(shape) < 0.2, 0.0, 1 + saturation)
    matrix = (1 + brightness)[..., None, None] * (_saturate(saturation) @ _rotate_hue(hue))
    # Of the first large view all, of the second a tenth, of the small ones half are blurred; the second is solarised.
    blurred = np.array([1.0, 0.1] + [0.5] * small)[:, None]
    solarised = np.array([0.0, 0.2] + [0.0] * small)[:, None]
    sigma = np.where(rng.random(shape) < blurred, rng.uniform(0.1, 2.0, shape), 0.0)
    arrays = (
        boxes,
        np.concatenate([matrix, np.zeros((*shape, 3, 1))], -1),
        1 + contrast,
        sigma,
        rng.random(shape) < solarised,
    )
    return Views(*(torch.from_numpy(np.ascontiguousarray(a, dtype=np.float32)) for a in arrays))


def _saturate(factor: np.ndarray) -> np.ndarray:
    """(...) -> (..., 3, 3): mix of each colour with its grey."""
    return factor[..., None, None] * np.eye(3) + (1 - factor)[..., None, None] * LUMA


def _rotate_hue(turns: np.ndarray) -> np.ndarray:
    """(...) turns -> (..., 3, 3): rotation of the chroma plane of YIQ."""
    to_yiq = np.array([LUMA, [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
    cos, sin = np.cos(2 * math.pi * turns), np.sin(2 * math.pi * turns)
    zero, one = np.zeros_like(cos), np.ones_like(cos)
    rotation = np.stack([one, zero, zero, zero, cos, -sin, zero, sin, cos], -1).reshape(*turns.shape, 3, 3)
    return np.linalg.inv(to_yiq) @ rotation @ to_yiq


def render(images: torch.Tensor, views: Views, size: int) -> torch.Tensor:
    """`images` uint8 (B, H, W, 3), `views` (V, B) -> uint8 (V*B, size, size, 3), view-major."""
    count, batch = views.boxes.shape[:2]
    x = images.permute(0, 3, 1, 2).float() / 255
    centre = (torch.arange(size, device=x.device) + 0.5) / size
    left, top, width, height = views.boxes.unbind(-1)
    columns = (left[..., None] + width[..., None] * centre) * 2 - 1  # (V, B, size)
    rows = (top[..., None] + height[..., None] * centre) * 2 - 1
    shape = (count, batch, size, size)
    grid = torch.stack([columns[:, :, None].expand(shape), rows[..., None].expand(shape)], -1)
    grid = grid.transpose(0, 1).flatten(1, 2)  # (B, V*size, size, 2)
    x = F.grid_sample(x, grid, mode="bicubic", padding_mode="border", align_corners=False)
    x = x.unflatten(2, (count, size)).permute(2, 0, 1, 3, 4).flatten(0, 1).clamp(0, 1)  # (V*B, 3, size, size)
    x = torch.baddbmm(views.colours[..., 3:].flatten(0, 1), views.colours[..., :3].flatten(0, 1), x.flatten(2))
    x = x.view(-1, 3, size, size)
    luma = torch.tensor(LUMA, dtype=x.dtype, device=x.device)[:, None, None]
    grey = (x * luma).sum(1, keepdim=True).mean((2, 3), keepdim=True)
    x = torch.lerp(grey, x, views.contrast.view(-1, 1, 1, 1)).clamp(0, 1)
    x = _blur(x, views.blur.flatten())
    x = torch.where((views.solarise.view(-1, 1, 1, 1) > 0) & (x >= 0.5), 1 - x, x)
    return (x * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def _blur(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Separable Gaussian of `sigma` (n,) pixels on x (n, 3, S, S), cut off at a twentieth of the side."""
    radius = max(1, x.shape[-1] // 20)
    offset = torch.arange(-radius, radius + 1, device=x.device, dtype=x.dtype)
    kernel = torch.exp(-0.5 * (offset / sigma.clamp_min(1e-3)[:, None]) ** 2)
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(3, 0)[:, None]  # (3n, 1, 2r + 1)
    channels, shape = len(kernel), x.shape
    x = F.pad(x, [radius] * 4, mode="replicate").reshape(1, channels, shape[2] + 2 * radius, -1)
    x = F.conv2d(x, kernel[:, :, None], groups=channels)
    return F.conv2d(x, kernel[..., None], groups=channels).view(shape)


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
    failures = 0
    while left > 0 and failures < 10:
        area, aspect = rng.uniform(smallest, left), math.exp(rng.uniform(math.log(0.3), -math.log(0.3)))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        failures += 1
        if not (0 < height < side and 0 < width < side):
            continue
        top, first = rng.integers(side - height + 1), rng.integers(side - width + 1)
        block = mask[top : top + height, first : first + width]
        added = block.size - np.count_nonzero(block)
        if 0 < added <= left:
            block[:] = True
            left -= added
            smallest, failures = min(smallest, left), 0
    return mask
