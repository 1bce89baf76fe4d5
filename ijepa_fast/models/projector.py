"""The projector of joint embeddings: linear layers with batch normalisation and ReLU between them (VICReg, LeJEPA)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from ijepa_fast.models import flops
from ijepa_fast.models.blocks import Linear
from ijepa_fast.models.heads import BatchNorm


class Projector(nn.Module):
    """Linear layers of `widths`; batch norm and ReLU between them."""

    def __init__(self, widths: Sequence[int]):
        super().__init__()
        self.layers = nn.ModuleList([Linear(a, b) for a, b in pairwise(widths)])
        self.norms = nn.ModuleList([BatchNorm(width) for width in widths[1:-1]])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(n, widths[0]) -> (n, widths[-1])."""
        for layer, norm in zip(self.layers, self.norms):
            x = layer(x)
            x = F.relu(norm(x, [len(x)])[0])
        return self.layers[-1](x)


def work(rows: int, widths: Sequence[int]) -> int:
    """Work of a Projector's forward pass on `rows`."""
    return sum(flops.linear(rows, a, b) for a, b in pairwise(widths))
