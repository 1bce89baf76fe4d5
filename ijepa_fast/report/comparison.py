"""Encoders side by side: the table of their figures and of the differences, as text and as one HTML page."""

from __future__ import annotations

import json
import re
from typing import Any

from ijepa_fast.eval.differences import differences
from ijepa_fast.eval.figures import CLEAR, METRICS, Figure, columns, number, of_one_k, overview
from ijepa_fast.report.charts import line_chart
from ijepa_fast.report.page import page, table, text

Figures = dict[str, list[Figure]]  # of each encoder, by its name
NOTE = (
    "Behind ± is half of a 95 % interval over test images, of few-shot over episodes of them; behind a difference, "
    f"that of the difference, image by image. A star marks one beyond {CLEAR} standard errors, as one in twenty is by "
    "chance. What another seed of the training would change is in none."
)


def comparison_cells(figures: Figures) -> tuple[list[str], list[list[str]], set[tuple[int, int]]]:
    """The head and the rows of a table, as text, a row per task, probe and metric; and the cells with a clear gain.

    After the encoders' values stand the differences of all but the first from the first.
    """
    first, *others = figures
    apart = {(row.key, row.encoder): row for row in differences(figures)}
    found = {name: {f.key: f for f in of_one_k(overview(of_one))} for name, of_one in figures.items()}
    keys = list(dict.fromkeys(key for of_one in found.values() for key in of_one))
    head = ["task", "probe", "metric", "chance", *figures, *(f"{name} - {first}" for name in others)]
    rows: list[list[str]] = []
    better: set[tuple[int, int]] = set()
    for key in keys:
        known = [of_one[key] for of_one in found.values() if key in of_one]
        row = [known[0].task, known[0].probe, METRICS[known[0].metric], number(known[0].chance)]
        row += [_value(of_one.get(key)) for of_one in found.values()]
        for name in others:
            if (difference := apart.get((key, name))) is not None and difference.better:
                better.add((len(rows), len(row)))
            row.append("" if difference is None else str(difference))
        rows.append(row)
    return head, rows, better


def _value(figure: Figure | None) -> str:
    if figure is None:
        return ""
    return number(figure.value) + ("" if figure.half is None else f" ±{number(figure.half)}")


def comparison_table(figures: Figures) -> str:
    """The table as lines of text in columns, and what its signs mean."""
    head, rows, _ = comparison_cells(figures)
    return f"{columns(head, rows)}\n{NOTE}"


def comparison_page(results: dict[str, Any], figures: Figures) -> str:
    """The page of `compare`: the table, curves under corruptions and along the blocks, and what was asked for."""
    head, rows, better = comparison_cells(figures)
    sections = [("Figures", text(NOTE) + table(head, rows, better))]
    if charts := _corruption(figures):
        told = "Test images made worse, level 0 as they are; heads were trained on images as they are."
        sections.append(("Corruption", text(told) + f'<div class="charts">{charts}</div>'))
    if charts := _blocks(figures):
        told = "A linear head on the output of each block."
        sections.append(("Blocks", text(told) + f'<div class="charts">{charts}</div>'))
    cards = {
        item["name"]: f"{item['arch']['depth']} blocks <small>of width {item['arch']['dim']}, patch "
        f"{item['arch']['patch']}</small>"
        for item in results["encoders"]
    }
    asked = json.dumps({"data": results["data"], "options": results["encoders"][0]["options"]}, indent=2)
    footer = f"{results['date']}, {results['device']}, ijepa_fast {results['versions']['ijepa_fast']}"
    return page(" and ".join(figures), cards, sections, asked, footer)


def _corruption(figures: Figures) -> str:
    """A chart for each task, metric and kind of corruption, a line per encoder."""
    return _charts(figures, r"linear, ([a-z]+) ([1-5])", "linear, clean")


def _blocks(figures: Figures) -> str:
    return _charts(figures, r"linear, (block) (\d+)", None)


def _charts(figures: Figures, pattern: str, start: str | None) -> str:
    """Charts of the figures whose probe is `pattern`, (kind) (number); start: the probe of number 0."""
    series: dict[tuple[str, str, str], dict[str, list[tuple[int, float]]]] = {}
    for name, of_one in figures.items():
        zero = {(f.task, f.metric): f.value for f in of_one if f.probe == start}
        for f in of_one:
            if (found := re.fullmatch(pattern, f.probe)) and (start is None) == (found[1] == "block"):
                points = series.setdefault((f.task, f.metric, found[1]), {}).setdefault(name, [])
                if not points and (f.task, f.metric) in zero:
                    points.append((0, zero[f.task, f.metric]))
                points.append((int(found[2]), f.value))
    charts = []
    for (task, metric, kind), encoders in series.items():
        lines = {name: ([x for x, _ in points], [y for _, y in points]) for name, points in encoders.items()}
        of_blocks = kind == "block"
        title = f"{task}, {METRICS[metric]}" + ("" if of_blocks else f", {kind}")
        charts.append(line_chart(title, lines, x_label="block" if of_blocks else "level"))
    return "".join(charts)
