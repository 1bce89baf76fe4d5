"""Is the representation collapsing? RankMe (Garrido et al. 2023) and the spread of the target features."""

import torch


def rankme(features, eps=1e-7):
    """Effective rank of features (n, D): exp of the entropy of the normalised singular values.

    Between 1 (all features along one line) and min(n, D). Computed in fp64 from the D x D Gram matrix. The mean is not
    taken off, as in the paper.
    """
    values = features.double()
    gram = values.T @ values if values.shape[1] <= values.shape[0] else values @ values.T
    singular = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    p = singular / singular.sum().clamp_min(eps) + eps
    return float((-(p * p.log()).sum()).exp())


def feature_std(features):
    """Standard deviation over images of each feature, averaged over features: near 0 where all images look the same."""
    return float(features.float().std(0).mean())
