"""uint8 images to normalised patches in Triton.

out[n, c*P*P + i*P + j] = image[row(n)*P + i, column(n)*P + j, c] * scale[c] + shift[c], zeros up to the padded width.
Each byte is read once from memory, each value written once. The writes, at least twice the bytes, run along the columns
of `out` in full lines; the reads are runs of 3*P bytes, whose lines the tile's other loads find in the cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ijepa_fast.kernels.common.aot import Case

ROWS, COLUMNS, WARPS = 16, 128, 4


@triton.jit(do_not_specialize=["patches"])
def _patchify_kernel(
    images_ptr,  # (B, H, W, 3) uint8
    out_ptr,  # (patches, WIDTH)
    patches,
    height,
    width,
    scale_r,
    scale_g,
    scale_b,
    shift_r,
    shift_g,
    shift_b,
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
    offset = (pixel // P * width + pixel % P) * 3 + channel
    scale = tl.where(channel == 0, scale_r, tl.where(channel == 1, scale_g, scale_b))
    shift = tl.where(channel == 0, shift_r, tl.where(channel == 1, shift_g, shift_b))

    in_patches = (patch < patches)[:, None]
    is_pixel = (column < 3 * P * P)[None, :]
    value = tl.load(images_ptr + corner[:, None] * 3 + offset[None, :], mask=in_patches & is_pixel, other=0)
    value = tl.where(is_pixel, value.to(tl.float32) * scale[None, :] + shift[None, :], 0.0)
    mask = in_patches & (column < WIDTH)[None, :]
    tl.store(out_ptr + patch[:, None] * WIDTH + column[None, :], value.to(out_ptr.dtype.element_ty), mask=mask)


def patchify(images, patch, mean, std, dtype, width):
    """Patches (B*N, width) of `dtype`."""
    batch, height, length, _ = images.shape
    patches = batch * (height // patch) * (length // patch)
    out = torch.empty((patches, width), dtype=dtype, device=images.device)
    scale = [1 / (255 * deviation) for deviation in std]
    shift = [-centre / deviation for centre, deviation in zip(mean, std)]
    grid = (triton.cdiv(patches, ROWS), triton.cdiv(width, COLUMNS))
    _patchify_kernel[grid](
        images, out, patches, height, length, *scale, *shift, patch, width, ROWS, COLUMNS, num_warps=WARPS
    )
    return out


def aot_cases(capability: int = 9) -> list[Case]:
    """/16 at 224 and 448, /14 padded to 592."""
    numbers = [f"{name}_{channel}" for name in ("scale", "shift") for channel in "rgb"]
    types = {"images_ptr": "*u8", "height": "i32:16", "width": "i32:16", **dict.fromkeys(numbers, "fp32")}
    return [
        Case(
            f"patchify P={patch} width={width}",
            _patchify_kernel,
            {"P": patch, "WIDTH": width, "ROWS": ROWS, "COLUMNS": COLUMNS},
            WARPS,
            types=types,
        )
        for patch, width in ((14, 592), (16, 768))
    ]
