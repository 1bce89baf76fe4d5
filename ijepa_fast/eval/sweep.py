"""Linear heads on cached features by minibatch descent: all learning rates and decays of a sweep in one matrix product.

Shapes: n images, D features, S heads of the sweep, C outputs (classes, or 1 of a regression).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from ijepa_fast.eval.linear import HEADS, Candidate, Fit, LinearHead, choose, fit_linear

PROTOCOLS = ("fast", "exact", "paper")  # of fit_head


@dataclass(frozen=True)
class Protocol:
    """How the heads are trained.

    rates, decays: the grid. milestones: shares of the run after which the rate falls to a tenth; empty: cosine to zero.
    reference_batch: rates are for batches of this size and scaled in proportion (None: taken as they are).
    """

    optimizer: str  # "lars" or "adamw"
    rates: tuple[float, ...]
    decays: tuple[float, ...]
    epochs: int
    batch: int
    least_steps: int = 0  # more epochs, for few images
    milestones: tuple[float, ...] = ()
    reference_batch: int | None = None
    momentum: float = 0.9
    trust: float = 0.001


# I-JEPA, appendix A.2, with what VISSL's configuration adds to it: rates are for 256 images and scaled to the batch,
# fall after epochs 15, 30 and 45 of 50, and biases are neither decayed nor scaled by the trust ratio.
PAPER = Protocol("lars", (0.01, 0.05, 0.001), (5e-4, 0.0), 50, 16384, milestones=(0.3, 0.6, 0.9), reference_batch=256)
FAST = Protocol("adamw", (1e-2, 3e-3, 1e-3), (1e-2, 0.0), 30, 1024, least_steps=1000)


class _LARS:
    """Layer-wise adaptive rates (You et al. 2017), momentum SGD on a stack of heads, each with a rate of its own."""

    def __init__(self, parameters: list[torch.Tensor], protocol: Protocol):
        self.protocol = protocol
        self.velocity = [torch.zeros_like(p) for p in parameters]

    def step(
        self,
        parameters: list[torch.Tensor],
        gradients: list[torch.Tensor],
        rates: torch.Tensor,
        decays: torch.Tensor,
    ) -> None:
        for i, (p, g, v) in enumerate(zip(parameters, gradients, self.velocity)):
            if i == 0:  # the weights; biases take the plain rate
                norm, slope = p.flatten(1).norm(dim=1), g.flatten(1).norm(dim=1)
                trust = self.protocol.trust * norm / (slope + decays * norm).clamp_min(1e-12)
                g = (g + decays[:, None, None] * p) * trust[:, None, None]
            v.mul_(self.protocol.momentum).add_(rates[:, None, None] * g)
            p.sub_(v)


class _AdamW:
    def __init__(self, parameters: list[torch.Tensor], protocol: Protocol):
        self.moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in parameters]
        self.count = 0

    def step(
        self,
        parameters: list[torch.Tensor],
        gradients: list[torch.Tensor],
        rates: torch.Tensor,
        decays: torch.Tensor,
        beta1: float = 0.9,
        beta2: float = 0.999,
    ) -> None:
        self.count += 1
        rates = rates[:, None, None]
        for i, (p, g, (m, v)) in enumerate(zip(parameters, gradients, self.moments)):
            if i == 0:
                p.mul_(1 - rates * decays[:, None, None])
            m.lerp_(g, 1 - beta1)
            v.lerp_(g * g, 1 - beta2)
            denominator = (v / (1 - beta2**self.count)).sqrt_().add_(1e-8)
            p.sub_(rates / (1 - beta1**self.count) * m / denominator)


_OPTIMIZERS: dict[str, type[_LARS] | type[_AdamW]] = {"lars": _LARS, "adamw": _AdamW}


def _factor(protocol: Protocol, step: int, steps: int) -> float:
    if protocol.milestones:
        return 0.1 ** sum(step >= share * steps for share in protocol.milestones)
    return 0.5 * (1 + math.cos(math.pi * step / steps))


def train_sweep(
    x: torch.Tensor,
    targets: torch.Tensor,
    outputs: int,
    protocol: Protocol,
    task: str = "classification",
    seed: int = 0,
) -> tuple[list[tuple[float, float]], torch.Tensor, torch.Tensor]:
    """Train every head of the protocol's grid on the same batches.

    x fp32 (n, D) standardised features; targets int64 (n,), or fp32 (n,) standardised too for a regression.
    Returns (grid: list of (rate, decay); weights (S, D, C); biases (S, C)).
    """
    n, width = x.shape
    batch = min(protocol.batch, n)
    grid = [(rate, decay) for rate in protocol.rates for decay in protocol.decays]
    scale = batch / protocol.reference_batch if protocol.reference_batch else 1.0
    rates, decays = torch.tensor(grid, device=x.device).T
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(1, width, outputs, generator=generator).mul_(0.01).to(x.device)
    parameters = [first.repeat(len(grid), 1, 1), torch.zeros(len(grid), 1, outputs, device=x.device)]
    optimizer = _OPTIMIZERS[protocol.optimizer](parameters, protocol)
    per_epoch = n // batch
    steps = max(protocol.epochs * per_epoch, protocol.least_steps)
    for step in range(steps):
        if step % per_epoch == 0:
            order = torch.randperm(n, generator=generator).to(x.device)
        rows = order[step % per_epoch * batch :][:batch]
        xb, tb = x[rows], targets[rows]
        weight, bias = parameters
        scores = torch.baddbmm(bias, xb.expand(len(grid), -1, -1), weight)  # (S, b, C)
        slope = _slope(scores, tb, task) / batch
        gradients = [xb.T @ slope, slope.sum(1, keepdim=True)]
        factor = scale * _factor(protocol, step, steps)
        optimizer.step(parameters, gradients, rates * factor, decays)
    return grid, parameters[0], parameters[1][:, 0]


def _slope(scores: torch.Tensor, targets: torch.Tensor, task: str) -> torch.Tensor:
    """Gradient of the summed loss in the scores (S, b, C): cross-entropy, or half the squared error."""
    if task == "regression":
        return scores - targets[None, :, None]
    slope = scores.softmax(-1)
    slope[:, torch.arange(len(targets)), targets] -= 1
    return slope


def fit_sweep(
    features: torch.Tensor,
    targets: torch.Tensor,
    task: str = "classification",
    heads: Sequence[str] = ("linear", "bn_linear"),
    protocol: Protocol = FAST,
    holdout: float = 0.1,
    seed: int = 0,
    groups: torch.Tensor | None = None,
) -> LinearHead:
    """The best linear head of a protocol's sweep over heads, rates and decays; arguments as in linear.fit_linear.

    Returns a LinearHead fitted on all images; its `rate` says which was chosen.
    """
    regression = task == "regression"
    outputs = 1 if regression else int(targets.max()) + 1
    mean, spread = (targets.float().mean(), targets.float().std()) if regression else (0.0, 1.0)
    y = (targets.float() - mean) / spread if regression else targets.long()

    def sweep(x: torch.Tensor, y: torch.Tensor) -> Iterator[Candidate]:
        grid, weights, biases = train_sweep(x, y, outputs, protocol, task, seed)
        return ((rate, decay, (weight, bias)) for (rate, decay), weight, bias in zip(grid, weights, biases))

    def refit(x: torch.Tensor, rate: float, decay: float, start: Fit) -> Fit:
        chosen = replace(protocol, rates=(rate,), decays=(decay,))
        _, weights, biases = train_sweep(x, y, outputs, chosen, task, seed)
        return weights[0] * spread, biases[0] * spread + mean

    return choose(features, y, task, heads, sweep, refit, holdout, seed, groups)


def fit_head(
    features: torch.Tensor,
    targets: torch.Tensor,
    task: str = "classification",
    protocol: str = "fast",
    heads: Sequence[str] = ("bn_linear",),
    seed: int = 0,
    groups: torch.Tensor | None = None,
) -> LinearHead:
    """The best linear head on features (n, D) for targets (n,), fitted by a protocol.

    protocol: "fast" (the sweep FAST; regressions in closed form), "exact" (linear.fit_linear: to convergence, several
    times slower, and kinder to features of low rank) or "paper" (the sweep PAPER). heads: of linear.HEADS. seed: of the
    held-out images and the first weights. groups: of features that belong together, see linear.split. Raises ValueError
    for another protocol or head.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol: expected one of {PROTOCOLS}, got {protocol!r}")
    if unknown := set(heads) - set(HEADS):
        raise ValueError(f"heads: expected of {HEADS}, got {sorted(unknown)}")
    if protocol == "exact" or (protocol == "fast" and task == "regression"):
        return fit_linear(features, targets, task, heads, seed=seed, groups=groups)
    chosen = PAPER if protocol == "paper" else FAST
    return fit_sweep(features, targets, task, heads, chosen, seed=seed, groups=groups)
