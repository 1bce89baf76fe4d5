"""What keeps I-JEPA's context features apart: VICReg's terms (as in C-JEPA) or SIGReg, on features pooled by image.

Statistics are of all ranks' images. Shapes: B images, T context tokens, S context sequences, U target rows, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ijepa_fast.kernels.common.over_ranks import gathered
from ijepa_fast.kernels.sigreg import sigreg
from ijepa_fast.masks.packing import MaskDraw
from ijepa_fast.models import flops
from ijepa_fast.models.projector import work as projector_work
from ijepa_fast.models.target_norm import predicted

SIMILARITY, DEVIATION, COVARIANCE = 25.0, 25.0, 1.0  # C-JEPA's, which are VICReg's
STD_EPS = 1e-4
WEIGHTS = {"none": 0.0, "vicreg": 1e-3, "sigreg": 0.02}  # published: C-JEPA, LeJEPA


@dataclass
class Regulariser:
    """One of WEIGHTS. weight: None for the published one. slices: directions of SIGReg in a step."""

    kind: str
    weight: float | None = None
    slices: int = 256

    def __call__(
        self, context: torch.Tensor, targets: torch.Tensor, draw: MaskDraw, projector: nn.Module | None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Context tokens (T, D), target features (U, D) -> the weighted sum, and its terms, not weighted, detached."""

        def projected(x: torch.Tensor) -> torch.Tensor:
            return x if projector is None else projector(x.to(context.dtype)).float()

        pooled = projected(pooled_context(context, draw))
        if self.kind == "sigreg":
            assert draw.directions is not None
            # Contexts of one image are no independent samples: each set of contexts is a view of the images.
            views = pooled.view(-1, draw.images, pooled.shape[1])
            terms = {"sigreg": sigreg(views, draw.directions)}
            total = terms["sigreg"]
        else:
            with torch.no_grad():
                target = projected(pooled_targets(targets, draw))
            terms = vicreg(pooled, target)
            total = weighted(terms)
        weight = WEIGHTS[self.kind] if self.weight is None else self.weight
        return weight * total, {name: term.detach() for name, term in terms.items()}

    def work(self, rows: int, widths: list[int]) -> int:
        """Forward work on `rows` pooled features, projected to `widths`."""
        of_terms = flops.linear(rows, widths[-1], self.slices if self.kind == "sigreg" else widths[-1])
        return projector_work(rows, widths) + of_terms


def pooled_context(context: torch.Tensor, draw: MaskDraw) -> torch.Tensor:
    """`context` (T, D) -> its mean over the tokens of each context sequence, (S, D) fp32."""
    lengths = draw.context_cu_seqlens.diff()
    sums = torch.segment_reduce(context.float(), "sum", lengths=lengths, unsafe=True, initial=0)
    return sums[: draw.sequences] / lengths[: draw.sequences, None]


def pooled_targets(features: torch.Tensor, draw: MaskDraw) -> torch.Tensor:
    """Target features (U, D) -> normalised, their mean over each image's targets, in a row for each context (S, D).

    Published readings take the mean over all patches; those that are no target are not computed here.
    """
    counts = predicted(draw, visible=False)[:, None]
    normal = F.layer_norm(features.float(), features.shape[1:]) * counts
    both = torch.segment_reduce(torch.cat([normal, counts], 1), "sum", lengths=draw.union_lengths, unsafe=True)
    return (both[:, :-1] / both[:, -1:]).repeat(draw.sequences // draw.images, 1)


def vicreg(context: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
    """The three terms of (S, D) fp32, unweighted: similarity to `target`, deviation, covariance of `context`."""
    similarity, context = F.mse_loss(gathered(context), gathered(target)), gathered(context)
    return {
        "similarity": similarity,
        "deviation": F.relu(1 - (context.var(0) + STD_EPS).sqrt()).mean(),
        "covariance": off_diagonal(context),
    }


def off_diagonal(x: torch.Tensor) -> torch.Tensor:
    """Sum of the squared covariances of different columns of `x` (n, D), over D."""
    centred = x - x.mean(0)
    covariance = centred.T @ centred / (len(x) - 1)
    return (covariance.square().sum() - covariance.diagonal().square().sum()) / x.shape[1]


def weighted(terms: dict[str, torch.Tensor]) -> torch.Tensor:
    """VICReg's sum of its terms."""
    return SIMILARITY * terms["similarity"] + DEVIATION * terms["deviation"] + COVARIANCE * terms["covariance"]
