"""Linear heads on cached features, fitted to convergence: the fast protocol for data that fit into memory.

Logistic regression by full-batch L-BFGS for classes and counts, ridge regression in closed form for numbers. There is
no learning rate to sweep; weight decays are swept along one warm-started path (L-BFGS) or from one eigendecomposition
(ridge). Head and decay are chosen on a held-out tenth of the training images, then refitted on all.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ijepa_fast.eval.features import Standardiser

# Penalty decay/2 * |W|^2 beside the mean loss; scikit-learn's C is 1 / (decay * n).
DECAYS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
HEADS = ("linear", "bn_linear")


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
    def chosen(self):
        """What the sweep chose, ready for JSON."""
        return {"head": self.head, "decay": self.decay, "rate": self.rate, "held_out": self.held_out}

    def __call__(self, features):
        """features (n, D) -> scores (n, C)."""
        return self.standardise(features) @ self.weight + self.bias


def fit_logistic(x, labels, classes, decay, start=None, iterations=200, tolerance=1e-6):
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

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(torch.addmm(bias, x, weight), labels) + 0.5 * decay * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return weight.detach(), bias.detach()


def fit_ridge(x, targets, decays):
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


def _path(x, targets, task, classes, decays):
    """(decay, (weight, bias)) along the path of decays, largest first."""
    decays = sorted(decays, reverse=True)
    if task == "regression":
        yield from zip(decays, fit_ridge(x, targets[:, None], decays))
        return
    fit = None
    for decay in decays:
        fit = fit_logistic(x, targets, classes, decay, fit)
        yield decay, fit


def _refit(x, targets, task, classes, decay, start):
    if task == "regression":
        return fit_ridge(x, targets[:, None], [decay])[0]
    return fit_logistic(x, targets, classes, decay, start)


def score_heads(scores, targets, task):
    """What a sweep is chosen by: accuracy, or minus the squared error. scores (n, C), targets (n,)."""
    if task == "regression":
        return -float(F.mse_loss(scores[:, 0], targets))
    return float((scores.argmax(1) == targets).float().mean())


def split(n, holdout, seed, device="cpu"):
    """Indices of the images that fit and of those, a share `holdout`, that choose; drawn by `seed`."""
    if n < 2:
        raise ValueError(f"features: expected at least two images to fit a head, got {n}")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).to(device)
    held = max(1, int(n * holdout))
    return order[held:], order[:held]


def fit_linear(features, targets, task="classification", heads=("bn_linear",), decays=DECAYS, holdout=0.1, seed=0):
    """The best linear head of a sweep over heads and decays.

    features fp32 (n, D). targets: int64 (n,) classes from 0, or fp32 (n,) for task "regression".
    heads: of "linear" (features centred and divided by one number) and "bn_linear" (each feature standardised).
    holdout: share of the images, drawn by `seed`, that chooses head and decay.
    Returns a LinearHead fitted on all images.
    """
    if len(features) != len(targets):
        raise ValueError(f"targets: expected one for each of {len(features)} images, got {len(targets)}")
    targets = targets.float() if task == "regression" else targets.long()
    classes = None if task == "regression" else int(targets.max()) + 1
    kept, held = split(len(features), holdout, seed, features.device)
    best = None
    for head in heads:
        x = Standardiser(features[kept], per_feature=head == "bn_linear")(features)
        for decay, (weight, bias) in _path(x[kept], targets[kept], task, classes, decays):
            score = score_heads(x[held] @ weight + bias, targets[held], task)
            if best is None or score > best[0]:
                best = (score, head, decay, (weight, bias))
    held_out, head, decay, start = best
    standardise = Standardiser(features, per_feature=head == "bn_linear")
    weight, bias = _refit(standardise(features), targets, task, classes, decay, start)
    return LinearHead(standardise, weight, bias, head, decay, held_out)
