"""RankMe (Garrido et al. 2023): how many dimensions features use."""

import torch


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
