"""Is the representation collapsing? RankMe (Garrido et al. 2023) and the spread of the target features."""

import torch
import torch.nn.functional as F


def rankme(features: torch.Tensor, eps: float = 1e-7) -> float:
    """Effective rank of features (n, D): exp of the entropy of the normalised singular values.

    Between 1 (all features along one line) and min(n, D). Computed in fp64 from the D x D Gram matrix. The mean is not
    taken off, as in the paper.
    """
    values = features.double()
    gram = values.T @ values if values.shape[1] <= values.shape[0] else values @ values.T
    singular = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    p = singular / singular.sum().clamp_min(eps) + eps
    return float((-(p * p.log()).sum()).exp())


def target_variance(features: torch.Tensor, places: torch.Tensor) -> float:
    """Variance between images of the targets at the same place: features (n, D) after the affine-free LayerNorm.

    places: int (n,) position of each row's patch in its image. Every row has a mean square of 1, so this is the share
    of it that tells images apart: 0 where a target depends on its place alone or on nothing, at most 1.
    """
    targets = F.layer_norm(features.float(), features.shape[1:])
    places = places.long().unique(return_inverse=True)[1]
    count = torch.bincount(places)
    mean = targets.new_zeros(len(count), targets.shape[1]).index_add_(0, places, targets) / count[:, None]
    squares = (targets - mean[places]).square().mean(1).sum()
    return float(squares / max(1, len(targets) - len(count)))
