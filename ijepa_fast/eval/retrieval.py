"""Retrieval: training images ranked by cosine similarity to each test image; mean average precision of its class."""

from __future__ import annotations

import torch
import torch.nn.functional as F

_ELEMENTS = 1 << 24  # of similarities sorted at once


def average_precisions(
    gallery: torch.Tensor, gallery_labels: torch.Tensor, queries: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """The average precision of each query over the whole ranking, fp64 (m,); NaN where no image of its class is there.

    gallery (n, D), queries (m, D): features, compared by cosine. gallery_labels (n,), labels (m,): of the same kind.
    """
    unit, found = F.normalize(gallery.float(), dim=1), []
    chunk = max(1, _ELEMENTS // len(gallery))
    places = torch.arange(1, len(gallery) + 1, device=gallery.device, dtype=torch.float64)
    for rows, classes in zip(F.normalize(queries.float(), dim=1).split(chunk), labels.split(chunk)):
        order = (rows @ unit.T).argsort(1, descending=True)
        right = gallery_labels[order] == classes[:, None]
        precision = right.cumsum(1) / places
        found.append((precision * right).sum(1) / right.sum(1))
    return torch.cat(found)


def expected_at_random(gallery_labels: torch.Tensor, labels: torch.Tensor) -> float:
    """The mean of average_precisions that a ranking at random is expected to have.

    The place of each relevant image is any of n; of the places before it, a share (R - 1) / (n - 1) is relevant too.
    """
    n = len(gallery_labels)
    values, counts = gallery_labels.unique(return_counts=True)
    relevant = (labels[:, None] == values).double() @ counts.double()
    relevant = relevant[relevant > 0]
    harmonic = float((1 / torch.arange(1, n + 1, dtype=torch.float64)).sum())
    return float(((harmonic + (relevant - 1) / max(n - 1, 1) * (n - harmonic)) / n).mean())
