"""k nearest neighbours by cosine similarity, votes weighted by exp(similarity / temperature) (Wu et al. 2018)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

KS = (10, 20, 100, 200)
_ELEMENTS = 1 << 26  # of similarities or votes held at once


def knn_scores(
    train_features: torch.Tensor,
    train_values: torch.Tensor,
    test_features: torch.Tensor,
    ks: Sequence[int] = KS,
    temperature: float = 0.07,
) -> dict[int, torch.Tensor]:
    """Weighted votes of the k nearest training images, for several k at once.

    train_features (n, D), test_features (m, D): compared by cosine. train_values (n, V) fp32: one-hot classes, or
    numbers to average. Returns {k: (m, V) fp32}, weighted means of the neighbours' values. Similarities and votes are
    computed for a part of the test images at a time. Raises ValueError for sizes that do not fit, or k above n.
    """
    _check(train_features, train_values, test_features, ks)
    train = F.normalize(train_features.float(), dim=1)
    most = max(ks)
    scores: dict[int, list[torch.Tensor]] = {k: [] for k in ks}
    chunk = max(1, _ELEMENTS // max(len(train), most * train_values.shape[1]))
    for rows in F.normalize(test_features.float(), dim=1).split(chunk):
        similarity, neighbour = (rows @ train.T).topk(most, dim=1)
        # The largest weight is 1: exp(1 / .07) itself would lose the small ones.
        weight = ((similarity - similarity[:, :1]) / temperature).exp()
        votes = weight[..., None] * train_values[neighbour]
        for k in ks:
            scores[k].append(votes[:, :k].sum(1) / weight[:, :k].sum(1, keepdim=True))
    return {k: torch.cat(parts) for k, parts in scores.items()}


def nearest(features: torch.Tensor, queries: torch.Tensor, k: int = 6) -> torch.Tensor:
    """The k rows of features (n, D) most like each row of `queries` (m,), without itself: indices int64 (m, k)."""
    unit = F.normalize(features.float(), dim=1)
    similarity = unit[queries] @ unit.T
    similarity[torch.arange(len(queries)), queries] = -torch.inf
    return similarity.topk(min(k, len(features) - 1), dim=1).indices


def _check(
    train_features: torch.Tensor, train_values: torch.Tensor, test_features: torch.Tensor, ks: Sequence[int]
) -> None:
    if len(train_features) != len(train_values):
        raise ValueError(f"train_labels: expected {len(train_features)}, one per image, got {len(train_values)}")
    if train_features.shape[1] != test_features.shape[1]:
        raise ValueError(
            f"test_features: expected the width of train_features, {train_features.shape[1]}, "
            f"got {test_features.shape[1]}"
        )
    if min(ks) < 1 or max(ks) > len(train_features):
        raise ValueError(f"ks: expected 1 to {len(train_features)}, the number of training images, got {tuple(ks)}")
