"""Linear heads on cached features, fitted to convergence: the "exact" protocol, for data that fit into memory.

Logistic regression by full-batch L-BFGS for classes and counts, ridge regression in closed form for numbers. There is
no learning rate to sweep; weight decays are swept along one warm-started path (L-BFGS) or from one eigendecomposition
(ridge). Head and decay are chosen on a held-out tenth of the training images, then refitted on all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from ijepa_fast.eval.features import Standardiser

# Penalty decay/2 * |W|^2 beside the mean loss; scikit-learn's C is 1 / (decay * n).
DECAYS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
HEADS = ("linear", "bn_linear")

Fit = tuple[torch.Tensor, torch.Tensor]  # weight (D, C) and bias (C,)
Candidate = tuple[Any, float, Fit]  # learning rate (None of a fit to convergence), decay, fit


@dataclass
class LinearHead:
    """scores = standardise(features) @ weight + bias: logits (n, C), or predictions (n, 1) of a regression."""

    standardise: Standardiser
    weight: torch.Tensor  # (D, C)
    bias: torch.Tensor  # (C,)
    head: str
    decay: float
    held_out: float  # score_heads on the held-out images, by which it was chosen
    rate: float | None = None

    @property
    def chosen(self) -> dict[str, Any]:
        """What the sweep chose, ready for JSON."""
        return {"head": self.head, "decay": self.decay, "rate": self.rate, "held_out": self.held_out}

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        """features (n, D) -> scores (n, C)."""
        return self.standardise(features) @ self.weight + self.bias


def fit_logistic(
    x: torch.Tensor,
    labels: torch.Tensor,
    classes: int,
    decay: float,
    start: Fit | None = None,
    iterations: int = 200,
    tolerance: float = 1e-6,
) -> Fit:
    """Weights (D, C) and bias (C,) minimising mean cross-entropy + decay/2 * |weight|^2.

    x fp32 (n, D), labels int64 (n,). start: (weight, bias) of an earlier fit to begin from.
    """
    weight, bias = start or (x.new_zeros(x.shape[1], classes), x.new_zeros(classes))
    weight, bias = weight.clone().requires_grad_(), bias.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=iterations,
        tolerance_grad=tolerance,
        tolerance_change=1e-3 * tolerance,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(torch.addmm(bias, x, weight), labels) + 0.5 * decay * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return weight.detach(), bias.detach()


def fit_ridge(x: torch.Tensor, targets: torch.Tensor, decays: Sequence[float]) -> list[Fit]:
    """Weights (D, T) and bias (T,) minimising mean squared error / 2 + decay/2 * |weight|^2, for each decay.

    x fp32 (n, D), targets (n, T). One eigendecomposition, in fp64, serves all decays.
    """
    x, targets = x.double(), targets.double()
    x_mean, mean = x.mean(0), targets.mean(0)
    centred = x - x_mean
    eigenvalues, vectors = torch.linalg.eigh(centred.T @ centred / len(x))
    projected = vectors.T @ (centred.T @ (targets - mean)) / len(x)
    fits = []
    for decay in decays:
        weight = vectors @ (projected / (eigenvalues.clamp_min(0) + decay)[:, None])
        fits.append((weight.float(), (mean - x_mean @ weight).float()))
    return fits


def _path(
    x: torch.Tensor, targets: torch.Tensor, classes: int | None, decays: Sequence[float]
) -> Iterator[tuple[float, Fit]]:
    """(decay, its fit) along the path of decays, largest first."""
    decays = sorted(decays, reverse=True)
    if classes is None:
        yield from zip(decays, fit_ridge(x, targets[:, None], decays))
        return
    fit = None
    for decay in decays:
        fit = fit_logistic(x, targets, classes, decay, fit)
        yield decay, fit


def score_heads(scores: torch.Tensor, targets: torch.Tensor, task: str) -> float:
    """What a sweep is chosen by: accuracy, or minus the squared error. scores (n, C), targets (n,)."""
    if task == "regression":
        return -float(F.mse_loss(scores[:, 0], targets))
    return float((scores.argmax(1) == targets).float().mean())


def split(
    n: int, holdout: float, seed: int, device: torch.device | str = "cpu", groups: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices of the images that fit and of those, a share `holdout`, that choose; drawn by `seed`.

    groups int64 (n,): what belongs together, such as patches of an image, is on one side.
    """
    if groups is not None:
        members = groups.unique(return_inverse=True)[1]
        parts = split(int(members.max()) + 1, holdout, seed, device)
        kept, held = (torch.isin(members, part).nonzero()[:, 0] for part in parts)
        return kept, held
    if n < 2:
        raise ValueError(f"features: expected at least two images to fit a head, got {n}")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).to(device)
    count = max(1, int(n * holdout))
    return order[count:], order[:count]


def choose(
    features: torch.Tensor,
    targets: torch.Tensor,
    task: str,
    heads: Sequence[str],
    sweep: Callable[[torch.Tensor, torch.Tensor], Iterator[Candidate]],
    refit: Callable[[torch.Tensor, Any, float, Fit], Fit],
    holdout: float,
    seed: int,
    groups: torch.Tensor | None = None,
) -> LinearHead:
    """The best linear head of a sweep, fitted again on all images.

    features fp32 (n, D), targets (n,). heads: of HEADS, "linear" (features centred and divided by one number) and
    "bn_linear" (each feature standardised). holdout: share of the images, drawn by `seed`, that chooses. groups: see
    split.
    sweep(x, targets) yields (rate, decay, fit) for standardised features of the other images;
    refit(x, rate, decay, fit) is the fit of what was chosen to all images.
    """
    if len(features) != len(targets):
        raise ValueError(f"targets: expected one for each of {len(features)} images, got {len(targets)}")
    kept, held = split(len(features), holdout, seed, features.device, groups)
    best: tuple[str, Candidate] | None = None
    held_out = -math.inf
    for head in heads:
        x = Standardiser(features[kept], per_feature=head == "bn_linear")(features)
        for candidate in sweep(x[kept], targets[kept]):
            weight, bias = candidate[-1]
            score = score_heads(x[held] @ weight + bias, targets[held], task)
            if best is None or score > held_out:
                held_out, best = score, (head, candidate)
    if best is None:
        raise ValueError(f"heads: expected some of {HEADS}, got none")
    head, (rate, decay, fit) = best
    standardise = Standardiser(features, per_feature=head == "bn_linear")
    return LinearHead(standardise, *refit(standardise(features), rate, decay, fit), head, decay, held_out, rate)


def fit_linear(
    features: torch.Tensor,
    targets: torch.Tensor,
    task: str = "classification",
    heads: Sequence[str] = ("bn_linear",),
    decays: Sequence[float] = DECAYS,
    holdout: float = 0.1,
    seed: int = 0,
    groups: torch.Tensor | None = None,
) -> LinearHead:
    """The best linear head of a sweep over heads and decays, each fitted to convergence.

    features fp32 (n, D). targets: int64 (n,) classes from 0, or fp32 (n,) for task "regression". heads, holdout, seed,
    groups: see choose. Returns a LinearHead fitted on all images.
    """
    targets = targets.float() if task == "regression" else targets.long()
    classes = None if task == "regression" else int(targets.max()) + 1

    def sweep(x: torch.Tensor, y: torch.Tensor) -> Iterator[Candidate]:
        return ((None, decay, fit) for decay, fit in _path(x, y, classes, decays))

    def refit(x: torch.Tensor, rate: None, decay: float, start: Fit) -> Fit:
        if classes is None:
            return fit_ridge(x, targets[:, None], [decay])[0]
        return fit_logistic(x, targets, classes, decay, start)

    return choose(features, targets, task, heads, sweep, refit, holdout, seed, groups)
