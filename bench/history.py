"""What figures were at earlier commits: from the repository's history of bench/results/, as a table and a plot.

    python bench/history.py            # reads the history, adds what is new to history.csv, draws history.svg
    python bench/history.py --plot     # only draws

A figure's points are of the versions that its files have had, on one device. A version is dated by what it notes, else
by the commit that brought it in; what was measured in a tree with changes is left out.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from bench.record import HISTORY, dirty, drawn_from

ROOT = Path(__file__).resolve().parents[1]
FOLDER, PICTURE = "bench/results", "docs/results/history.svg"
COLUMNS = ("file", "figure", "value", "date", "commit", "noted")
KEY = ("file", "figure", "date", "commit")


Found = list[tuple[str, float]]


def _steps(name: str, result: dict[str, Any]) -> Found:
    case, rows = result["case"], {row["impl"]: row for row in result["rows"] if not row["data"]}
    device = f"{result['device']}{' held to AVX2' if 'avx2' in name else ''}"
    found = []
    for precision in dict.fromkeys(impl.partition(", ")[2] for impl in rows):
        fast = rows.get(f"fast, {precision}" if precision else "fast", {})
        speed = fast.get(f"speedup_over_plain_{precision}" if precision else "speedup_over_plain")
        if speed is not None:
            model = " ".join([case["arch"], *(f"{width} wide" for width in (case.get("widths") or [])[:1])])
            what = f"{case['method']} {model} {precision or case['precision']}, {device}"
            found.append((f"{what}: times plain PyTorch", speed))
    return found


def _learning(_: str, result: dict[str, Any]) -> Found:
    gains: dict[str, list[float]] = {}
    if len({record["points"][-1]["step"] for record in result["records"]}) > 1:  # by time: another on each machine
        return []
    for record in result["records"]:
        first, last = (_linear(record["points"][place]) for place in (0, -1))
        gains.setdefault(record["run"], []).append(100 * (last - first))
    return [(f"{run} on CIFAR-10: points gained, linear probe", sum(x) / len(x)) for run, x in gains.items()]


def _linear(point: dict[str, Any]) -> float:
    """The accuracy of the linear probe, in today's form or in the first one's."""
    figures = point.get("figures", [])
    found = [f["value"] for f in figures if (f["probe"], f["metric"]) == ("linear", "accuracy")]
    return found[0] if found else point["linear"]


def _data(_: str, result: dict[str, Any]) -> Found:
    rates = {name: row["images_per_second"] for name, row in result["contenders"].items()}
    return [(f"loader, {result['device']}: times a Pillow DataLoader", rates["loader"] / rates["pillow"])]


# By the beginning of a file's name: the figures that its history is drawn of.
FIGURES: dict[str, Callable[[str, dict[str, Any]], Found]] = {
    "steps-": _steps,
    "learning-": _learning,
    "data-": _data,
}


def git(*words: str) -> str:
    """What git says. Raises OSError or CalledProcessError where there is no repository."""
    return subprocess.run(["git", *words], cwd=ROOT, check=True, capture_output=True, text=True).stdout


def versions(name: str) -> list[dict[str, str]]:
    """A row for each figure of each version that the file `name` of bench/results has had, the oldest version first.

    A version without a figure, or that was measured in a tree with changes, has one row with no figure in it.
    """
    rows, kind = [], next((kind for kind in FIGURES if name.startswith(kind)), None)
    log = git("log", "--reverse", "--format=%H %cI", "--diff-filter=AM", "--", f"{FOLDER}/{name}")
    for line in log.splitlines():
        commit, date = line.split()
        found: Found = []
        noted: str | None = None
        if kind is not None:
            result = json.loads(git("show", f"{commit}:{FOLDER}/{name}"))
            noted = result.get("commit") or (result.get("records") or [{}])[0].get("commit")
            date = result.get("date", date) if noted else date
            found = [] if dirty(noted) else FIGURES[kind](name, result)
        origin = {"date": date, "commit": (noted or commit)[:12], "noted": "yes" if noted else "no"}
        shown = [{"figure": figure, "value": f"{value:.4g}"} for figure, value in found]
        rows += [{"file": name} | one | origin for one in shown or [{"figure": "", "value": ""}]]
    return rows


def read(path: Path) -> list[dict[str, str]]:
    """The rows of history.csv; none if it is not there."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def figures(rows: list[dict[str, str]]) -> dict[str, list[dict[str, str]]]:
    """Rows by figure, by date, of figures that have changed: each value once, at the first commit that has it."""
    points: dict[str, list[dict[str, str]]] = {}
    for row in sorted((row for row in rows if row["value"]), key=lambda row: row["date"]):
        before = points.setdefault(row["figure"], [])
        if not before or before[-1]["value"] != row["value"]:
            before.append(row)
    return {figure: found for figure, found in sorted(points.items()) if len(found) > 1}


def table(path: Path) -> list[str]:
    """Markdown: each figure that has changed, with the commits at which it did."""
    drawn = figures(read(path))
    if not drawn:
        return ["Not measured twice."]
    lines = ["| figure | by commit |", "|---|---|"]
    for figure, points in drawn.items():
        values = ", then ".join(
            f"{float(p['value']):.3g} ({p['date'][:10]}, {'at' if p['noted'] == 'yes' else 'in'} {p['commit'][:7]})"
            for p in points
        )
        lines.append(f"| {figure} | {values} |")
    return lines


def plot(path: Path, out: Path) -> None:
    """Draw a small plot for each figure that has changed, by date, its commits beside the points, as SVG."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    from ijepa_fast.report.plots import COLOURS

    drawn = figures(read(path))
    with matplotlib.rc_context({"svg.hashsalt": "history", "svg.fonttype": "none", "font.size": 9}):
        rows = -(-len(drawn) // 2)
        figure = Figure(figsize=(9, 1.8 * rows), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.subplots(rows, 2, squeeze=False).ravel()
        for axis, (label, points) in zip(axes, drawn.items()):
            values = [float(point["value"]) for point in points]
            axis.plot(range(len(values)), values, "o-", color=COLOURS[0], markersize=4)
            labels = [f"{point['date'][:10]}\n{point['commit'][:7]}" for point in points]
            axis.set_xticks(range(len(values)), labels)
            axis.set_xlim(-0.4, len(values) - 0.6)
            axis.set_ylim(1.15 * min(0, *values), 1.15 * max(values))
            axis.set_title(label.replace(": ", "\n"), loc="left", fontsize=8)
            axis.spines[["top", "right"]].set_visible(False)
        for axis in axes[len(drawn) :]:
            axis.set_visible(False)
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, format="svg", metadata={"Date": None, "Description": drawn_from(path)})


def main(argv: list[str] | None = None) -> int:
    """Write history.csv and the plot. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", action="store_true", help="only draw, from history.csv as it is")
    args = parser.parse_args(argv)
    path = ROOT / FOLDER / HISTORY
    if not args.plot:
        known = {tuple(row[name] for name in KEY): row for row in read(path)}
        for file in sorted((ROOT / FOLDER).glob("*.json")):
            for row in versions(file.name):
                known[tuple(row[name] for name in KEY)] = row
        with path.open("w", newline="") as out:
            writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(sorted(known.values(), key=lambda row: (row["file"], row["date"], row["figure"])))
    plot(path, ROOT / PICTURE)
    print(f"{path.relative_to(ROOT)}, {PICTURE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
