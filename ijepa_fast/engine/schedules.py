"""Learning rate, weight decay and EMA momentum as functions of the step, as in the published I-JEPA code.

`step` counts from 0: the value returned is the one in force during that step. The published code advances its learning
rate and weight decay before the first step, so these are taken at step + 1; its EMA momentum is not advanced.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """The three schedules of a run.

    Args:
        steps_per_epoch, epochs, warmup_epochs: warmup_epochs may be a fraction.
        horizon: stretches the decay beyond the epochs trained ("ipe_scale" in the published code).
        start_lr, lr, final_lr: linear warm-up from the first to the second, cosine decay to the third.
        weight_decay, final_weight_decay: cosine (published code) or linear (paper) by `weight_decay_shape`.
        momentum, final_momentum: of the EMA; linear (published code) or cosine (DINO, iBOT) by `momentum_shape`.
    """

    steps_per_epoch: int
    epochs: int
    warmup_epochs: float
    horizon: float = 1.0
    start_lr: float = 2e-4
    lr: float = 1e-3
    final_lr: float = 1e-6
    weight_decay: float = 0.04
    final_weight_decay: float = 0.4
    weight_decay_shape: str = "cosine"
    momentum: float = 0.996
    final_momentum: float = 1.0
    momentum_shape: str = "linear"

    @property
    def steps(self) -> int:
        """Steps over which the decays run (horizon included)."""
        return int(self.horizon * self.epochs * self.steps_per_epoch)

    def at(self, step: int) -> tuple[float, float, float]:
        """(learning rate, weight decay, EMA momentum) of `step`."""
        return self.learning_rate(step), self.decay(step), self.ema_momentum(step)

    def learning_rate(self, step: int) -> float:
        """Learning rate during `step`."""
        step, warmup = step + 1, int(self.warmup_epochs * self.steps_per_epoch)
        if step < warmup:
            return self.start_lr + step / max(1, warmup) * (self.lr - self.start_lr)
        progress = (step - warmup) / max(1, self.steps - warmup)
        return max(self.final_lr, _cosine(self.lr, self.final_lr, progress))

    def decay(self, step: int) -> float:
        """Weight decay during `step`."""
        progress = (step + 1) / self.steps
        if self.weight_decay_shape == "linear":
            progress = min(1.0, progress)
            return self.weight_decay + progress * (self.final_weight_decay - self.weight_decay)
        value = _cosine(self.weight_decay, self.final_weight_decay, progress)
        bound = min if self.final_weight_decay > self.weight_decay else max
        return bound(self.final_weight_decay, value)

    def ema_momentum(self, step: int) -> float:
        """Momentum of the EMA update that ends `step`."""
        progress = step / (self.steps_per_epoch * self.epochs * self.horizon)
        if self.momentum_shape == "cosine":
            return _cosine(self.momentum, self.final_momentum, progress)
        return self.momentum + progress * (self.final_momentum - self.momentum)


def _cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * progress))
