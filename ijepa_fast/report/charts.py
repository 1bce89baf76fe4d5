"""Line charts as inline SVG: crisp at any size, coloured by the page's style sheet, readable under a pointer."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

WIDTH, HEIGHT, WIDE = 520, 220, 1080  # of a chart's drawing, and of one over both columns
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 12, 34  # margins
COLOURS = 6  # colours in the style sheet: .s0 to .s5
MOST = 600  # points of a line

Numbers = Sequence[float] | np.ndarray


def line_chart(title: str, series: Mapping[str, tuple[Numbers, Numbers]], *, wide: bool = False, **options: Any) -> str:
    """An SVG figure with one line per series; "" where there is no point.

    series: {name: (xs, ys)} of numbers; points that are not finite are left out. wide: over both columns, with a narrow
    one in its place on a phone. options: of `_drawn`.
    """
    narrow = _drawn(title, series, WIDTH, "chart narrow" if wide else "chart", **options)
    return _drawn(title, series, WIDE, "chart wide", **options) + narrow if wide else narrow


def _drawn(
    title: str,
    series: Mapping[str, tuple[Numbers, Numbers]],
    width: int,
    kind: str,
    *,
    note: str = "",
    log: bool = False,
    percent: bool = False,
    x_label: str = "step",
    floor: float | None = None,
    levels: Mapping[str, float] | None = None,
) -> str:
    """A chart `width` wide.

    log: of the values' axis. percent: values are shares of 1. floor: a value that the axis reaches down to.
    x_label: under the axis. levels: {name: value}, drawn as dashed lines.
    """
    series = {name: thin(*_finite(xs, ys, log)) for name, (xs, ys) in series.items()}
    series = {name: points for name, points in series.items() if len(points[0])}
    if not series:
        return ""
    levels = {name: value for name, value in (levels or {}).items() if math.isfinite(value) and (value > 0 or not log)}
    x_low, x_high = _span(np.concatenate([xs for xs, _ in series.values()]))
    values = np.concatenate([ys for _, ys in series.values()] + [np.array(list(levels.values()), float)])
    y_low, y_high = _span(np.log10(values) if log else values, floor)

    def place_x(x: Numbers | float) -> np.ndarray:
        return LEFT + (np.asarray(x, float) - x_low) / (x_high - x_low) * (width - LEFT - RIGHT)

    def place_y(y: Numbers | float) -> np.ndarray:
        values = np.log10(y) if log else np.asarray(y, float)
        return HEIGHT - BOTTOM - (values - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)

    marks = [_grid(place_x, place_y, (x_low, x_high), (y_low, y_high), width, log, percent)]
    for number, (name, value) in enumerate(levels.items()):
        y, end = float(place_y(value)), width - RIGHT - 2 - 150 * number
        marks.append(f'<line class="level" x1="{LEFT}" x2="{width - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        marks.append(
            f'<text class="level end" x="{end}" y="{y + (15 if y < 26 else -5):.1f}">{html.escape(name)}</text>'
        )
    for number, (xs, ys) in enumerate(series.values()):
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(place_x(xs), place_y(ys)))
        marks.append(f'<polyline class="s{number % COLOURS}" points="{points}"/>')
        if len(xs) <= 24:
            dots = zip(place_x(xs), place_y(ys))
            marks += [f'<circle class="s{number % COLOURS}" cx="{x:.1f}" cy="{y:.1f}" r="2.6"/>' for x, y in dots]
    marks.append(f'<line class="cursor" y1="{TOP}" y2="{HEIGHT - BOTTOM}" x1="-9" x2="-9"/>')
    data = {
        "width": width,
        "span": [LEFT, width - RIGHT, x_low, x_high],
        "label": x_label,
        "series": [
            [name, [float(x) for x in xs], [_format(y, percent) for y in ys]] for name, (xs, ys) in series.items()
        ],
    }
    names = "".join(f'<span class="run s{i % COLOURS}">{html.escape(n)}</span>' for i, n in enumerate(series) if n)
    size = f'viewBox="0 0 {width} {HEIGHT}" role="img" aria-label="{html.escape(title)}"'
    return (
        f'<figure class="{kind}" data-chart="{html.escape(json.dumps(data))}">'
        f'<figcaption><b>{html.escape(title)}</b><span class="legend">{names}</span>'
        f"<output>{html.escape(note)}</output></figcaption><svg {size}>{''.join(marks)}"
        f'<text x="{width - RIGHT}" y="{HEIGHT - 14}" class="end">{html.escape(x_label)}</text></svg></figure>'
    )


def dots(points: Sequence[tuple[float, float, str, bool]], span: tuple[float, float], chance: float) -> str:
    """A row of points with their intervals, on an axis of its own line.

    points: (value, half of its interval, class of its colour, whether it is filled). span: ends of the axis; chance:
    a tick on it.
    """
    width, middle = 220, 11
    low, high = span

    def place(value: float) -> float:
        return 6 + (min(max(value, low), high) - low) / ((high - low) or 1) * (width - 12)

    marks = [f'<line class="axis" x1="0" x2="{width}" y1="{middle}" y2="{middle}"/>']
    marks.append(f'<line class="chance" x1="{place(chance):.1f}" x2="{place(chance):.1f}" y1="5" y2="17"/>')
    for value, half, colour, filled in points:
        ends = f'x1="{place(value - half):.1f}" x2="{place(value + half):.1f}"'
        marks.append(f'<line class="{colour}" {ends} y1="{middle}" y2="{middle}" stroke-width="2.5"/>')
        marks.append(
            f'<circle class="{colour}{"" if filled else " open"}" cx="{place(value):.1f}" cy="{middle}" r="4"/>'
        )
    return f'<svg class="dots" viewBox="0 0 {width} 22" aria-hidden="true">{"".join(marks)}</svg>'


def thin(xs: Numbers, ys: Numbers, most: int = MOST) -> tuple[Numbers, Numbers]:
    """At most `most` points: the means of neighbours where there are more."""
    if len(xs) <= most:
        return xs, ys
    edges = np.linspace(0, len(xs), most + 1).astype(int)[:-1]
    counts = np.diff(np.append(edges, len(xs)))
    return np.add.reduceat(xs, edges) / counts, np.add.reduceat(ys, edges) / counts


def _finite(xs: Numbers, ys: Numbers, log: bool) -> tuple[np.ndarray, np.ndarray]:
    xs, ys = np.asarray(xs, float), np.asarray(ys, float)
    good = np.isfinite(ys) & (ys > 0) if log else np.isfinite(ys)
    return xs[good], ys[good]


def _span(values: np.ndarray, floor: float | None = None) -> tuple[float, float]:
    """Ends of an axis that holds `values`, a little wider for values, never empty."""
    low, high = float(values.min()), float(values.max())
    low = low if floor is None else min(low, floor)
    if high - low < 1e-12 * max(abs(high), 1e-12):
        margin = abs(high) * 0.05 or 1.0
        return (low - margin if floor is None else low), high + margin
    return low, high


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About `count` round numbers in [low, high]."""
    step = 10.0 ** math.floor(math.log10((high - low) / count))
    step *= next((m for m in (1, 2, 5, 10) if (high - low) / (m * step) <= count + 1.5), 10)
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers between ten to the power of `low` and of `high`: whole decades, or 1, 2 and 5 of each, or more."""
    decades = range(math.floor(low), math.ceil(high) + 1)
    if high - low > 2.5:
        return [10.0**d for d in decades if low <= d <= high and d % math.ceil((high - low) / 6) == 0]
    found = [m * 10.0**d for d in decades for m in (1, 2, 5) if low <= math.log10(m) + d <= high]
    return found if len(found) > 1 else ticks(10.0**low, 10.0**high)


def _grid(
    place_x: Callable,
    place_y: Callable,
    x_span: tuple[float, float],
    y_span: tuple[float, float],
    width: int,
    log: bool,
    percent: bool,
) -> str:
    marks = []
    for value in log_ticks(*y_span) if log else ticks(*y_span):
        y = float(place_y(value))
        text = _format(value, percent)
        marks.append(f'<line class="grid" x1="{LEFT}" x2="{width - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        marks.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" class="end">{text}</text>')
    for tick in ticks(*x_span, count=width // 110):
        x = float(place_x(tick))
        if x < width - RIGHT - 60:  # the axis's name stands there
            marks.append(f'<text x="{x:.1f}" y="{HEIGHT - 14}" class="middle">{_format(tick)}</text>')
    bottom = HEIGHT - BOTTOM
    marks.append(f'<line class="axis" x1="{LEFT}" x2="{width - RIGHT}" y1="{bottom}" y2="{bottom}"/>')
    return "".join(marks)


def _format(value: float, percent: bool = False) -> str:
    """Three significant digits, short."""
    if percent:
        return f"{100 * value:.3g}%"
    if value and (abs(value) < 1e-3 or abs(value) >= 1e6):
        mantissa, _, exponent = f"{value:.2e}".partition("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
