"""Tables of a comparison, as Markdown: along the runs, at their ends, and how soon they are where MAE ends."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np

from bench.compare.runs import TEACHER
from ijepa_fast.eval.figures import Figure, figures_of, headline

Record = dict[str, Any]  # what train.do gives
PROBES = {"linear": "linear probe", "20-NN": "20-NN"}  # along a run
BEST = "linear, best"
ENDS = {
    "linear": "linear",
    BEST: "best block",
    "20-NN": "20-NN",
    "attentive": "attentive",
    "1 % low-shot": "1 % low-shot",
}
AXES = {"step": "steps", "petaflop": "PFLOP", "seconds": "seconds"}  # by which a run is long
Place = tuple[float, ...]  # by these
Curve = list[tuple[Place, float]]  # and the value there


def final(record: Record) -> list[Figure]:
    """What to look at of a run's end."""
    return headline(figures_of(record["points"][-1]))


def by_run(records: list[Record]) -> dict[str, list[Record]]:
    """The records of every run, one for each seed."""
    return {name: [r for r in records if r["run"] == name] for name in dict.fromkeys(r["run"] for r in records)}


def panels(records: list[Record]) -> dict[tuple[str, str], str]:
    """What is shown along runs, by label and probe, with its title: two probes of one label, or one of several."""
    tasks = list(dict.fromkeys(figure.task for figure in final(records[0])))
    if len(tasks) == 1:
        return {(tasks[0], probe): title for probe, title in PROBES.items()}
    return {(task, "linear"): f"{task}, linear" for task in tasks}


def figure_of(point: dict[str, Any], task: str, probe: str) -> Figure | None:
    """The accuracy, or R^2, that a probe has at a point of a run."""
    found = (f for f in figures_of(point) if (f.task, f.probe) == (task, probe) and f.metric != "mean_absolute_error")
    return next(found, None)


def value(point: dict[str, Any], task: str, probe: str) -> float:
    """The value of that figure, which must be there."""
    figure = figure_of(point, task, probe)
    assert figure is not None, f"{task}, {probe}"
    return figure.value


def table(records: list[Record]) -> str:
    """Accuracies of each run at its iterations, mean over seeds and, of several, the range."""
    shown = panels(records)
    lines = _head(["run", "seeds", "step", "PFLOP", "seconds", *shown.values()])
    for name, runs in by_run(records).items():
        for points in zip(*(record["points"] for record in runs)):
            cells = [name, str(len(runs)), str(points[0]["step"]), f"{np.mean([p['petaflop'] for p in points]):.3g}"]
            cells += [f"{np.mean([p['seconds'] for p in points]):.0f}"]
            for task, probe in shown:
                figures = [figure_of(point, task, probe) for point in points]
                cells.append(_spread([f for f in figures if f is not None]))
            lines.append(_row(cells))
    return "\n".join(lines)


def ends(records: list[Record]) -> str:
    """Every probe at the end of each run, and the gain over the run's own untrained encoder with its standard error."""
    found = {name: {(f.task, f.probe) for r in runs for f in final(r)} for name, runs in by_run(records).items()}
    known = [probe for probe in ENDS if any(probe in {p for _, p in pairs} for pairs in found.values())]
    tasks = list(dict.fromkeys(f.task for f in final(records[0])))
    lines = _head(["run", *(["label"] if len(tasks) > 1 else []), "learning rate", *(ENDS[probe] for probe in known)])
    for name, runs in by_run(records).items():
        for task in tasks:
            cells = [name, *([task] if len(tasks) > 1 else []), f"{rate(runs[0]):.3g}"]
            lines.append(_row([*cells, *(_end(runs, task, probe) for probe in known)]))
    return "\n".join(lines)


def lead(runs: list[Record], others: list[Record], task: str, probe: str) -> tuple[float, float | None]:
    """How far runs end above others of the same seeds: the mean, and its standard error over seeds, None of one."""
    theirs = {record["seed"]: value(record["points"][-1], task, probe) for record in others}
    leads = [value(record["points"][-1], task, probe) - theirs[record["seed"]] for record in runs]
    error = float(np.std(leads, ddof=1)) / len(leads) ** 0.5 if len(leads) > 1 else None
    return float(np.mean(leads)), error


def worth(records: list[Record], base: str) -> str:
    """What each run ends with, of one label, and how far above the run `base` by seed, with the error over seeds."""
    runs, shown = by_run(records), panels(records)
    lines = _head(["run", "seeds", "learning rate", *(c for title in shown.values() for c in (title, f"over {base}"))])
    for name, of in runs.items():
        cells = [name, str(len(of)), f"{rate(of[0]):.3g}"]
        for task, probe in shown:
            mean, error = lead(of, runs[base], task, probe)
            cells.append(f"{np.mean([value(record['points'][-1], task, probe) for record in of]):.1%}")
            behind = "" if error is None else f" ± {100 * error:.1f}"
            cells.append("" if name == base else f"{100 * mean:+.1f}{behind}")
        lines.append(_row(cells))
    return "\n".join(lines)


def gain(figures: list[Figure]) -> tuple[float, float | None]:
    """The mean gain of several seeds over their untrained encoders, and its standard error, None where unknown.

    Seeds may share test images, so the error of those is not divided by the number of seeds; what seeds differ by is
    added to it.
    """
    gains = [f.value - f.untrained for f in figures if f.untrained is not None]
    errors = [_error(f) for f in figures]
    if not gains or any(error is None for error in errors):
        return float(np.mean(gains or [math.nan])), None
    between = float(np.std(gains, ddof=1)) / len(gains) ** 0.5 if len(gains) > 1 else 0.0
    return float(np.mean(gains)), math.hypot(float(np.mean([e for e in errors if e is not None])), between)


def _error(figure: Figure) -> float | None:
    """The standard error of a figure's gain over test images; of an accuracy it follows from their number."""
    errors = []
    for mean, error in ((figure.value, figure.error), (figure.untrained, figure.untrained_error)):
        if error is None and (figure.metric != "accuracy" or mean is None):
            return None
        errors.append(math.sqrt(mean * (1 - mean) / figure.n) if error is None else error)  # type: ignore[operator]
    return math.hypot(*errors)


def soon(records: list[Record]) -> str:
    """How soon each run has the figures that MAE has at its end on the same images; "" without MAE.

    Between probes lie straight lines. A run with a frozen teacher has two rows: the second counts what that had cost.
    """
    runs = by_run(records)
    rivals = {name: rival for name in runs if (rival := "@".join([TEACHER, *name.split("@")[1:]])) in runs}
    if not rivals:
        return ""
    heads = [head for unit in AXES.values() for head in (f"{unit} to it", "of MAE's")]
    lines = _head(["run", "probe", "MAE's final figure", *heads])
    for (task, probe), title in panels(records).items():
        for name, rival in rivals.items():
            whole, goal = _curve(runs[rival], task, probe)[-1]
            shown = _number(goal, figure_of(runs[rival][0]["points"][-1], task, probe))
            for words, cost in _costs(name, runs[name], _curve(runs[name], task, probe), goal):
                cells = [words, title, shown]
                if cost is None:
                    lines.append(_row([*cells, *["not reached", "-"] * len(AXES)]))
                    continue
                pairs = [
                    (f"{spent:.3g}" if spent < 1000 else f"{spent:,.0f}", spent / all_)
                    for spent, all_ in zip(cost, whole)
                ]
                lines.append(_row([*cells, *(cell for spent, share in pairs for cell in (spent, f"{share:.2f}"))]))
    return "\n".join(lines)


def _costs(name: str, records: list[Record], curve: Curve, goal: float) -> Iterator[tuple[str, Place | None]]:
    cost = reach(curve, goal)
    yield name, cost
    teachers = [teacher for record in records if (teacher := record.get("teacher"))]
    if teachers and cost is not None:
        before = [float(np.mean([teacher[axis] for teacher in teachers])) for axis in AXES]
        yield f"{name}, with its teacher's", tuple(a + b for a, b in zip(cost, before))


def _curve(records: list[Record], task: str, probe: str) -> Curve:
    """The mean over seeds along a run."""
    return [
        (
            tuple(float(np.mean([point[axis] for point in points])) for axis in AXES),
            float(np.mean([value(point, task, probe) for point in points])),
        )
        for points in zip(*(record["points"] for record in records))
    ]


def reach(curve: Curve, goal: float) -> Place | None:
    """Where along a curve it first has the value `goal`, by all of its axes; None where it never has."""
    last = None
    for place, found in curve:
        if found >= goal:
            if last is None:
                return place
            before, low = last
            share = (goal - low) / (found - low)
            return tuple(a + share * (b - a) for a, b in zip(before, place))
        last = place, found
    return None


def tasks(records: list[Record]) -> str:
    """Labels side by side, a row for each run: the linear probe and its gain; "" where there is but one label."""
    shown = panels(records)
    if len({task for task, _ in shown}) == 1:
        return ""
    lines = _head(["run", *(task for task, _ in shown)])
    for name, runs in by_run(records).items():
        lines.append(_row([name, *(_end(runs, task, probe) for task, probe in shown)]))
    return "\n".join(lines)


def trials(search: dict[str, Any]) -> str:
    """The learning rates that a search tried, with the accuracies on held-out training images."""
    lines = _head(["run", "found", "between worse ones", "tried: rate, figures on held-out images"])
    for name, found in search.items():
        tried = [
            f"{trial['lr']:.3g}: " + ("failed" if "failed" in trial else _figures(trial["figures"]))
            for trial in found["trials"]
        ]
        lines.append(_row([name, f"{found['rate']:.3g}", "yes" if found["inside"] else "no", "; ".join(tried)]))
    return "\n".join(lines)


def tables(result: dict[str, Any]) -> str:
    """All tables of what bench/learning.py leaves, each under a sentence."""
    records = result["records"]
    parts = {
        "At the end of the runs; in brackets the gain over the run's own untrained encoder and its standard error, of "
        "the test images and the seeds:": ends(records),
        "Labels side by side, linear probe:": tasks(records),
        "How soon each run has what MAE ends with, and that over all that MAE took:": soon(records),
        "Along the runs, mean over seeds with the range:": table(records),
        "The search for learning rates, by shorter runs on a seed of its own:": trials(result["search"])
        if result.get("search")
        else "",
    }
    return "\n\n".join(f"{words}\n\n{part}" for words, part in parts.items() if part)


def rate(record: Record) -> float:
    """The learning rate of a run."""
    if "lr" in record:
        return record["lr"]
    given = [item.partition("=")[2] for item in record["settings"] if item.startswith("optim.lr=")]
    return float(given[-1]) if given else math.nan


def _end(runs: list[Record], task: str, probe: str) -> str:
    figures = [f for record in runs if (f := figure_of(record["points"][-1], task, probe)) is not None]
    if not figures:
        return "-"
    text = _number(float(np.mean([f.value for f in figures])), figures[0])
    if figures[0].untrained is None:
        return text
    better, error = gain(figures)
    scale, digits = (100, 1) if figures[0].metric == "accuracy" else (1, 2)
    parts = [f"{scale * better:+.{digits}f}" + ("" if error is None else f" ± {scale * error:.{digits}f}")]
    if probe == BEST:
        chosen = Counter(choice["features"] for f in figures for choice in f.chosen)
        parts.append(chosen.most_common(1)[0][0])
    return f"{text} ({'; '.join(parts)})"


def _figures(figures: dict[str, float]) -> str:
    return ", ".join(f"{name.removeprefix('class, ')} {found:.3f}" for name, found in figures.items())


def _number(mean: float, figure: Figure | None) -> str:
    return f"{mean:.1%}" if figure is None or figure.metric == "accuracy" else f"{mean:.3f}"


def _spread(figures: list[Figure]) -> str:
    if not figures:
        return "-"
    values = [f.value for f in figures]
    mean, low, high = (_number(v, figures[0]) for v in (float(np.mean(values)), min(values), max(values)))
    return mean if len(values) == 1 else f"{mean} ({low} to {high})"


def _head(names: list[str]) -> list[str]:
    return [_row(names), "|" + "---|" * len(names)]


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
