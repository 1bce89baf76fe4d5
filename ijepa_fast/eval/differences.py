"""Differences between encoders that were evaluated on the same images, with intervals."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ijepa_fast.eval.figures import CLEAR, ERRORS, NORMAL, Figure


@dataclass(frozen=True)
class Difference:
    """How much the figure of an encoder is above that of another, `against`.

    task, probe, metric: of both figures. value: the difference. error: its standard error over test images, of their
    differences image by image where `paired`, else that of two independent sets. It does not hold what another seed of
    the heads or of the training would change.
    """

    task: str
    probe: str
    metric: str
    encoder: str
    against: str
    value: float
    error: float
    paired: bool

    @property
    def key(self) -> tuple[str, str, str]:
        """Task, probe and metric."""
        return self.task, self.probe, self.metric

    @property
    def interval(self) -> float:
        """Half of its 95 % confidence interval."""
        return NORMAL * self.error

    @property
    def clear(self) -> bool:
        """Whether it is not 0 by more than chance: `CLEAR` standard errors."""
        return abs(self.value) > CLEAR * self.error

    @property
    def better(self) -> bool:
        """Whether the encoder is clearly the better one."""
        return self.clear and (self.value < 0) == (self.metric in ERRORS)

    def __str__(self) -> str:
        return f"{self.value:+.4f} ±{self.interval:.4f}{'*' if self.clear else ' '}"

    def to_json(self) -> dict[str, Any]:
        """The difference and half of its interval, as a dict that json.dumps takes."""
        return asdict(self) | {"interval": self.interval}


def difference(name: str, figure: Figure, against: str, other: Figure) -> Difference | None:
    """`figure` less `other`, of the same task, probe and metric; None where an error is not known.

    Figures that have terms are paired where they have equally many: `evaluate` draws the same test images, and
    episodes, for every encoder.
    """
    a, b = figure.terms, other.terms
    if paired := a is not None and b is not None and len(a) == len(b):
        error = paired_error(a, b, figure.metric)
    elif figure.error is None or other.error is None:
        return None
    else:
        error = math.hypot(figure.error, other.error)
    value = figure.value - other.value
    if not (math.isfinite(value) and math.isfinite(error)):
        return None
    return Difference(*figure.key, name, against, value, error, paired)


def paired_error(a: np.ndarray, b: np.ndarray, metric: str) -> float:
    """Standard error of the mean of a - b, terms (n,) of the same images; NaN of fewer than two.

    Of right and wrong answers it is that of two images more, of which each encoder alone answers one, so that no few
    answers are certain (as outputs.standard_errors has it of one accuracy).
    """
    if metric == "accuracy" and len(a) and np.isin((a, b), (0.0, 1.0)).all():
        more = np.append(a - b, (1.0, -1.0))
        return float(more.std()) / len(a) ** 0.5
    return float((a - b).std()) / len(a) ** 0.5 if len(a) > 1 else math.nan


def differences(figures: dict[str, list[Figure]]) -> list[Difference]:
    """The differences of every encoder from the first, of every figure that both have; {encoder: figures}."""
    (first, known), *others = figures.items()
    of_first = {f.key: f for f in known}
    pairs = [(name, f) for name, of_one in others for f in of_one if f.key in of_first]
    found = [difference(name, f, first, of_first[f.key]) for name, f in pairs]
    return [one for one in found if one is not None]
