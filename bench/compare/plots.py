"""Plots of a comparison: along its runs, and at their ends along what a group changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from bench.compare.runs import Sweep
from bench.compare.tables import AXES, Record, by_run, figure_of, gain, panels, value
from ijepa_fast.report.plots import COLOURS


def curves(records: list[Record], path: Path, source: str = "") -> None:
    """Draw a PNG: accuracy by iteration, by work and by time, a row for each probe or label, a line for each seed.

    source: what it is drawn of, for its metadata.
    """
    shown = panels(records)
    figure = _canvas(12, 3.5 * len(shown))
    axes = figure.subplots(len(shown), len(AXES), sharey="row", squeeze=False)
    names = list(by_run(records))
    colours = dict(zip(names, COLOURS * -(-len(names) // len(COLOURS))))
    styles = {name: ("-", "--", ":", "-.")[number // len(COLOURS) % 4] for number, name in enumerate(names)}
    for row, ((task, probe), title) in enumerate(shown.items()):
        for column, (key, unit) in enumerate(AXES.items()):
            for name, runs in by_run(records).items():
                for number, record in enumerate(runs):
                    x = [point[key] for point in record["points"]]
                    y = [value(point, task, probe) for point in record["points"]]
                    label = name if number == 0 else None
                    line = {"color": colours[name], "linestyle": styles[name], "label": label}
                    axes[row, column].plot(x, y, marker="o", markersize=3, **line)
            axes[row, column].set(xlabel=unit)
            axes[row, column].grid(alpha=0.25)
        axes[row, 0].set(ylabel=title)
    axes[0, 0].legend(frameon=False)
    figure.savefig(path, metadata={"Description": source} if source else None)


def ends(records: list[Record], sweep: Sweep, path: Path, source: str = "") -> bool:
    """Draw a PNG: accuracy at the runs' ends along a sweep, with the standard error of the gain; untrained dashed.

    source: what it is drawn of, for its metadata. Returns whether all runs of the sweep are among `records`; where they
    are not, nothing is drawn.
    """
    runs, shown = by_run(records), panels(records)
    if not set(sweep.runs) <= runs.keys():
        return False
    figure = _canvas(4.5 * len(shown), 4)
    axes = figure.subplots(1, len(shown), squeeze=False)[0]
    for axis, ((task, probe), title) in zip(axes, shown.items()):
        for (line, places), colour in zip(sweep.lines.items(), COLOURS):
            found = [[figure_of(r["points"][-1], task, probe) for r in runs[name]] for name in places.values()]
            figures: list[list[Any]] = [[f for f in of if f is not None] for of in found]
            x = list(places) if all(isinstance(place, int | float) for place in places) else list(map(str, places))
            means = [np.mean([f.value for f in of]) for of in figures]
            errors = [gain(of)[1] or 0.0 for of in figures]
            drawn = "o" if x and isinstance(x[0], str) else "o-"
            axis.errorbar(x, means, errors, fmt=drawn, color=colour, capsize=3, label=line or None)
            below = [np.mean([f.untrained for f in of]) for of in figures]
            axis.plot(x, below, "_" if drawn == "o" else "--", color=colour, alpha=0.6, markersize=14)
        axis.set(xlabel=sweep.axis, ylabel=title)
        if sweep.logarithmic:
            axis.set_xscale("log", base=2)
        axis.grid(alpha=0.25)
    if any(sweep.lines):
        axes[0].legend(frameon=False)
    figure.savefig(path, metadata={"Description": source} if source else None)
    return True


def _canvas(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure
