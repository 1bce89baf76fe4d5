"""The projection head of self-distillation: a multilayer perceptron to points of length 1, and prototypes.

Shapes: r rows, D width, Q prototypes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ijepa_fast.models import flops
from ijepa_fast.models.vit import LinearGELU


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
