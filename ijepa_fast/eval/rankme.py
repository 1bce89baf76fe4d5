"""Is the representation collapsing? RankMe (Garrido et al. 2023) and the spread of the target features."""

import torch
import torch.nn.functional as F


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


def target_variance(features):
    """Variance of the targets, features (n, D) after the affine-free LayerNorm, over rows and averaged over features.

    Every row then has a mean square of 1, so this is the share of it that is not the same in all rows: between 0, where
    every patch of every image has the same target, and 1.
    """
    targets = F.layer_norm(features.float(), features.shape[1:])
    return float(targets.var(0, correction=0).mean())
