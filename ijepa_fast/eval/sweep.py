"""Linear heads on cached features by minibatch descent: all learning rates and decays of a sweep in one matrix product.

Shapes: n images, D features, S heads of the sweep, C outputs (classes, or 1 of a regression).
"""

import math
from dataclasses import dataclass, replace

import torch

from ijepa_fast.eval.features import Standardiser
from ijepa_fast.eval.linear import LinearHead, score_heads, split


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

    def __init__(self, parameters, protocol):
        self.protocol = protocol
        self.velocity = [torch.zeros_like(p) for p in parameters]

    def step(self, parameters, gradients, rates, decays):
        for i, (p, g, v) in enumerate(zip(parameters, gradients, self.velocity)):
            if i == 0:  # the weights; biases take the plain rate
                norm, slope = p.flatten(1).norm(dim=1), g.flatten(1).norm(dim=1)
                trust = self.protocol.trust * norm / (slope + decays * norm).clamp_min(1e-12)
                g = (g + decays[:, None, None] * p) * trust[:, None, None]
            v.mul_(self.protocol.momentum).add_(rates[:, None, None] * g)
            p.sub_(v)


class _AdamW:
    def __init__(self, parameters, protocol):
        self.moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in parameters]
        self.count = 0

    def step(self, parameters, gradients, rates, decays, beta1=0.9, beta2=0.999):
        self.count += 1
        rates = rates[:, None, None]
        for i, (p, g, (m, v)) in enumerate(zip(parameters, gradients, self.moments)):
            if i == 0:
                p.mul_(1 - rates * decays[:, None, None])
            m.lerp_(g, 1 - beta1)
            v.lerp_(g * g, 1 - beta2)
            denominator = (v / (1 - beta2**self.count)).sqrt_().add_(1e-8)
            p.sub_(rates / (1 - beta1**self.count) * m / denominator)


_OPTIMIZERS = {"lars": _LARS, "adamw": _AdamW}


def _factor(protocol, step, steps):
    if protocol.milestones:
        return 0.1 ** sum(step >= share * steps for share in protocol.milestones)
    return 0.5 * (1 + math.cos(math.pi * step / steps))


def train_sweep(x, targets, outputs, protocol, task="classification", seed=0):
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


def _slope(scores, targets, task):
    """Gradient of the summed loss in the scores (S, b, C): cross-entropy, or half the squared error."""
    if task == "regression":
        return scores - targets[None, :, None]
    slope = scores.softmax(-1)
    slope[:, torch.arange(len(targets)), targets] -= 1
    return slope


def fit_sweep(
    features, targets, task="classification", heads=("linear", "bn_linear"), protocol=FAST, holdout=0.1, seed=0
):
    """The best linear head of a protocol's sweep over heads, rates and decays; arguments as in linear.fit_linear.

    Head, rate and decay are chosen on the held-out share and trained again on all images. Returns a LinearHead, whose
    `rate` says which was chosen.
    """
    n = len(features)
    outputs = 1 if task == "regression" else int(targets.max()) + 1
    kept, held = split(n, holdout, seed, features.device)
    best = None
    mean, spread = (targets.float().mean(), targets.float().std()) if task == "regression" else (0.0, 1.0)
    y = (targets.float() - mean) / spread if task == "regression" else targets.long()
    for head in heads:
        x = Standardiser(features[kept], per_feature=head == "bn_linear")(features)
        grid, weights, biases = train_sweep(x[kept], y[kept], outputs, protocol, task, seed)
        for (rate, decay), weight, bias in zip(grid, weights, biases):
            score = score_heads(x[held] @ weight + bias, y[held], task)
            if best is None or score > best[0]:
                best = (score, head, rate, decay)
    held_out, head, rate, decay = best
    standardise = Standardiser(features, per_feature=head == "bn_linear")
    chosen = replace(protocol, rates=(rate,), decays=(decay,))
    _, weights, biases = train_sweep(standardise(features), y, outputs, chosen, task, seed)
    return LinearHead(standardise, weights[0] * spread, biases[0] * spread + mean, head, decay, held_out, rate)
