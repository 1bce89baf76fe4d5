"""Learning rate, weight decay and EMA momentum as functions of the step, as in the published I-JEPA code.

`step` counts from 0: the value returned is the one in force during that step. The published code advances its learning
rate and weight decay before the first step, so these are taken at step + 1; its EMA momentum is not advanced.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ijepa_fast.config import Optim


@dataclass(frozen=True)
class Schedule:
    """The three schedules of a run.

    Args:
        optim: the section `optim`. The learning rate rises linearly from start_lr to lr over warmup_epochs, which may
            be a fraction, and falls as a cosine to final_lr; with drop_epochs it stays, but for a fall to a tenth at
            each of these. Weight decay goes to final_weight_decay as a cosine
            (published code) or linearly (paper), the EMA's momentum to final_ema linearly (published code) or as a
            cosine (DINO, iBOT). `horizon` stretches all of it beyond the epochs trained ("ipe_scale" in the published
            code).
        steps_per_epoch: optimiser steps.
    """

    optim: Optim
    steps_per_epoch: int

    @property
    def steps(self) -> int:
        """Steps over which the decays run (horizon included)."""
        return int(self.optim.horizon * self.optim.epochs * self.steps_per_epoch)

    def at(self, step: int) -> tuple[float, float, float]:
        """(learning rate, weight decay, EMA momentum) of `step`."""
        return self.learning_rate(step), self.decay(step), self.ema_momentum(step)

    def learning_rate(self, step: int) -> float:
        """Learning rate during `step`."""
        step, warmup = step + 1, int(self.optim.warmup_epochs * self.steps_per_epoch)
        if step < warmup:
            return self.optim.start_lr + step / max(1, warmup) * (self.optim.lr - self.optim.start_lr)
        if self.optim.drop_epochs:
            fallen = sum(step > int(epoch * self.steps_per_epoch) for epoch in self.optim.drop_epochs)
            return self.optim.lr * 0.1**fallen
        progress = (step - warmup) / max(1, self.steps - warmup)
        return max(self.optim.final_lr, _cosine(self.optim.lr, self.optim.final_lr, progress))

    def decay(self, step: int) -> float:
        """Weight decay during `step`."""
        progress = (step + 1) / self.steps
        if self.optim.weight_decay_shape == "linear":
            return self.optim.weight_decay + min(1.0, progress) * (
                self.optim.final_weight_decay - self.optim.weight_decay
            )
        value = _cosine(self.optim.weight_decay, self.optim.final_weight_decay, progress)
        bound = min if self.optim.final_weight_decay > self.optim.weight_decay else max
        return bound(self.optim.final_weight_decay, value)

    def ema_momentum(self, step: int) -> float:
        """Momentum of the EMA update that ends `step`."""
        progress = min(1.0, step / (self.steps_per_epoch * self.optim.epochs * self.optim.horizon))
        if self.optim.ema_shape == "cosine":
            return _cosine(self.optim.ema, self.optim.final_ema, progress)
        return self.optim.ema + progress * (self.optim.final_ema - self.optim.ema)


def _cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
