"""From labels to what a head is trained on, from its scores to labels again, and how predictions are measured."""

from __future__ import annotations

import torch
import torch.nn.functional as F


class Outputs:
    """The outputs of a head for one task.

    task: "classification", "counting" (classes that are numbers) or "regression".
    labels (n,): of the training images. targets: int64 (n,) from 0 to `count` - 1, or fp32 (n,) of a regression, whose
    `count` is 1. classes: the label of each target, None of a regression.
    """

    def __init__(self, task: str, labels: torch.Tensor):
        self.task, self.labels = task, labels
        self.classes: torch.Tensor | None = None
        if task == "regression":
            self.count, self.targets = 1, labels.float()
        else:
            self.classes, self.targets = labels.unique(return_inverse=True)
            self.count = len(self.classes)

    @property
    def votes(self) -> torch.Tensor:
        """What neighbours vote with, fp32 (n, count)."""
        return self.targets[:, None] if self.classes is None else F.one_hot(self.targets, self.count).float()

    def decode(self, scores: torch.Tensor) -> torch.Tensor:
        """scores (m, count) -> labels (m,)."""
        return scores[:, 0] if self.classes is None else self.classes[scores.argmax(1)]

    def chance(self, truth: torch.Tensor) -> dict[str, float]:
        """The metrics against `truth` (m,) of one answer for all: the commonest class, or the mean."""
        answer = self.targets.mean() if self.classes is None else self.classes[self.targets.bincount().argmax()]
        return measure(answer.expand(len(truth)), truth, self.task)


def measure(predictions: torch.Tensor, truth: torch.Tensor, task: str) -> dict[str, float]:
    """{metric: value} of predictions (n,) against the labels (n,).

    "accuracy" of classes and counts, "r2" of a regression, "mean_absolute_error" of counts and regressions.
    """
    predictions, truth = predictions.double(), truth.double()
    metrics = {}
    if task == "regression":
        spread = (truth - truth.mean()).square().sum()
        metrics["r2"] = float(1 - (predictions - truth).square().sum() / spread.clamp_min(1e-12))
    else:
        metrics["accuracy"] = float((predictions == truth).double().mean())
    if task != "classification":
        metrics["mean_absolute_error"] = float((predictions - truth).abs().mean())
    return metrics


def standard_errors(predictions: torch.Tensor, truth: torch.Tensor, task: str) -> dict[str, float]:
    """{metric: standard error} of what `measure` gives: how far another sample of n test images would move it.

    Of an accuracy it is that of the share with one right and one wrong answer more, so that no few answers are certain.
    A mean absolute error is a mean over images. R^2 is a ratio of two; to first order it moves as the mean of
    (1 - R^2) d^2 - e^2 over the mean of d^2, where e is an image's error and d its label less the mean label.
    """
    predictions, truth = predictions.double(), truth.double()
    error = predictions - truth
    terms = {}
    if task == "regression":
        deviation = (truth - truth.mean()).square()
        spread = deviation.mean().clamp_min(1e-12)
        terms["r2"] = (error.square().mean() / spread * deviation - error.square()) / spread
    if task != "classification":
        terms["mean_absolute_error"] = error.abs()
    errors = {name: float(x.std(correction=0)) / len(x) ** 0.5 for name, x in terms.items()}
    if task != "regression":
        share = (int((error == 0).sum()) + 1) / (len(error) + 2)
        errors["accuracy"] = (share * (1 - share) / len(error)) ** 0.5
    return errors
