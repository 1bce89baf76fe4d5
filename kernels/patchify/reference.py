"""The meaning of patchify, in PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F


def patchify(
    images: torch.Tensor, patch: int, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype, width: int
) -> torch.Tensor:
    """Normalised patches (B*N, width) of images (B, H, W, 3) uint8; column c*P*P + i*P + j, zeros from 3*P*P on."""
    batch, height, length, channels = images.shape
    grid = images.view(batch, height // patch, patch, length // patch, patch, channels)
    # Permute bytes, not floats; then normalise in fp32 (fp64 if that is asked for) whatever the output's precision.
    pixels = grid.permute(0, 1, 3, 5, 2, 4).reshape(-1, channels, patch * patch)
    work = torch.float64 if dtype == torch.float64 else torch.float32
    centre = 255 * torch.tensor(mean, dtype=work, device=images.device)[:, None]
    spread = 255 * torch.tensor(std, dtype=work, device=images.device)[:, None]
    patches = ((pixels - centre) / spread).to(dtype).flatten(1)
    return F.pad(patches, (0, width - patches.shape[1]))
