"""Parts of the page that one run and several share: curves, probes, health. A list of one run is one run's page."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from ijepa_fast.data.kinds import printable
from ijepa_fast.eval.collapse import HIGH_POSITION, LEAST_RANK, LOW_RANK, LOW_VARIANCE, Sign, signs
from ijepa_fast.eval.figures import CLEAR, METRICS, NORMAL, Figure, against, change, headline, number, verdict
from ijepa_fast.report.charts import COLOURS, dots, line_chart
from ijepa_fast.report.page import Markup, table, text
from ijepa_fast.report.recorded import Recorded, Series
from ijepa_fast.report.summary import SEEN, UNKNOWN

# Of the online probe; feature_norm is in logs of earlier versions.
HEALTH = ("rankme", "target_variance", "position_share", "residual_norm", "feature_norm", "lidar")
TITLES = {
    "accuracy": "Accuracy",
    "r2": "R²",
    "rankme": "RankMe",
    "lidar": "LiDAR",
    "mean_absolute_error": "Mean absolute error",
    "target_variance": "Variance between images",
    "position_share": "Share explained by place",
    "residual_norm": "Size of the last block's output",
    "feature_norm": "Size of a feature",
}
EMA = "Momentum of the EMA"  # under "momentum" in logs of earlier versions
SCHEDULES = {"lr": "Learning rate", "weight_decay": "Weight decay", "ema": EMA, "momentum": EMA}
Column = tuple[Sequence[float], Sequence[float]]


def labels(runs: Sequence[Recorded]) -> list[str]:
    """A name for each run that no other has: the run's, or else its folder's."""
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        names = [str(run.folder) for run in runs]
    return [f"{name} ({number})" if names.count(name) > 1 else name for number, name in enumerate(names, 1)]


def coloured(name: str, number: int) -> Markup:
    """A run's name beside the colour of its lines."""
    return Markup(f'<span class="run s{number % COLOURS}">{html.escape(name)}</span>')


def axis(runs: Sequence[Recorded]) -> str:
    """What curves are drawn over: steps, or images seen where runs with other batch sizes are compared."""
    known = all("images" in record for run in runs for record in run.training)
    return "images" if known and len({run.flat.get("batch_size") for run in runs}) > 1 else "step"


def said_of(
    figures: Iterable[Figure], better: str = "learned", worse: str = "lost", same: str = "no change"
) -> tuple[str, str]:
    """The verdict on figures, and its class on the page: "learned", "lost", or "" where it is neither or both."""
    said = verdict(figures, better, worse, same)
    up, down = (any(part.startswith(f"{word}:") for part in said.split("; ")) for word in (better, worse))
    return said, "" if up == down else "learned" if up else "lost"


def training(runs: Sequence[Recorded]) -> str:
    """Curves of the loss, its terms and the schedules."""
    x = axis(runs)
    loss = [run.column("loss", x) for run in runs]
    drawn = dict(zip(labels(runs), loss)) if len(runs) > 1 else {"loss": loss[0]}
    log = all(value > 0 for _, values in loss for value in values)
    charts = [line_chart("Loss", drawn, wide=True, log=log, x_label=x)]
    if len(runs) == 1:
        charts.append(line_chart("Terms of the loss", runs[0].terms()))
    else:
        names = dict.fromkeys(name for run in runs for name in run.terms())
        charts += [
            _lines(name.capitalize(), runs, [run.terms(x).get(name, ([], [])) for run in runs]) for name in names
        ]
    titles = SCHEDULES | {"tokens_per_image": "Tokens per image", "gradient_norm": "Norm of the gradient"}
    charts += [_lines(title, runs, [run.column(key, x) for run in runs]) for key, title in titles.items()]
    same = [title[0].lower() + title[1:] for key, title in titles.items() if len(runs) > 1 and _same(runs, key, x)]
    told = text(f"The same in all: {', '.join(same)}.") if same else ""
    return told + f'<div class="charts">{"".join(charts)}</div>'


def speed(runs: Sequence[Recorded]) -> str:
    """Curves of images per second and of the time that is lost waiting."""
    x = axis(runs)
    told = ""
    for run in runs:
        if bad := run.training[-1].get("replaced", 0):
            whose = f" in {run.name}" if len(runs) > 1 else ""
            told += text(f"{bad} unreadable images were replaced{whose}.", "note")
    charts = [_lines("Images per second", runs, [run.column("images_per_second", x) for run in runs], floor=0)]
    title = "Share of the time waiting for data"
    charts.append(_lines(title, runs, [run.column("data_wait", x) for run in runs], floor=0, percent=True))
    if not any(charts):
        known = any(run.column("images_per_second", x)[0] for run in runs)
        return told + (
            text("The same in all.") if known else text("The log has no speed: it is of an earlier version.", "note")
        )
    return told + f'<div class="charts">{"".join(charts)}</div>'


def _lines(title: str, runs: Sequence[Recorded], columns: Sequence[Column], **options: Any) -> str:
    """A chart with a line per run; "" where all runs have the same."""
    if len(runs) > 1 and all(_equal(columns[0], other) for other in columns[1:]):
        return ""
    return line_chart(title, dict(zip(labels(runs) if len(runs) > 1 else [""], columns)), x_label=axis(runs), **options)


def _same(runs: Sequence[Recorded], key: str, x: str) -> bool:
    first, *others = [run.column(key, x) for run in runs]
    return len(first[0]) > 0 and all(_equal(first, other) for other in others)


def _equal(one: Column, other: Column) -> bool:
    """Whether both have the same values at the places that both have, which are most."""
    first, second = dict(zip(*one)), dict(zip(*other))
    both = first.keys() & second.keys()
    return 2 * len(both) >= max(len(first), len(second)) and all(first[x] == second[x] for x in both)


def figures(run: Recorded) -> str:
    """The table of a run's figures, beside those of the untrained encoder."""
    found = headline(run.figures)
    if not found:
        told = "The encoder was not evaluated on labelled images: "
        why = "the run has not finished" if run.summary is None else run.summary.get(UNKNOWN)
        told += printable(str(why or "probe.test is not set, or there are no labels"))
        return text(f"{told}. To do it now: ijepa-fast probe {run.folder} --data TRAIN --test TEST", "note")
    where = "training images that the probe did not see" if (run.summary or {}).get(SEEN) else "test images"
    told = f"Of frozen features, on {where}. ± is half of the 95 % interval over these images"
    told += ", and over seeds" if any(len(f.seeds) > 1 for f in found) else ""
    told += f"; stressed is what is better than untrained by more than {CLEAR} standard errors (s.e.). In the picture: "
    told += "|\N{NO-BREAK SPACE}chance, ○\N{NO-BREAK SPACE}untrained, ●\N{NO-BREAK SPACE}trained."
    head = ["", "chance", "untrained", "trained", "change", "images", ""]
    rows = []
    for f, span in zip(found, _spans(found)):
        points = [] if f.untrained is None else [(f.untrained, _half(f.untrained_error), "s0", False)]
        points = [point for point in (*points, (f.value, f.half or 0, "s0", True)) if math.isfinite(point[0])]
        drawn = dots(points, span, f.chance) if math.isfinite(f.chance) else ""
        untrained = _value(f.untrained, _half(f.untrained_error)) if f.untrained is not None else "not known"
        cells = [name(f), number(f.chance), untrained, _value(f.value, f.half), change(f), f"{f.n:,}"]
        rows.append([*cells, Markup(drawn)])
    better = [(row, 3) for row, f in enumerate(found) if f.improved]
    return text(told) + table(head, rows, better, words=1)


def compared(runs: Sequence[Recorded]) -> str:
    """The table of the figures of several runs, with intervals, and how each differs from the first run's."""
    names = labels(runs)
    told = ""
    for run, label in zip(runs, names):
        why = "it has not finished" if run.summary is None else "it was not evaluated"
        told += "" if run.figures else text(f"{label} has no figures: {why}.", "note")
    found = [{(f.task, f.probe, f.metric): f for f in headline(run.figures)} for run in runs]
    every = dict.fromkeys(key for of in found for key in of)
    if not every:
        return told
    once = all(len({of[key].untrained for of in found if key in of}) == 1 for key in every)  # one encoder to begin with
    head: list[str] = ["", "chance", *(["untrained"] if once else [])]
    for place, label in enumerate(names):
        head += [] if once else [Markup(f"{coloured(label, place)}, untrained")]
        head += [coloured(label, place)] + ([f"{label} - {names[0]}"] if place else [])
    rows, better, other = [], [], False
    for row, key in enumerate(every):
        first, *others = [of.get(key) for of in found]
        known = next(f for f in (first, *others) if f is not None)
        cells: list[str] = [name(known), number(known.chance), *([number(known.untrained)] if once else [])]
        for place, f in enumerate((first, *others)):
            cells += [] if once else [number(f.untrained) if f else ""]
            cells.append(_value(f.value, f.half) if f else "")
            if place:
                difference = comparable(f, first)
                other = other or (difference is None and f is not None and first is not None)
                if difference is not None and difference.improved:
                    better.append((row, len(cells)))
                cells.append(change(difference) if difference is not None else "")
        rows.append(cells)
    if other:
        told += text("Figures of other test images are not compared: their number or their chance differs.", "note")
    legend = (
        "± is half of the 95 % interval over test images, and over seeds where there were several; s.e. are standard "
    )
    legend += f"errors of a difference, and stressed is what is better by more than {CLEAR} of them."
    return told + text(legend) + table(head, rows, better, words=1)


def comparable(one: Figure | None, other: Figure | None) -> Figure | None:
    """`one` with the value of `other` in the place of the untrained encoder's; None where they are of other images."""
    if one is None or other is None or (one.n, one.chance) != (other.n, other.chance):
        return None
    return against([one], [other])[0]


def name(f: Figure) -> Markup:
    """Which figure it is, as the first cell of its row."""
    return Markup(f"{html.escape(f.task)}, {html.escape(f.probe)} <small>{METRICS[f.metric]}</small>")


def _value(value: float | None, half: float | None) -> Markup:
    return Markup(number(value) + (f" <small>± {half:.4f}</small>" if half else ""))


def _half(error: float | None) -> float:
    return NORMAL * error if error is not None and math.isfinite(error) else 0.0


def _spans(figures: Sequence[Figure]) -> list[tuple[float, float]]:
    """For each figure the ends of its axis, which is that of all figures of its metric."""
    ends: dict[str, list[float]] = {}
    for f in figures:
        values = [f.chance, f.value - (f.half or 0), f.value + (f.half or 0)]
        values += [] if f.untrained is None else [f.untrained - _half(f.untrained_error), f.untrained]
        ends.setdefault(f.metric, []).extend(filter(math.isfinite, values))
    return [(min(ends[f.metric], default=0.0), max(ends[f.metric], default=1.0)) for f in figures]


def probes(runs: Sequence[Recorded]) -> str:
    """Curves of the probe while training."""
    charts = _online(runs, lambda metric: metric not in (*HEALTH, "images"))
    if not charts:
        told = "There was no probe while training: probe.every is 0, or the training images have no labels."
        return text(told, "note")
    return text("While training, on training images: for comparing one step with another.") + charts


def health(runs: Sequence[Recorded]) -> str:
    """What the collapse doctor found, beside the untrained encoder's and what is expected, and its curves."""
    tables = [_signs(run, len(runs) > 1) for run in runs]
    charts = _online(runs, lambda metric: metric in HEALTH)
    if not charts:
        told = "RankMe and the other signs of a collapse were not measured: probe.every is 0, or the method has no "
        return text(f"{told}target encoder.", "note")
    told = "Of the target features while training; untrained: of the run's first images, before the first step."
    return text(told) + "".join(tables) + charts


def _signs(run: Recorded, several: bool) -> str:
    now, untrained = run.doctor()
    heading = f"<h3>{html.escape(run.name)}</h3>" if several else ""
    told = text(f"{now['advice'][0].upper()}{now['advice'][1:]}.", "note") if now.get("advice") else ""
    found: list[Sign] = signs(now, untrained)
    if untrained is None:
        told += text("What the untrained encoder had is not in this log.", "note")
    rows = [
        [
            sign.name,
            sign.expected,
            "" if sign.untrained is None else f"{sign.untrained:.4g}",
            Markup(f'<span class="low">{sign.now:.4g}, {sign.beyond}</span>') if sign.beyond else f"{sign.now:.4g}",
        ]
        for sign in found
    ]
    return heading + told + table(["", "expected", "untrained", "now"], rows, words=2) if rows else ""


def _online(runs: Sequence[Recorded], wanted: Callable[[str], bool]) -> str:
    found: list[Series] = [run.online(axis(runs)) for run in runs]
    charts = []
    for metric in dict.fromkeys(metric for series in found for metric in series if wanted(metric)):
        title = TITLES.get(metric, metric.replace("_", " ").capitalize())
        levels = _levels(runs[0], metric) if len(runs) == 1 else {}
        if len(runs) == 1:
            charts.append(line_chart(title, found[0][metric], levels=levels))
            continue
        for label in dict.fromkeys(label for series in found for label in series.get(metric, ())):
            lines = {run: series.get(metric, {}).get(label, ([], [])) for run, series in zip(labels(runs), found)}
            charts.append(line_chart(f"{title}, {label}" if label else title, lines, x_label=axis(runs)))
    return f'<div class="charts">{"".join(charts)}</div>' if charts else ""


def _levels(run: Recorded, metric: str) -> dict[str, float]:
    """What a curve is to be seen beside: the untrained encoder's value, and the bound that is expected."""
    now, untrained = run.doctor()
    first = (untrained or {}).get(metric)
    levels = {} if first is None else {"untrained": first}
    if metric == "lidar":
        found = {name: value for name, value in (untrained or {}).items() if isinstance(value, dict)}
        levels = {f"untrained {name}": value["lidar"] for name, value in found.items() if "lidar" in value}
    if now.get("fixed"):
        return levels
    if metric == "rankme":
        levels["expected above"] = LEAST_RANK if first is None else max(LEAST_RANK, LOW_RANK * first)
    if metric == "target_variance" and (first is None or first >= LOW_VARIANCE):
        levels["expected above"] = LOW_VARIANCE
    if metric == "position_share":
        levels["expected below"] = HIGH_POSITION
    return levels


def cards(run: Recorded) -> dict[str, str]:
    """The head's figures, as HTML; what the log does not have is left out."""
    steps, seen = run.steps, run.training[-1].get("images")
    batch = run.flat.get("batch_size")
    of = f"of {batch:,} images" if isinstance(batch, int) and seen in (None, steps * batch) else ""
    of = of or (f"of {seen:,} images in all" if seen else "")
    found = {"steps": f"{steps:,} <small>{of}</small>"}
    found["loss"] = f"{run.training[-1]['loss']:.4f} <small>from {run.training[0]['loss']:.4f}</small>"
    if rates := run.column("images_per_second")[1]:
        tokens = run.column("tokens_per_image")[1]
        at = f" <small>at {np.mean(tokens):.0f} tokens</small>" if tokens else ""
        found["images per second"] = f"{np.median(rates):,.0f}{at}"
    if waits := run.column("data_wait")[1]:
        found["waiting for data"] = f"{100 * np.mean(waits):.2g}%"
    now, untrained = run.doctor()
    if "rankme" in now:
        before = f" <small>untrained {untrained['rankme']:.3g}</small>" if untrained and "rankme" in untrained else ""
        found["RankMe"] = f"{now['rankme']:.3g}{before}"
    if run.config is not None:
        model = run.config.model
        found["encoder"] = f"{model.depth} blocks <small>of width {model.dim}, patch {model.patch}</small>"
    return found
