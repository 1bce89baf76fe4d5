"""The projector of joint embeddings: linear layers with batch normalisation and ReLU between them (VICReg, LeJEPA)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from ijepa_fast.models import flops
from ijepa_fast.models.over_ranks import ranks, summed
from ijepa_fast.models.vit import Linear

BATCH_NORM_EPS = 1e-5


class BatchNorm(nn.Module):
    """Batch normalisation by the statistics of the batch on all ranks, in fp32; it keeps no running ones.

    What it normalises is thrown away after training, so that nothing would read them.
    """

    def __init__(self, width: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x` (n, width) -> the same, normalised over all ranks' rows; each has as many."""
        values, count = x.float(), len(x) * ranks()
        values = values - summed(values.sum(0)) / count
        variance = summed(values.square().sum(0)) / count
        normal = values * (variance + BATCH_NORM_EPS).rsqrt()
        return (normal * self.weight + self.bias).to(x.dtype)


class Projector(nn.Module):
    """Linear layers of `widths`; batch norm and ReLU between them."""

    def __init__(self, widths: Sequence[int]):
        super().__init__()
        self.layers = nn.ModuleList([Linear(a, b) for a, b in pairwise(widths)])
        self.norms = nn.ModuleList([BatchNorm(width) for width in widths[1:-1]])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(n, widths[0]) -> (n, widths[-1])."""
        for layer, norm in zip(self.layers, self.norms):
            x = F.relu(norm(layer(x)))
        return self.layers[-1](x)


def work(rows: int, widths: Sequence[int]) -> int:
    """Work of a Projector's forward pass on `rows`."""
    return sum(flops.linear(rows, a, b) for a, b in pairwise(widths))
