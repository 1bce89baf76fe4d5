"""Images of 8 or 16 bits, or floats, to normalised patches in Triton.

out[n, c*P*P + i*P + j] = image[row(n)*P + i, column(n)*P + j, c] * scale[c] + shift[c], zeros up to the padded width.
Each pixel is read once from memory, each value written once. The writes run along the columns of `out` in full lines;
the reads are runs of C*P pixels, whose lines the tile's other loads find in the cache.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from ijepa_fast.kernels.common.aot import Case
from ijepa_fast.kernels.patchify.reference import UNITS

ROWS, COLUMNS, WARPS = 16, 128, 4


@triton.jit(do_not_specialize=["patches"])
def _patchify_kernel(
    images_ptr,  # (B, H, W, CHANNELS) uint8, uint16 or fp32
    out_ptr,  # (patches, WIDTH)
    scales_ptr,  # (2, CHANNELS) fp32, scales and shifts; not read of three channels, whose are numbers
    patches,
    height,
    width,
    scale_r,
    scale_g,
    scale_b,
    shift_r,
    shift_g,
    shift_b,
    CHANNELS: tl.constexpr,
    P: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    patch = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    per_row = width // P
    per_image = height // P * per_row
    within = patch % per_image
    corner = (patch // per_image * height + within // per_row * P) * width + within % per_row * P

    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    channel = column // (P * P)
    pixel = column % (P * P)
    offset = (pixel // P * width + pixel % P) * CHANNELS + channel
    is_value = column < CHANNELS * P * P
    if CHANNELS == 3:
        scale = tl.where(channel == 0, scale_r, tl.where(channel == 1, scale_g, scale_b))
        shift = tl.where(channel == 0, shift_r, tl.where(channel == 1, shift_g, shift_b))
    else:
        scale = tl.load(scales_ptr + channel, mask=is_value, other=0.0)
        shift = tl.load(scales_ptr + CHANNELS + channel, mask=is_value, other=0.0)

    in_patches = (patch < patches)[:, None]
    is_pixel = is_value[None, :]
    value = tl.load(images_ptr + corner[:, None] * CHANNELS + offset[None, :], mask=in_patches & is_pixel, other=0)
    value = tl.where(is_pixel, value.to(tl.float32) * scale[None, :] + shift[None, :], 0.0)
    mask = in_patches & (column < WIDTH)[None, :]
    tl.store(out_ptr + patch[:, None] * WIDTH + column[None, :], value.to(out_ptr.dtype.element_ty), mask=mask)


def patchify(images, patch, mean, std, dtype, width):
    """Patches (B*N, width) of `dtype`."""
    batch, height, length, channels = images.shape
    patches = batch * (height // patch) * (length // patch)
    out = torch.empty((patches, width), dtype=dtype, device=images.device)
    if channels == 3:
        scales, numbers = out, _numbers(images.dtype, tuple(mean), tuple(std))
    else:
        scales, numbers = _table(images.dtype, tuple(mean), tuple(std), images.device), (0.0,) * 6
    grid = (triton.cdiv(patches, ROWS), triton.cdiv(width, COLUMNS))
    _patchify_kernel[grid](
        images, out, scales, patches, height, length, *numbers, channels, patch, width, ROWS, COLUMNS, num_warps=WARPS
    )
    return out


def _numbers(dtype, mean, std):
    """The scales of the channels, then their shifts."""
    scale = [1 / (UNITS[dtype] * deviation) for deviation in std]
    return (*scale, *(-centre / deviation for centre, deviation in zip(mean, std)))


@functools.lru_cache(64)
def _table(dtype, mean, std, device):
    """The same on the device, where it is copied once: a graph that is captured may not."""
    return torch.tensor(_numbers(dtype, mean, std), dtype=torch.float32, device=device)


def aot_cases(capability: int = 9) -> list[Case]:
    """/16 at 224 and 448, /14 padded to 592; 13 channels of 16 bits."""
    numbers = [f"{name}_{channel}" for name in ("scale", "shift") for channel in "rgb"]
    types = {"scales_ptr": "*fp32", "height": "i32:16", "width": "i32:16", **dict.fromkeys(numbers, "fp32")}
    return [
        Case(
            f"patchify P={patch} width={width}" + ("" if channels == 3 else f" {channels} channels of 16 bits"),
            _patchify_kernel,
            {"CHANNELS": channels, "P": patch, "WIDTH": width, "ROWS": ROWS, "COLUMNS": COLUMNS},
            WARPS,
            types=types | {"images_ptr": "*u8" if channels == 3 else "*u16"},
        )
        for channels, patch, width in ((3, 14, 592), (3, 16, 768), (13, 16, 3328))
    ]
