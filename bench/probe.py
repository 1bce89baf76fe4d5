"""What the probe while training and its collapse doctor cost, beside the steps of encoders of several widths.

    python bench/probe.py --device cpu --json bench/results/probe-cpu.json

Medians: forward and backward of a step; what the probe does in every step, means over each image and the sums of which
variance and share are; RankMe and LiDAR of 512 images; a whole reading of 4,096 images, with a ridge head. A reading
leaves LiDAR out where classes hardly repeat; the share of the time counts it all the same. Batches are small, so that
the share is one of the larger ones.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch

from bench.record import show
from bench.timing import synchronise
from ijepa_fast.command import whole
from ijepa_fast.config import load_config
from ijepa_fast.eval.collapse import LEAST_A_CLASS, RANK_IMAGES, lidar
from ijepa_fast.eval.online import WINDOW, OnlineProbe
from ijepa_fast.eval.rankme import rankme
from ijepa_fast.run.build import build_method
from ijepa_fast.run.provenance import provenance

WIDTHS = {192: ("published_cifar10", 32), 768: ("vit_base16", 8), 1280: ("in1k_vith14_ep300", 2)}  # and a batch
EVERY = load_config("quickstart").probe.every
TIMES = ("step", "each", "rankme", "lidar", "reading")


def milliseconds(function: Callable[[], Any], device: torch.device, rounds: int) -> float:
    """Median time of `function`."""
    times = []
    for _ in range(rounds):
        synchronise(device.type)
        begin = time.perf_counter()
        function()
        synchronise(device.type)
        times.append(time.perf_counter() - begin)
    return 1e3 * statistics.median(times)


def measured(width: int, args: argparse.Namespace) -> dict[str, Any]:
    """A row of the table."""
    device, rounds, classes, (config, batch) = torch.device(args.device), args.rounds, args.classes, WIDTHS[width]
    method = build_method(load_config(config, ["data.source=synthetic", f"batch_size={batch}", *args.overrides]))
    for network in method.networks.values():
        network.to(device)
    g = np.random.default_rng(0)
    labels = {"class": g.integers(0, classes, WINDOW)}
    probe = OnlineProbe(method, 1, labels, {"class": [str(i) for i in range(classes)]}, say=lambda _: None)
    watch, method.watch = method.watch, None
    assert watch is not None
    images = torch.randint(256, (batch, *method.setup.data.size, 3), dtype=torch.uint8, device=device)
    draw = method.draw(batch, 0, 0).to(device)

    def step() -> None:
        method(images, draw)[0].backward()
        method.zero_grad()

    features = torch.randn(len(draw.union_index), width, device=device)
    indices = [torch.from_numpy(part) for part in np.array_split(np.arange(WINDOW), WINDOW // batch)]
    turn = itertools.count()

    def add() -> None:
        watch(features, draw)
        probe.add(indices[next(turn) % len(indices)])

    pooled = torch.randn(RANK_IMAGES, width, device=device)
    ids = torch.from_numpy(labels["class"][:RANK_IMAGES]).to(device)
    readings = []
    for number in range(1, rounds + 1):
        for part in indices:
            watch(features + torch.randn_like(features), draw)
            probe.add(part)
        synchronise(device.type)
        begin = time.perf_counter()
        assert probe.read(number)
        readings.append(time.perf_counter() - begin)
    found = {
        "width": width,
        "classes": classes,
        "batch": batch,
        "step": milliseconds(step, device, rounds),
        "each": milliseconds(add, device, 10 * rounds),
        "rankme": milliseconds(lambda: rankme(pooled), device, rounds),
        "lidar": milliseconds(lambda: lidar(pooled, ids), device, rounds),
        "reading": 1e3 * statistics.median(readings),
    }
    beside = 0.0 if classes * LEAST_A_CLASS <= RANK_IMAGES else found["lidar"]
    spent = args.every * found["each"] + found["reading"] + beside
    return found | {"share": spent / (args.every * found["step"] + spent)}


def table(result: dict[str, Any]) -> list[str]:
    """What was measured, as Markdown."""
    lines = [f"{result['device']}, {result['note']}; fp32; ms; a reading every {result['every']} steps.", ""]
    lines += ["| width | batch | classes | a step | in every step | RankMe | LiDAR | a reading | share of the time |"]
    lines += ["|" + "---|" * 9]
    for row in result["rows"]:
        times = " | ".join(f"{row[name]:,.{2 if row[name] < 10 else 0}f}" for name in TIMES)
        share = f"{100 * row['share']:.2f} %"
        lines.append(f"| {row['width']:,} | {row['batch']} | {row['classes']:,} | {times} | {share} |")
    return lines


def main(argv: list[str] | None = None) -> int:
    """Print the table, write the JSON. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--widths", default=",".join(map(str, WIDTHS)), help="with commas")
    parser.add_argument("--classes", type=whole(), default=1000)
    parser.add_argument("--every", type=whole(), default=EVERY, help="steps between readings")
    parser.add_argument("--rounds", type=whole(), default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--note", default="nothing beside it", help="what else the machine did")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args(argv)
    widths = [int(width) for width in args.widths.split(",")]
    if unknown := sorted(set(widths) - set(WIDTHS)):
        parser.error(f"--widths: expected of {', '.join(map(str, WIDTHS))}, got {', '.join(map(str, unknown))}")
    rows = [measured(width, args) for width in widths]
    result = provenance(args.device) | {"note": args.note, "every": args.every, "rows": rows}
    show(result, table(result), args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
