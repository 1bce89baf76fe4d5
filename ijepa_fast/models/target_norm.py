"""Targets by place and channel, or by the batch: the statistics that kernels/target_loss normalises with.

Predictions of a little-trained encoder's features are predictions of their positions, which most of the features is.
Without a place's mean, and on the scale of what is left, position is no longer worth predicting; CAPI does so to its
clusters (positionwise Sinkhorn).
Shapes: B images of N patches, U rows of the union of the targets, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ijepa_fast.kernels.common.over_ranks import summed
from ijepa_fast.masks.packing import MaskDraw

EPS = 1e-4  # beside a variance, of features whose size is about 1
NORMS = ("token", "position", "position_token", "batch", "none")


def predicted(draw: MaskDraw, visible: bool = True) -> torch.Tensor:
    """(U,) fp32: how many predictions are compared with each row of the union; 0 of rows that are padding.

    visible: whether those of tokens that the context sees count too.
    """
    counts = torch.zeros(len(draw.union_index), device=draw.union_index.device)
    counts.index_add_(0, draw.prediction_rows, torch.ones_like(draw.prediction_rows, dtype=torch.float32))
    if visible and draw.visible_targets is not None and draw.visible_weights is not None:
        counts.index_add_(0, draw.visible_targets, (draw.visible_weights > 0).float())
    return counts


@dataclass
class TargetNorm:
    """What kernels/target_loss normalises targets with, by the norm `kind` of NORMS.

    Of the norms by place it keeps weights, sums and sums of squares of the targets, fading by `momentum` a step, of all
    ranks' targets, each as often as it is predicted. All three fade alike, so that early means need no correction.
    """

    kind: str
    momentum: float = 0.99

    @property
    def by_place(self) -> bool:
        """Whether it keeps statistics of every place."""
        return self.kind.startswith("position")

    def fresh(self, patches: int, width: int) -> torch.Tensor:
        """What it keeps, at first: (N, 2 D + 1) fp32."""
        return torch.zeros(patches, 2 * width + 1)

    @torch.no_grad()
    def __call__(self, targets: torch.Tensor, draw: MaskDraw, kept: torch.Tensor | None) -> dict[str, Any]:
        """Arguments of target_loss for targets (U, D). kept: the statistics by place, moved in place."""
        if self.kind == "token":
            return {}
        if self.kind == "none":
            return {"token": False}
        if kept is None:  # by the batch: all places are one
            return {"table": _table(sums_by_place(targets, draw).sum(0, keepdim=True)), "token": False}
        kept.mul_(self.momentum).add_(sums_by_place(targets, draw), alpha=1 - self.momentum)
        return {"table": _table(kept), "places": draw.union_places, "token": self.kind == "position_token"}


def sums_by_place(features: torch.Tensor, draw: MaskDraw) -> torch.Tensor:
    """Sums over a batch's targets (U, D) at each place, on all ranks: (N, 2 D + 1), of values, squares and ones.

    By way of all patches of the batch, not by adding rows up in any order: the same batch gives the same bits.
    """
    counts, values = predicted(draw)[:, None], features.float()
    rows = draw.union_index.long()

    def at_places(part: torch.Tensor) -> torch.Tensor:
        whole = part.new_zeros(draw.images * draw.patches, part.shape[1]).index_copy_(0, rows, part)
        return whole.view(draw.images, draw.patches, -1).sum(0)

    return summed(torch.cat([at_places(values * counts), at_places(values.square() * counts), at_places(counts)], 1))


def _table(sums: torch.Tensor) -> torch.Tensor:
    width = sums.shape[1] // 2
    mean, square = (sums[:, : 2 * width] / sums[:, -1:].clamp_min(torch.finfo(torch.float32).tiny)).chunk(2, 1)
    return torch.stack([mean, ((square - mean.square()).clamp_min(0) + EPS).rsqrt()])
