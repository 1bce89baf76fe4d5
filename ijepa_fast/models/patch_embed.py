"""The patch embedding: a convolution without overlap, applied as a matrix product to patches.

Shapes: T patches, C channels, P patch side, W padded patch row, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ijepa_fast.kernels.linear import linear


class PatchEmbed(nn.Module):
    """The patch-embedding convolution, stored as one and applied as a matrix product to patches."""

    def __init__(self, patch: int, dim: int, channels: int = 3):
        super().__init__()
        self.proj = PatchLinear(channels, dim, kernel_size=patch, stride=patch)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """`patches` (T, W), W >= C*P*P with zeros behind -> (T, D)."""
        return self.proj(patches)


class PatchLinear(nn.Conv2d):
    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """See `PatchEmbed.forward`."""
        weight = self.weight.flatten(1)
        padding = patches.shape[1] - weight.shape[1]
        return linear(patches, F.pad(weight, (0, padding)) if padding else weight, self.bias)
