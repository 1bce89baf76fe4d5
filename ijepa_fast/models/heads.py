"""Projection heads of self-distillation: multilayer perceptrons, and prototypes.

Shapes: r rows, D width, F hidden width, Q prototypes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ijepa_fast.kernels.common.over_ranks import ranks, summed
from ijepa_fast.models import flops
from ijepa_fast.models.blocks import Linear, LinearGELU

BATCH_EPS = 1e-5  # beside a variance of batch norm
Moments = tuple[torch.Tensor, torch.Tensor]


class Prototypes(nn.Module):
    """Weight-normed linear layer without bias. gain: whether each output's gain is learned, from 1; else it is 1."""

    def __init__(self, width: int, count: int, gain: bool = False):
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(count, 1)) if gain else None
        self.weight_v = nn.Parameter(torch.empty(count, width).uniform_(-(width**-0.5), width**-0.5))

    def forward(self, x: torch.Tensor, frozen: bool = False) -> torch.Tensor:
        """(r, width) -> (r, Q); `frozen`: the weight's gradient is zero."""
        weight = F.normalize(self._frozen(self.weight_v, frozen), dim=1)
        if self.weight_g is not None:
            weight = self._frozen(self.weight_g, frozen) * weight
        return F.linear(x, weight)

    @staticmethod
    def _frozen(weight: torch.Tensor, frozen: bool) -> torch.Tensor:
        # Zero, not None: the engine reduces every gradient. What weight decay does to a direction, the norm undoes.
        return weight.detach() + 0 * weight if frozen else weight


class Head(nn.Module):
    """The projection head of DINO and iBOT, which shares it between class tokens and patches."""

    def __init__(self, dim: int, hidden: int = 2048, bottleneck: int = 256, prototypes: int = 8192, gain: bool = False):
        super().__init__()
        # The published names count the activations.
        self.mlp = nn.ModuleDict(
            {"0": LinearGELU(dim, hidden), "2": LinearGELU(hidden, hidden), "4": nn.Linear(hidden, bottleneck)}
        )
        self.last_layer = Prototypes(bottleneck, prototypes, gain)

    def bottleneck(self, x: torch.Tensor) -> torch.Tensor:
        """(r, D) -> (r, bottleneck), of length 1."""
        for layer in self.mlp.values():
            x = layer(x)
        return F.normalize(x, dim=1)


class BatchNorm(nn.Module):
    """Batch norm of rows by the statistics of their group, over all ranks. It keeps none: they are the caller's."""

    def __init__(self, width: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: torch.Tensor, groups: Sequence[int]) -> tuple[torch.Tensor, list[Moments]]:
        """`x` (r, F), `groups` of so many rows one after the other -> (r, F), and of each group mean and unbiased
        variance (F,) fp32. All ranks have the same groups. ValueError for a group of one row in all.
        """
        rows, moments = [], []
        for part in x.float().split(list(groups)):
            count = len(part) * ranks()
            if count < 2:
                raise ValueError("batch norm: expected at least 2 rows in a group, over all ranks, got 1")
            mean = summed(part.sum(0)) / count
            centred = part - mean
            squares = summed(centred.square().sum(0))
            rows.append(centred * (squares / count + BATCH_EPS).rsqrt())
            moments.append((mean.detach(), squares.detach() / (count - 1)))
        return (torch.cat(rows) * self.weight.float() + self.bias.float()).to(x.dtype), moments


class NormedHead(nn.Module):
    """MSN's head: three layers, batch norm and exact GELU behind each of the first two."""

    def __init__(self, dim: int, hidden: int = 2048, out: int = 256):
        super().__init__()
        self.fc1, self.bn1 = Linear(dim, hidden), BatchNorm(hidden)
        self.fc2, self.bn2 = Linear(hidden, hidden), BatchNorm(hidden)
        self.fc3 = Linear(hidden, out)

    def forward(self, x: torch.Tensor, groups: Sequence[int]) -> tuple[torch.Tensor, dict[str, list[Moments]]]:
        """`x` (r, D), in groups as BatchNorm's -> (r, out), and the groups' statistics by layer, "bn1" and "bn2"."""
        moments: dict[str, list[Moments]] = {}
        for number, (layer, norm) in enumerate(((self.fc1, self.bn1), (self.fc2, self.bn2)), start=1):
            x, moments[f"bn{number}"] = norm(layer(x), groups)
            x = F.gelu(x)
        return self.fc3(x), moments


class Directions(nn.Module):
    """Prototypes that are compared by the cosine."""

    def __init__(self, width: int, count: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, width).uniform_(-math.sqrt(1 / width), math.sqrt(1 / width)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(r, width) -> cosines (r, Q) in fp32."""
        return F.linear(F.normalize(x.float(), dim=1), F.normalize(self.weight.float(), dim=1))


@torch.no_grad()
def sinkhorn(assignments: torch.Tensor, rounds: int) -> torch.Tensor:
    """`assignments` (r, Q) fp32, rows that sum to 1, of all ranks together -> the same, prototypes equally used.

    A round scales columns to a sum of 1 / Q, then rows to one of 1 over their number: Sinkhorn and Knopp.
    """
    count, prototypes = len(assignments) * ranks(), assignments.shape[1]
    found = assignments / summed(assignments.sum())
    for _ in range(rounds):
        found = found / (prototypes * summed(found.sum(0)))
        found = found / (count * found.sum(1, keepdim=True))
    return found * count


@dataclass(frozen=True)
class HeadSizes:
    """Sizes of the head: two hidden layers, a bottleneck, the prototypes."""

    hidden: int = 2048
    bottleneck: int = 256
    prototypes: int = 8192

    def forward(self, inputs: int, rows: int, prototype_rows: int) -> int:
        """Work of `rows` through the layers up to the bottleneck, `prototype_rows` of them on to the prototypes."""
        narrow = flops.linear(rows, inputs, self.hidden) + flops.linear(rows, self.hidden, self.hidden)
        narrow += flops.linear(rows, self.hidden, self.bottleneck)
        return narrow + flops.linear(prototype_rows, self.bottleneck, self.prototypes)
