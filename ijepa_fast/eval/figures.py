"""Figures: what the probes measure of an encoder, as JSON and as the one table that people read."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

METRICS = {
    "mean_iou": "mean IoU",
    "accuracy": "accuracy",
    "calibration_error": "calibration error",
    "r2": "R^2",
    "mean_average_precision": "mean avg. precision",
    "mean_absolute_error": "mean abs. error",
}
ERRORS = ("calibration_error", "mean_absolute_error")  # metrics that are better when they are smaller
NORMAL = 1.96  # standard errors that 95 % of a normal distribution lie within
NOT_KNOWN = "not known"  # a value that is NaN
CLEAR = 2  # standard errors that a difference must exceed to be called one

# Student's t, 97.5 %, for 2 to 10 seeds; 1.96 and a little more for more of them.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


@dataclass(frozen=True)
class Figure:
    """One number that a probe measures on test images.

    Attributes:
        task: name of the label, for example "class".
        probe: what was trained on the features: "linear", "20-NN", "attentive", ...
        metric: a key of METRICS.
        value: the mean over seeds.
        interval: half of the value's 95 % confidence interval, over seeds (Student's t), or over episodes of the same
            test images; None for one seed.
        seeds: the value of each seed.
        chance: the same metric of always answering the training images' commonest class, or their mean; of segmentation
            and depth, theirs at the same place of the image; of retrieval and few-shot, of guessing.
        untrained: the value of the same probe on the encoder before training; None where it is not known.
        n: number of test images.
        chosen: what the sweep of each seed chose on held-out training images; () for a probe without a sweep.
        error: standard error of the value over test images, the mean over seeds; None where it is not known.
        untrained_error: that of `untrained`.
        terms: fp64, a number for each test image (or episode), whose mean is the value and whose spread is its error's;
            encoders are compared by their differences. Not in JSON.
    """

    task: str
    probe: str
    metric: str
    value: float
    interval: float | None
    seeds: tuple[float, ...]
    chance: float
    untrained: float | None
    n: int
    chosen: tuple[dict[str, Any], ...] = ()
    error: float | None = None
    untrained_error: float | None = None
    terms: np.ndarray | None = field(default=None, repr=False, compare=False)

    @property
    def gain(self) -> tuple[float, float] | None:
        """By how much the value is better than the untrained encoder's, and in standard errors of the difference.

        None where either is not known, or NaN, or of fewer than two test images. Both encoders answer the same test
        images, so that the error of their difference is smaller than this, which takes them for independent.
        """
        if self.untrained is None or self.error is None or self.untrained_error is None or self.n < 2:
            return None
        if not all(map(math.isfinite, (self.value, self.untrained, self.error, self.untrained_error))):
            return None
        better = self.value - self.untrained
        if self.metric in ERRORS:
            better = -better
        error = math.hypot(self.error, self.untrained_error)
        return better, better / error if error else math.copysign(math.inf, better) if better else 0.0

    @property
    def half(self) -> float | None:
        """Half of the value's 95 % interval, over test images and, of several seeds, over these; None: not known."""
        if self.error is None or (self.interval is not None and len(self.seeds) == 1):  # over episodes
            return self.interval
        half = math.hypot(NORMAL * self.error, self.interval or 0.0)
        return half if math.isfinite(half) else None

    @property
    def improved(self) -> bool:
        """Whether the value is better than the untrained encoder's by more than chance: `CLEAR` standard errors."""
        return self.gain is not None and self.gain[1] > CLEAR

    @property
    def key(self) -> tuple[str, str, str]:
        """Task, probe and metric."""
        return self.task, self.probe, self.metric

    def to_json(self) -> dict[str, Any]:
        """The figure as a dict that json.dumps takes, without its terms."""
        values = asdict(replace(self, terms=None))
        del values["terms"]
        return values

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Figure:
        """The figure that `to_json` wrote. Raises TypeError where a key is missing or unknown."""
        return cls(**values | {key: tuple(values[key]) for key in ("seeds", "chosen") if key in values})


def interval(values: list[float]) -> tuple[float, float | None]:
    """The mean over seeds, and half of its 95 % confidence interval (Student's t); None for one seed."""
    n, mean = len(values), math.fsum(values) / len(values)
    if n == 1:
        return mean, None
    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1))
    t = _T[n - 2] if n - 2 < len(_T) else 2.262
    return mean, t * deviation / math.sqrt(n)


_MEASURED = ("errors", "terms", "chance", "n", "interval")  # of a run, beside the metrics


def over_seeds(
    task: str, probe: str, runs: list[dict[str, Any]], chance: dict[str, float] | None = None, n: int = 0
) -> list[Figure]:
    """The figures of a probe, one for each metric.

    runs: of each seed, the value of each metric; "errors", {metric: standard error}; where there are such, "terms",
    {metric: (n,)}, and the probe's own "chance", "n" and "interval"; and under other keys what its sweep chose.
    chance, n: of probes that have no own ones.
    """
    chosen = tuple({key: value for key, value in run.items() if key not in (*METRICS, *_MEASURED)} for run in runs)
    figures, first = [], runs[0]
    for metric in (key for key in METRICS if key in first):
        values = [run[metric] for run in runs]
        mean, half = interval(values)
        terms = [run["terms"][metric] for run in runs if "terms" in run]
        figures.append(
            Figure(
                task=task,
                probe=probe,
                metric=metric,
                value=mean,
                interval=first["interval"][metric] if "interval" in first else half,
                seeds=tuple(values),
                chance=(first.get("chance") or chance or {})[metric],
                untrained=None,
                n=first.get("n", n),
                chosen=chosen if any(chosen) else (),
                error=math.fsum(run["errors"][metric] for run in runs) / len(runs),
                terms=np.mean(terms, axis=0) if terms else None,
            )
        )
    return figures


def overview(figures: Iterable[Figure]) -> list[Figure]:
    """The figures without single levels of corruptions, whose means are among them."""
    return [figure for figure in figures if not re.search(r", (?!block)[a-z]+ [1-5]$", figure.probe)]


def against(figures: Iterable[Figure], before: Iterable[Figure]) -> list[Figure]:
    """`figures` with the values of the same probes in `before`, those of the untrained encoder."""
    known = {f.key: (f.value, f.error) for f in before}
    pairs = [(f, known.get(f.key, (None, None))) for f in figures]
    return [replace(f, untrained=value, untrained_error=error) for f, (value, error) in pairs]


def figures_of(results: dict[str, Any]) -> list[Figure]:
    """The figures of a JSON file: a run's summary, or what the probe command wrote. Raises ValueError for others."""
    try:
        return [Figure.from_json(values) for values in results["figures"]]
    except (KeyError, TypeError) as error:
        raise ValueError(f"figures: not those of this version of ijepa_fast: {error}") from None


def headline(figures: Iterable[Figure]) -> list[Figure]:
    """What to look at first: the accuracy or R^2 of each task and probe, and of k-NN one k, 20 where there is that."""
    return [f for f in of_one_k(overview(figures)) if f.metric not in ERRORS]


def of_one_k(figures: list[Figure]) -> list[Figure]:
    """The figures with those of k-NN for one k alone, 20 where there is that."""
    neighbours = [f.probe for f in figures if f.probe.endswith("-NN")]
    shown = "20-NN" if "20-NN" in neighbours else next(iter(neighbours), None)
    return [f for f in figures if f.probe == shown or f.probe not in neighbours]


def cells(figures: list[Figure]) -> tuple[list[str], list[list[str]]]:
    """The head and the rows of a table with a row per figure, as text."""
    before = any(f.untrained is not None for f in figures)
    named = ["untrained", "trained"] if before else ["value"]
    head = ["task", "probe", "metric", "chance", *named, "s.e.", "images"]
    rows = []
    for f in figures:
        untrained = [number(f.untrained)] if before else []
        value = number(f.value) + ("" if f.interval is None else f" +- {number(f.interval)}")
        words, error = [f.task, f.probe, METRICS[f.metric]], number(f.error)
        rows.append([*words, number(f.chance), *untrained, value, error, f"{f.n:,}"])
    return head, rows


def verdict(figures: Iterable[Figure], better: str = "learned", worse: str = "lost", same: str = "no change") -> str:
    """One sentence: which labels an encoder tells better than before training, by how much, and which not.

    Of each label the linear probe speaks, or the first there is; "" where no figure has an untrained one beside it.
    better, worse, same: its words, for figures `against` those of another encoder.
    """
    of: dict[str, Figure] = {}
    for f in headline(figures):
        if f.gain is not None and (f.task not in of or (f.probe == "linear" and of[f.task].probe != "linear")):
            of[f.task] = f
    told = {better: [f for f in of.values() if f.improved]}
    told[worse] = [f for f in of.values() if f.gain and f.gain[1] < -CLEAR]
    parts = [f"{word}: {', '.join(map(_change, clear))}" for word, clear in told.items() if clear]
    if rest := [task for task, f in of.items() if f not in told[better] + told[worse]]:
        parts.append(f"{same} beyond {CLEAR} standard errors: {', '.join(rest)}")
    return "; ".join(parts)


def _change(f: Figure) -> str:
    """A label and how it changed."""
    unit = "" if f.metric == "accuracy" else f"{METRICS[f.metric]} "
    return f"{f.task} {unit}{change(f)}"


def change(f: Figure) -> str:
    """By how much a figure is better than the untrained encoder's, with standard errors where they are known; or ""."""
    if f.untrained is None:
        return ""
    if not math.isfinite(f.value - f.untrained):
        return NOT_KNOWN
    better = f.gain[0] if f.gain else f.value - f.untrained
    size = f"{100 * better:+.1f} points" if f.metric == "accuracy" else f"{better:+.2f}"
    return size + (f" ({abs(f.gain[1]):.1f} s.e.)" if f.gain and math.isfinite(f.gain[1]) else "")


def table(figures: list[Figure]) -> str:
    """The figures as lines of text in columns."""
    return columns(*cells(figures))


def columns(head: list[str], rows: list[list[str]]) -> str:
    """A table as lines of text; the first three columns, which are words, start at the left."""
    widths = [max(map(len, column)) for column in zip(head, *rows)]
    return "\n".join(
        "  ".join(cell.ljust(width) if i < 3 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths)))
        for row in (head, *rows)
    )


def number(value: float | None) -> str:
    """A value as the tables write it; None, which is of what was not measured, is empty."""
    return "" if value is None else f"{value:.4f}" if math.isfinite(value) else NOT_KNOWN
