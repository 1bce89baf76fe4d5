"""The meaning of patchify, in PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

# What a pixel is divided by: integers are shares of their range, floats are as they are.
UNITS = {torch.uint8: 255, torch.uint16: 65535, torch.float32: 1}


def patchify(
    images: torch.Tensor, patch: int, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype, width: int
) -> torch.Tensor:
    """Normalised patches (B*N, width) of images (B, H, W, C); column c*P*P + i*P + j, zeros from C*P*P on."""
    batch, height, length, channels = images.shape
    grid = images.view(batch, height // patch, patch, length // patch, patch, channels)
    unit = UNITS[images.dtype]
    # Permute bytes, not floats; then normalise in fp32 (fp64 if that is asked for) whatever the output's precision.
    pixels = grid.permute(0, 1, 3, 5, 2, 4).reshape(-1, channels, patch * patch)
    work = torch.float64 if dtype == torch.float64 else torch.float32
    centre = unit * torch.tensor(mean, dtype=work, device=images.device)[:, None]
    spread = unit * torch.tensor(std, dtype=work, device=images.device)[:, None]
    patches = ((pixels.to(work) - centre) / spread).to(dtype).flatten(1)
    return F.pad(patches, (0, width - patches.shape[1]))
