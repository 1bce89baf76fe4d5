"""The collapse doctor: what the target features of a run say of its health, beside those of its untrained encoder.

Thresholds lie between single runs on CIFAR-10, some half-way only; docs/options.md has them all, and whom they call
wrongly. No run is behind LEAST_RANK: the collapsed ones had a RankMe of 2.3 to 3.4, and were told by the variance.
LiDAR has no threshold: of the untrained encoder's it was .84 to .98 in sound runs, and .81 to .86 in a collapsed one:
the class means of noise lie in all directions. The residual norm has none either: it grew in runs that were left
alone, and fell in collapsed ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from ijepa_fast.eval.rankme import rankme
from ijepa_fast.methods.method import Method

# Below either of these the targets have collapsed.
LEAST_VARIANCE = 0.01
LEAST_RANK = 1.5
# Below either of these a run is on its way there.
LOW_VARIANCE = 0.1
LOW_RANK = 0.45  # of the untrained encoder's
HIGH_POSITION = 0.9  # above it too
LIDAR_EPS = 1e-4  # beside the variances within a class, as a share of their mean
RANK_IMAGES = 512  # that RankMe and LiDAR are of: their cost grows with the cube; at least as many for the others
# Of fewer than these a figure says nothing of the encoder, and is left out.
LEAST_IMAGES = 32  # for a rank
LEAST_A_PLACE = 2  # images, as a mean over the places that were seen, for what tells images apart at a place
LEAST_A_CLASS = 2  # images, as a mean over the classes that were seen, for LiDAR


class Moments:
    """Sums over target features, of which what tells images apart and what their places explain can be had.

    They are of fixed size, (places, width) fp32, whatever the number of images. Nothing waits for the device.
    """

    def __init__(self, places: int, width: int, device: torch.device | str = "cpu"):
        self.images = 0
        self.sums = torch.zeros(places, width, device=device)  # of normalised features at each place
        self.counts = torch.zeros(places, device=device)
        self.squares = torch.zeros((), dtype=torch.float64, device=device)  # of normalised features
        self.outputs = torch.zeros((), dtype=torch.float64, device=device)  # mean squares, an image each

    def add(
        self, features: torch.Tensor, places: torch.Tensor, images: int, output: torch.Tensor | None = None
    ) -> None:
        """Add target features (U, D) of `images` images, whose patches are at `places` (U,) int.

        output: a scalar, the mean square of what the last block put out; None: not measured.
        """
        normalised = F.layer_norm(features.detach().float(), features.shape[1:])
        self.images += images
        self.sums.index_add_(0, places.long(), normalised)
        self.counts.index_add_(0, places.long(), torch.ones_like(places, dtype=torch.float32))
        self.squares += normalised.square().sum()
        self.outputs += torch.nan if output is None else images * output

    def figures(self) -> dict[str, float]:
        """target_variance, position_share, residual_norm, see `examine`; what cannot be told is left out."""
        sums, counts = self.sums.double(), self.counts.double()
        rows, seen, width = float(counts.sum()), int((counts > 0).sum()), sums.shape[1]
        found = {}
        if rows >= LEAST_A_PLACE * seen and rows > 1:
            by_place = float((sums.square().sum(1) / counts.clamp_min(1)).sum())
            between = max(0.0, float(self.squares) - by_place) / width / (rows - seen)
            total = (float(self.squares) - float(sums.sum(0).square().sum()) / rows) / width / (rows - 1)
            found["target_variance"] = between
            # Where all are alike, what is left is rounding.
            found["position_share"] = max(0.0, 1 - between / total) if total > 1e-9 else 1.0
        output = float(self.outputs) / max(1, self.images)
        return found | ({"residual_norm": output**0.5} if math.isfinite(output) else {})


def examine(pooled: torch.Tensor, blocks: Sequence[Moments]) -> dict[str, float]:
    """RankMe of `pooled` (n, D) features, an image each; of the images of `blocks` together:

    target_variance, of features that are normalised as targets are, that between images at a place, of 1: 0 where a
    feature depends on its place alone or on nothing; position_share, of their whole variance, what their places
    explain; residual_norm, the root mean square of the last block's output, before the final LayerNorm.
    What too few images tell is left out: of LEAST_IMAGES a rank, of LEAST_A_PLACE a place the first two. So is
    residual_norm where it was not measured.
    """
    places, width = blocks[0].sums.shape
    whole = Moments(places, width, blocks[0].sums.device)
    for block in blocks:
        whole.images += block.images
        whole.sums += block.sums
        whole.counts += block.counts
        whole.squares += block.squares
        whole.outputs += block.outputs
    rank = {"images": float(len(pooled)), "rankme": rankme(pooled)} if len(pooled) >= LEAST_IMAGES else {}
    return rank | whole.figures()


def lidar(features: torch.Tensor, labels: torch.Tensor) -> float:
    """LiDAR (Thilak et al. 2023): the effective rank of what tells classes apart, whitened by what is within them.

    features (n, D), labels (n,) integers. Between 1 and the classes there are less one. In fp64, in the span of the
    features where n < D: so a width of 1,280 costs no more than one of 512 does.
    """
    x, labels = features.double(), labels.unique(return_inverse=True)[1]
    width = x.shape[1]
    if len(x) < width:
        x = torch.linalg.qr(x.T, mode="r").R.T  # the same inner products
    counts = torch.bincount(labels).double()
    means = x.new_zeros(len(counts), x.shape[1]).index_add_(0, labels, x) / counts[:, None]
    within = x - means[labels]
    scatter = within.T @ within / len(x)
    # Of directions without variance: rounding, not a scale to whiten by.
    floor = (LIDAR_EPS * scatter.trace() / width).clamp_min(1e-30)
    factor = torch.linalg.cholesky(scatter + floor * torch.eye(len(scatter), dtype=x.dtype, device=x.device))
    apart = (means - x.mean(0)) * (counts / len(x)).sqrt()[:, None]
    whitened = torch.linalg.solve_triangular(factor, apart.T, upper=False)
    gram = whitened.T @ whitened if whitened.shape[1] <= len(whitened) else whitened @ whitened.T
    spectrum = torch.linalg.eigvalsh(gram).clamp_min(0)
    p = spectrum / spectrum.sum().clamp_min(torch.finfo(torch.float64).tiny) + 1e-12
    return float((-(p * p.log()).sum()).exp())


@dataclass(frozen=True)
class Means:
    """What a method has that an advice can be about.

    average: an EMA of the encoder. fixed: features are a frozen encoder's, whom training does not change. by_place:
    whether targets are normalised by place; None: the method cannot. patch_std: whether model.patch_std is used.
    """

    average: bool
    fixed: bool
    by_place: bool | None
    patch_std: bool


def means_of(method: Method) -> Means:
    """What `method` has. Options of these names mean the same in every method that has them."""
    norm = getattr(method.options, "target_norm", None)
    by_place = None if norm is None else norm.startswith("position")
    fixed = bool(method.frozen or method.wanted)
    return Means(bool(method.averaged), fixed, by_place, getattr(method.options, "init", None) == "published")


class Advice(NamedTuple):
    """What is wrong, and what to do. kind: collapsed | rank | places | images."""

    kind: str
    words: str


def has_collapsed(now: dict[str, Any]) -> bool:
    """Whether the targets of a reading have collapsed, by what figures it has."""
    return bool(now.get("rankme", LEAST_RANK) < LEAST_RANK or now.get("target_variance", 1) < LEAST_VARIANCE)


def advise(now: dict[str, Any], untrained: dict[str, Any] | None, most: int, means: Means) -> Advice | None:
    """The worst of what is wrong, None where nothing is. most: what RankMe could be. means: what can be changed.

    Of a frozen encoder's features there is nothing to say: training does not change them.
    """
    if means.fixed:
        return None
    before = untrained or {}
    rank, variance, share = now.get("rankme"), now.get("target_variance"), now.get("position_share", 0.0)
    told = ", ".join(
        ([] if rank is None else [f"RankMe {rank:.2f} of {most}"])
        + ([] if variance is None else [f"variance {variance:.4f} of 1"])
    )
    what, whose = ("targets", "target encoder") if means.average else ("features", "encoder")
    average = " or raise optim.ema" * means.average
    if has_collapsed(now):
        return Advice(
            "collapsed",
            f"the {what} have collapsed, all images look almost the same to the {whose} ({told}); go back to "
            f"an earlier checkpoint and lower optim.lr{average}",
        )
    if rank is not None and is_low(now, before):
        return Advice(
            "rank",
            f"the rank of the {what} has fallen to {rank / before['rankme']:.0%} of the untrained encoder's "
            f"({told}; untrained {before['rankme']:.2f}); lower optim.lr{',' if average else ' or'} lengthen "
            f"optim.warmup_epochs{average}; what else there is: docs/options.md",
        )
    low = variance is not None and variance < LOW_VARIANCE <= before.get("target_variance", LOW_VARIANCE)
    if share > HIGH_POSITION or (low and share > 0.5):
        # Targets that are normalised by place have no share of it left.
        return None if means.by_place else Advice("places", _of_places(what, told, share, means))
    if low:
        return Advice(
            "images",
            f"the {what} tell images hardly apart ({told}); lower optim.lr{',' if average else ' or'} lengthen "
            f"optim.warmup_epochs{average}",
        )
    return None


def is_low(now: dict[str, Any], untrained: dict[str, Any]) -> bool:
    """Whether RankMe has fallen far below the untrained encoder's; never of fewer images, which have a lower one."""
    comparable = now.get("images", 0) >= untrained.get("images", 0)
    return bool(comparable and "rankme" in untrained and now["rankme"] < LOW_RANK * untrained["rankme"])


def _of_places(what: str, told: str, share: float, means: Means) -> str:
    new = ["a larger model.patch_std"] * means.patch_std
    new += ["objective.options.target_norm=position"] * (means.by_place is False)
    return (
        f"the {what} tell places apart, not images ({told}; their place explains {share:.0%} of their variance); "
        + (f"begin a run with {' or '.join(new)}" if new else "lower optim.lr or lengthen optim.warmup_epochs")
    )


@dataclass(frozen=True)
class Sign:
    """A figure of the doctor's: now, of the untrained encoder, what is expected, "low" or "high" where it is not."""

    name: str
    now: float
    untrained: float | None
    expected: str
    beyond: str = ""


def signs(now: dict[str, Any], untrained: dict[str, Any] | None) -> list[Sign]:
    """What `examine` and LiDAR found, beside what is expected of it; by the thresholds of `advise`.

    Of a frozen encoder ("fixed") nothing is expected.
    """
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
    low_rank = "rankme" in now and (now["rankme"] < LEAST_RANK or is_low(now, before))
    told = {
        "rankme": ("RankMe", rank, "low" * low_rank),
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
        "residual_norm": ("size of the last block's output", "no threshold", ""),
    }
    fixed = now.get("fixed", False)
    found = [
        Sign(name, now[key], before.get(key), "a frozen encoder's" if fixed else expected, beyond * (not fixed))
        for key, (name, expected, beyond) in told.items()
        if key in now
    ]
    for label, figures in now.items():
        if label != "untrained" and isinstance(figures, dict) and "lidar" in figures:
            first = before.get(label, {}).get("lidar")
            found.append(Sign(f"LiDAR, {label}", figures["lidar"], first, "no threshold"))
    return found
