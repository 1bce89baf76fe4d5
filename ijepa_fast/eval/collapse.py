"""The collapse doctor: what the target features of a run say of its health, beside those of its untrained encoder.

Thresholds are of runs that were measured (docs/results/learning.md, docs/options.md, docs/LOG.md), a seed each.
RankMe: half-way through runs in which it fell to .43 and .31 of the untrained encoder's, the linear probe was 6 points
under that encoder's; runs in which it stayed above .5 gained 4 to 7 points.
Variance between images: .14 at least in the run that gained 7 points; .09 and .04 in two that came close to a collapse.
Position: it explained .06 to .59 of the variance in sound runs, .86 at most, as the variance says, in the one
that gained 7 points, and .991 in one that was made to collapse.
The norm of a feature, which is the gain of the encoder's last LayerNorm, grew by less than 1 % in sound runs,
and by 27 % in that one.
LiDAR has no threshold: of the untrained encoder's it was .84 to .98 in sound runs, and .81 to .86 in that one:
the class means of noise lie in all directions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from ijepa_fast.eval.rankme import rankme, target_variance

# Below either of these the targets have collapsed; what healthy and collapsed runs show is in docs/evaluation.md.
LEAST_VARIANCE = 0.01
LEAST_RANK = 1.5
# Below either of these a run is on its way there, see above.
LOW_VARIANCE = 0.1
LOW_RANK = 0.45  # of the untrained encoder's
HIGH_POSITION = 0.9  # above it too
HIGH_NORM = 1.1  # times the untrained encoder's
LIDAR_EPS = 1e-4  # beside the variances within a class, as a share of their mean


def examine(pooled: torch.Tensor, features: torch.Tensor, places: torch.Tensor) -> dict[str, float]:
    """RankMe of `pooled` (n, D); of a batch's target features (U, D), whose patches are at `places` (U,):

    target_variance, that between images at a place, of 1; position_share, of the normalised targets' variance, what
    their places explain; feature_norm, the root mean square of a feature.
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
    floor = (LIDAR_EPS * values.clamp_min(0).mean()).clamp_min(1e-30)
    whitening = vectors * (values.clamp_min(0) + floor).rsqrt()
    apart = (means - x.mean(0)) @ whitening * (counts / len(x)).sqrt()[:, None]
    spectrum = torch.linalg.svdvals(apart).square()
    p = spectrum / spectrum.sum().clamp_min(torch.finfo(torch.float64).tiny) + 1e-12
    return float((-(p * p.log()).sum()).exp())


class Advice(NamedTuple):
    """What is wrong, and what to do. kind: collapsed | rank | places | norm."""

    kind: str
    words: str


def has_collapsed(now: dict[str, Any]) -> bool:
    """Whether the targets of a reading have collapsed."""
    return bool(now["rankme"] < LEAST_RANK or now["target_variance"] < LEAST_VARIANCE)


def advise(now: dict[str, Any], untrained: dict[str, Any] | None, most: int) -> Advice | None:
    """The worst of what is wrong, None where nothing is. most: what RankMe could be."""
    rank, variance = now["rankme"], now["target_variance"]
    told = f"RankMe {rank:.2f} of {most}, variance {variance:.4f} of 1"
    if has_collapsed(now):
        return Advice(
            "collapsed",
            f"the targets have collapsed, all images look almost the same to the target encoder ({told}); go back to "
            f"an earlier checkpoint and lower optim.lr or raise optim.ema",
        )
    if untrained is not None and rank < LOW_RANK * untrained["rankme"]:
        return Advice(
            "rank",
            f"the rank of the targets has fallen to {rank / untrained['rankme']:.0%} of the untrained encoder's "
            f"({told}; untrained {untrained['rankme']:.2f}); lower optim.lr, lengthen optim.warmup_epochs or raise "
            f"optim.ema; what else there is: docs/options.md",
        )
    low = variance < LOW_VARIANCE and (untrained is None or untrained["target_variance"] >= LOW_VARIANCE)
    if low or now["position_share"] > HIGH_POSITION:
        return Advice(
            "places",
            f"the targets tell places apart, not images ({told}; their place explains {now['position_share']:.0%} of "
            f"their variance); raise model.patch_std of small patches, or see docs/options.md for targets that are "
            f"normalised by place",
        )
    norm = now["feature_norm"] / untrained["feature_norm"] if untrained and "feature_norm" in untrained else 1.0
    if norm > HIGH_NORM:
        return Advice(
            "norm",
            f"the features have grown to {norm:.2f} times the untrained encoder's, as they did in a run that collapsed "
            f"({told}); lower optim.lr or lengthen optim.warmup_epochs",
        )
    return None


@dataclass(frozen=True)
class Sign:
    """A figure of the doctor's: now, of the untrained encoder, what is expected, "low" or "high" where it is not."""

    name: str
    now: float
    untrained: float | None
    expected: str
    beyond: str = ""


def signs(now: dict[str, Any], untrained: dict[str, Any] | None) -> list[Sign]:
    """What `examine` found, beside what is expected of it; by the thresholds of `advise`."""
    before = untrained or {}
    first, size = before.get("rankme"), before.get("feature_norm")
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
    norm = "the gain of the last LayerNorm" if size is None else f"at most {HIGH_NORM:g} times the untrained"
    most_norm = float("inf") if size is None else HIGH_NORM * size
    told = {
        "rankme": ("RankMe", rank, "low" * (now.get("rankme", least_rank) < least_rank)),
        "target_variance": (
            "variance between images",
            variance,
            "low" * (now.get("target_variance", 1) < least_variance),
        ),
        "position_share": (
            "share explained by place",
            f"at most {HIGH_POSITION:g}; above it targets tell places apart",
            "high" * (now.get("position_share", 0) > HIGH_POSITION),
        ),
        "feature_norm": ("size of a feature", norm, "high" * (now.get("feature_norm", 0) > most_norm)),
    }
    return [
        Sign(name, now[key], before.get(key), expected, beyond)
        for key, (name, expected, beyond) in told.items()
        if key in now
    ]
