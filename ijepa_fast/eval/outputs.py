"""From labels to what a head is trained on, from its scores to labels again, and how predictions are measured."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
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

    "accuracy" of classes and counts, "r2" of a regression, "mean_absolute_error" of counts and regressions. NaN where
    there is no image, and for R^2 of labels that are all equal.
    """
    predictions, truth = predictions.double(), truth.double()
    metrics = {}
    if task == "regression":
        metrics["r2"] = float(1 - (predictions - truth).square().sum() / _spread(truth).sum())
    else:
        metrics["accuracy"] = float((predictions == truth).double().mean())
    if task != "classification":
        metrics["mean_absolute_error"] = float((predictions - truth).abs().mean())
    return metrics


def _spread(truth: torch.Tensor) -> torch.Tensor:
    """Squared deviations of labels fp64 (n,) from their mean; NaN where they are all equal."""
    found = (truth - truth.mean()).square()
    return found if len(truth) and bool((truth != truth[0]).any()) else torch.full_like(found, torch.nan)


def terms(predictions: torch.Tensor, truth: torch.Tensor, task: str) -> dict[str, np.ndarray]:
    """{metric: fp64 (n,)}: a number for each test image; their mean is what `measure` gives, to rounding.

    Their spread over images is the metric's, so that two encoders are compared by their differences on the same images.
    Accuracy and mean absolute error are means over images. R^2 is a ratio of two; to first order it moves as the mean
    of (1 - R^2) d^2 - e^2 over the mean of d^2, where e is an image's error and d its label less the mean label.
    """
    predictions, truth = predictions.double(), truth.double()
    error = predictions - truth
    found = {}
    if task == "regression":
        deviation = _spread(truth)
        spread = deviation.mean()
        left = error.square().mean() / spread
        found["r2"] = 1 - left + (left * deviation - error.square()) / spread
    else:
        found["accuracy"] = (error == 0).double()
    if task != "classification":
        found["mean_absolute_error"] = error.abs()
    return {name: x.cpu().numpy() for name, x in found.items()}


def errors_of(terms: dict[str, np.ndarray]) -> dict[str, float]:
    """{metric: standard error} of terms (n,): how far another sample of n test images would move their mean.

    NaN of none.
    """
    return {name: float(x.std()) / len(x) ** 0.5 if len(x) else math.nan for name, x in terms.items()}


def of_terms(terms: dict[str, np.ndarray]) -> dict[str, Any]:
    """What a probe measured, by terms alone: {metric: value}, "terms" and "errors"."""
    means = {name: float(x.mean()) if len(x) else math.nan for name, x in terms.items()}
    return means | {"terms": terms, "errors": errors_of(terms)}


def standard_errors(predictions: torch.Tensor, truth: torch.Tensor, task: str) -> dict[str, float]:
    """{metric: standard error} of what `measure` gives.

    Of an accuracy it is that of the share with one right and one wrong answer more, so that no few answers are certain.
    """
    errors = errors_of(terms(predictions, truth, task))
    if "accuracy" in errors and len(truth):
        share = (int((predictions.double() == truth.double()).sum()) + 1) / (len(truth) + 2)
        errors["accuracy"] = (share * (1 - share) / len(truth)) ** 0.5
    return errors
