"""patchify: checks, dispatch and registration. Pixels have no gradient, so there is no backward."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ijepa_fast.kernels.common.checks import FLOATS, check_tensor
from ijepa_fast.kernels.common.dispatch import runs_triton
from ijepa_fast.kernels.common.library import register
from ijepa_fast.kernels.patchify import reference
from ijepa_fast.kernels.patchify.reference import UNITS


def patchify(
    images: torch.Tensor,
    patch: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
    width: int | None = None,
) -> torch.Tensor:
    """Cut images into normalised patches, laid out as the rows the patch embedding's weight multiplies.

    Args:
        images: (B, H, W, C) uint8, uint16 or float32, contiguous; H and W multiples of `patch`.
        patch: side P of a patch, in pixels.
        mean: of each channel, for integer pixels as shares of their range, floats as they are.
        std: of each channel, likewise.
        dtype: of the result; the arithmetic is fp32 (fp64 for float64).
        width: columns of the result, at least C*P*P; default that number rounded up to a multiple of 8.

    Returns:
        (B*N, width) patches, row-major over the grid of each image. Column c*P*P + i*P + j is channel c of pixel
        (i, j), as in `Conv2d.weight.flatten(1)`; the columns from C*P*P on are zero.

    Raises:
        ValueError: for a wrong dtype, shape or layout, or a width that is too small.
    """
    check_tensor("patchify", "images", images, (None, None, None, None), tuple(UNITS))
    if patch < 1 or images.shape[1] % patch or images.shape[2] % patch:
        raise ValueError(
            f"patchify: images: expected a height and a width that are multiples of patch={patch}, got "
            f"{images.shape[1]} x {images.shape[2]}; crop the images to a multiple"
        )
    channels = images.shape[3]
    if len(mean) != channels or len(std) != channels:
        raise ValueError(
            f"patchify: mean, std: expected {channels} values each, one per channel, got {len(mean)} and {len(std)}"
        )
    if dtype not in FLOATS:
        raise ValueError(f"patchify: dtype: expected a floating-point dtype, got {dtype}")
    values = channels * patch * patch
    if width is None:
        width = (values + 7) // 8 * 8
    elif width < values:
        raise ValueError(f"patchify: width: expected at least {channels}*{patch}*{patch} = {values}, got {width}")
    if not runs_triton("patchify", images):
        return reference.patchify(images, patch, mean, std, dtype, width)
    if dtype == torch.float64:
        raise ValueError(
            "patchify: dtype: the Triton kernel computes in fp32, got float64; set kernels.patchify=reference"
        )
    return _patchify(images, patch, list(mean), list(std), dtype, width)


def _patchify_fake(images, patch, mean, std, dtype, width):
    batch, height, length, _ = images.shape
    return images.new_empty(batch * (height // patch) * (length // patch), width, dtype=dtype)


_patchify = register(
    "patchify(Tensor images, SymInt patch, float[] mean, float[] std, ScalarType dtype, SymInt width) -> Tensor",
    reference,
    fake=_patchify_fake,
)
