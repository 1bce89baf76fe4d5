"""What runs of one configuration gained by training, seed by seed: from their summaries to a table and a picture.

    python bench/gains.py runs/quickstart runs/seed1 runs/seed2 --json bench/results/gains-quickstart.json

A run's summary has every figure before and after training, with its standard error over the test images. Runs that
differ in more than their seeds are refused. The picture has an arrow for each seed, from before training to after it.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from bench.record import show
from ijepa_fast.command import one_sentence
from ijepa_fast.config import ConfigError, flatten, load_config
from ijepa_fast.eval.figures import METRICS, Figure
from ijepa_fast.report.plots import COLOURS

PROBES = ("linear", "20-NN")
SHOWN = ("accuracy", "r2")
FACTS = ("date", "commit", "device", "precision", "steps", "wall_seconds", "images_per_second")
OWN = ("seed", "name", "runs")  # keys of a configuration that may differ


def record(run: Path) -> dict[str, Any]:
    """What is kept of a run's folder. Raises ConfigError where it is not that of a finished run."""
    try:
        summary = json.loads((run / "summary.json").read_text())
        config = flatten(load_config(run / "config.yaml", []))
    except FileNotFoundError as error:
        raise ConfigError(f"{run}: expected a finished run, found no {Path(error.filename).name}") from None
    figures = [f for f in summary["figures"] if f["probe"] in PROBES and f["metric"] in SHOWN]
    if not figures:
        raise ConfigError(f"{run}: expected figures of {' and '.join(PROBES)}; was it run with probe.enabled=false?")
    kept = [{key: value for key, value in figure.items() if key != "chosen"} for figure in figures]
    facts = {key: summary[key] for key in FACTS} | {"commit": short(summary["commit"])}
    return facts | {"seed": config["seed"], "config": config, "figures": kept}


def short(commit: str | None) -> str | None:
    """A commit's name in 12 digits, with what says that its tree had changes; None of an installed package."""
    return commit and commit[:12] + ("-dirty" if commit.endswith("-dirty") else "")


def gather(runs: list[Path]) -> dict[str, Any]:
    """The content of a file of results. Raises ConfigError for runs of different configurations."""
    records = sorted(map(record, runs), key=lambda found: found["seed"])
    first = records[0]["config"]
    for found in records:
        config = found.pop("config")
        if differing := [key for key in first if key not in OWN and config.get(key) != first[key]]:
            raise ConfigError(f"expected runs of one configuration, got others of {', '.join(differing)}")
    return {key: records[0][key] for key in ("date", "commit", "device")} | {"records": records}


def figures(found: dict[str, Any]) -> list[Figure]:
    """The figures of a record."""
    return [Figure.from_json(figure) for figure in found["figures"]]


def table(result: dict[str, Any]) -> list[str]:
    """Before and after training of each seed, with the gain in standard errors of the difference, and the mean gain."""
    records = result["records"]
    heads = ["", "probe", "", "chance", *(f"seed {found['seed']}" for found in records), "mean gain"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for of_seeds in zip(*map(figures, records), strict=True):
        one = of_seeds[0]
        cells = [one.task, one.probe, METRICS[one.metric], f"{one.chance:.3f}"]
        gains = [figure.gain for figure in of_seeds]
        for figure, gain in zip(of_seeds, gains, strict=True):
            behind = "" if gain is None else f" ({gain[1]:+.1f} s.e.)"
            before = "-" if figure.untrained is None else f"{figure.untrained:.3f}"
            cells.append(f"{before} to {figure.value:.3f}{behind}")
        known = [gain[0] for gain in gains if gain is not None]
        cells.append(f"{sum(known) / len(known):+.3f}" if known else "-")
        lines.append("| " + " | ".join(cells) + " |")
    runs = [
        f"seed {found['seed']} on {found['device']} {found['wall_seconds']:.0f} s with start and probes, "
        f"{found['images_per_second']:.0f} images/s"
        for found in records
    ]
    facts = f"{records[0]['precision']}; {records[0]['steps']:,} steps; {one.n:,} test images"
    return [f"{facts}; {'; '.join(runs)}.", "", *lines]


def plot(result: dict[str, Any], path: Path, source: str = "") -> None:
    """Draw a PNG: for each label an arrow per seed, from the untrained encoder's linear probe to the trained one's."""
    from matplotlib.figure import Figure as Canvas

    records = result["records"]
    linear = [[f for f in figures(found) if f.probe == "linear" and f.untrained is not None] for found in records]
    canvas = Canvas(figsize=(2.6 * len(linear[0]), 3), layout="constrained")
    axes = canvas.subplots(1, len(linear[0]), squeeze=False)[0]
    for axis, of_seeds in zip(axes, zip(*linear, strict=True), strict=True):
        for place, figure in enumerate(of_seeds):
            colour = COLOURS[0] if figure.improved else "0.6"
            style = {"arrowstyle": "-|>", "color": colour, "lw": 2, "shrinkA": 0, "shrinkB": 0}
            axis.annotate("", (place, figure.value), (place, figure.untrained), arrowprops=style)
            axis.errorbar(place, figure.value, figure.error, color=colour, capsize=4)
            axis.plot(place, figure.untrained, "o", color="0.6")
        axis.axhline(of_seeds[0].chance, color="0.6", linestyle=":")
        axis.set(title=f"{of_seeds[0].task}, {METRICS[of_seeds[0].metric]}", xlim=(-0.6, len(records) - 0.4))
        axis.set_xticks(range(len(records)), [f"seed {found['seed']}" for found in records])
        axis.margins(y=0.15)
        axis.spines[["top", "right"]].set_visible(False)
    canvas.savefig(path, dpi=120, metadata={"Description": source} if source else None)


@one_sentence()
def main(argv: list[str] | None = None) -> int:
    """Print the table, write the JSON. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="folders of finished runs that differ in their seeds")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    result = gather(args.runs)
    show(result, table(result), args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
