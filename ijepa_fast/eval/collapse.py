"""The collapse doctor: what the target features of a run say of its health, beside those of its untrained encoder.

Thresholds are of runs that were measured (docs/results/learning.md, docs/LOG.md: CIFAR-10, patches of 4, a seed each).
RankMe: half-way through runs in which it fell to .43 and .31 of the untrained encoder's, the linear probe was 6 points
under that encoder's; runs in which it stayed above .5 gained 4 to 7 points. Variance between images: .14 at least in
the run that gained 7 points; .09 and .04 in two that came close to a collapse. The others have no threshold: none was
measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from ijepa_fast.eval.rankme import rankme, target_variance

# Below either of these the targets have collapsed; what healthy and collapsed runs show is in docs/evaluation.md.
LEAST_VARIANCE = 0.01
LEAST_RANK = 1.5
# Below either of these a run is on its way there, see above.
LOW_VARIANCE = 0.1
LOW_RANK = 0.45  # of the untrained encoder's
LIDAR_EPS = 1e-4  # beside the variances within a class, as a share of their mean


def examine(pooled: torch.Tensor, features: torch.Tensor, places: torch.Tensor) -> dict[str, float]:
    """RankMe of `pooled` (n, D); of a batch's target features (U, D), whose patches are at `places` (U,):

    target_variance, that between images at a place, of 1; position_share, of the normalised targets' variance, what
    their places explain; feature_norm, the root mean square of a feature, which grows where the rank falls.
    """
    between = target_variance(features, places)
    whole = F.layer_norm(features.float(), features.shape[1:])
    total = float((whole - whole.mean(0)).square().mean(1).sum() / max(1, len(whole) - 1))
    return {
        "rankme": rankme(pooled),
        "target_variance": between,
        "position_share": max(0.0, 1 - between / total) if total > 0 else 1.0,
        "feature_norm": float(features.float().square().mean().sqrt()),
    }


def lidar(features: torch.Tensor, labels: torch.Tensor) -> float:
    """LiDAR (Thilak et al. 2023): the effective rank of what tells classes apart, whitened by what is within them.

    features (n, D), labels (n,) integers. Between 1 and the classes there are less one. In fp64.
    """
    x, labels = features.double(), labels.unique(return_inverse=True)[1]
    counts = torch.bincount(labels).double()
    means = x.new_zeros(len(counts), x.shape[1]).index_add_(0, labels, x) / counts[:, None]
    within = x - means[labels]
    values, vectors = torch.linalg.eigh(within.T @ within / len(x))
    # Of directions without variance: rounding, not a scale to whiten by.
    whitening = vectors * (values.clamp_min(0) + LIDAR_EPS * values.clamp_min(0).mean()).rsqrt()
    apart = (means - x.mean(0)) @ whitening * (counts / len(x)).sqrt()[:, None]
    spectrum = torch.linalg.svdvals(apart).square()
    p = spectrum / spectrum.sum().clamp_min(torch.finfo(torch.float64).tiny) + 1e-12
    return float((-(p * p.log()).sum()).exp())


def advise(now: dict[str, Any], untrained: dict[str, Any] | None, most: int) -> str | None:
    """A sentence on what is wrong and what to do, None where nothing is. most: what RankMe could be."""
    rank, variance = now["rankme"], now["target_variance"]
    told = f"RankMe {rank:.2f} of {most}, variance {variance:.4f} of 1"
    if rank < LEAST_RANK or variance < LEAST_VARIANCE:
        return (
            f"the targets have collapsed, all images look almost the same to the target encoder ({told}); go back to "
            f"an earlier checkpoint and lower optim.lr or raise optim.ema"
        )
    if untrained is not None and rank < LOW_RANK * untrained["rankme"]:
        return (
            f"the rank of the targets has fallen to {rank / untrained['rankme']:.0%} of the untrained encoder's "
            f"({told}; untrained {untrained['rankme']:.2f}); lower optim.lr, lengthen optim.warmup_epochs or raise "
            f"optim.ema; what else there is: docs/options.md"
        )
    if variance < LOW_VARIANCE and (untrained is None or untrained["target_variance"] >= LOW_VARIANCE):
        return (
            f"the targets tell places apart, not images ({told}; their place explains "
            f"{now['position_share']:.0%} of their variance); raise model.patch_std of small patches, or see "
            f"docs/options.md for targets that are normalised by place"
        )
    return None


@dataclass(frozen=True)
class Sign:
    """One figure of the doctor's: now and of the untrained encoder, what is expected, and whether it is low."""

    name: str
    now: float
    untrained: float | None
    expected: str
    low: bool = False


def signs(now: dict[str, Any], untrained: dict[str, Any] | None) -> list[Sign]:
    """What `examine` found, beside what is expected of it; by the thresholds of `advise`."""
    before = untrained or {}
    first = before.get("rankme")
    least_rank = LEAST_RANK if first is None else max(LEAST_RANK, LOW_RANK * first)
    rank = (
        f"collapsed below {LEAST_RANK:g}"
        if first is None
        else (f"at least {least_rank:.3g}, {LOW_RANK:.0%} of the untrained; collapsed below {LEAST_RANK:g}")
    )
    usual = before.get("target_variance", LOW_VARIANCE) >= LOW_VARIANCE
    least_variance = LOW_VARIANCE if usual else LEAST_VARIANCE
    variance = (
        f"at least {LOW_VARIANCE:g} of 1; collapsed below {LEAST_VARIANCE:g}"
        if usual
        else (f"the untrained is below {LOW_VARIANCE:g} of 1 itself; collapsed below {LEAST_VARIANCE:g}")
    )
    told = {
        "rankme": ("RankMe", rank, least_rank),
        "target_variance": ("variance between images", variance, least_variance),
        "position_share": (
            "share explained by place",
            "no threshold was measured; near 1 targets tell places apart",
            None,
        ),
        "feature_norm": ("size of a feature", "no threshold was measured; it grows where the rank falls", None),
    }
    return [
        Sign(name, now[key], before.get(key), expected, least is not None and now[key] < least)
        for key, (name, expected, least) in told.items()
        if key in now
    ]
