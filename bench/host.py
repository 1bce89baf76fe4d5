"""What a call of each op costs the host, on tensors so small that the arithmetic costs next to nothing.

    python bench/host.py [--device cuda] [--json FILE]

Of each case of bench/registry.py at its smallest sizes: this project's op and PyTorch's own rendering, forward, and
forward with backward, in microseconds. The two take turns. On a GPU nothing waits for the device until a turn is over,
so that what is measured is dispatch, autograd and the launch; a CUDA graph's replay has none of it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch

from bench.baselines.steps import DTYPES
from bench.record import made
from bench.registry import MODELS, OPS, Batch, Case
from bench.timing import synchronise
from ijepa_fast.run.provenance import device_name

IMAGES = 2
CALLS = 20  # of a turn: few enough for the queue of a GPU's launches


def microseconds(works: dict[str, Callable], rounds: int, device: str) -> dict[str, float]:
    """The median of a call of each of `works` over `rounds` turns; the first turn, which compiles, is not counted."""
    found: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds + 1):
        for name, work in works.items():
            synchronise(device)
            start = time.perf_counter()
            for _ in range(CALLS):
                work()
            found[name].append((time.perf_counter() - start) / CALLS)
    return {name: 1e6 * float(np.median(times[1:])) for name, times in found.items()}


def passes(case: Case, function: Callable) -> dict[str, Callable]:
    """Forward without a gradient, and where there is one, forward with backward."""
    trained = [x for x in case.args if isinstance(x, torch.Tensor) and x.requires_grad]

    def forward():
        with torch.no_grad():
            function(*case.args)

    def both():
        outputs = function(*case.args)
        outputs = [y for y in (outputs if isinstance(outputs, tuple) else (outputs,)) if y.requires_grad]
        torch.autograd.grad(outputs, trained, [torch.ones_like(y) for y in outputs])

    return {"forward": forward} | ({"both": both} if trained else {})


def rows_of(ops: list[str], device: str, precision: str, rounds: int) -> list[dict]:
    """A record per case: op, part, shape, microseconds of our implementation and of the eager reference."""
    batch = Batch(MODELS["tiny"], IMAGES, torch.device(device), DTYPES[precision])
    rows = []
    for op in ops:
        for case in OPS[op](batch):
            if not case.own or not case.comparable:  # what works in place is no call of one step
                continue
            name, own = next(iter(case.own.items()))
            works = {("ours", which): run for which, run in passes(case, own).items()}
            works |= {("eager", which): run for which, run in passes(case, case.eager).items()}
            found = microseconds(works, rounds, device)
            row = {"op": op, "part": case.part, "shape": case.shape, "implementation": name}
            rows.append(row | {f"{who}_{which}_us": value for (who, which), value in found.items()})
    return rows


def table(result: dict) -> list[str]:
    """The records as a Markdown table."""
    heads = ("op", "part", "implementation", "forward, us", "eager's", "forward and backward, us", "eager's")
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in result["rows"]:
        values = [row.get(f"{who}_{which}_us") for which in ("forward", "both") for who in ("ours", "eager")]
        cells = [row["op"], row["part"], row["implementation"], *("-" if v is None else f"{v:.0f}" for v in values)]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def main(argv: list[str] | None = None) -> int:
    """Print the table, write the JSON. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ops", default=",".join(OPS), help=f"of {', '.join(OPS)}, with commas")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=sorted(DTYPES), default="bf16")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args(argv)
    if unknown := set(args.ops.split(",")) - set(OPS):
        parser.error(f"--ops: expected of {', '.join(OPS)}, got {', '.join(sorted(unknown))}")
    rows = rows_of(args.ops.split(","), args.device, args.precision, args.rounds)
    facts = {"device": device_name(args.device), "torch": torch.__version__, "precision": args.precision}
    result = made() | facts | {"rows": rows}
    print(f"{result['device']}, torch {result['torch']}, {args.precision}")
    print("\n".join(table(result)))
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
