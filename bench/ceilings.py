"""What this device can do at most, in seconds: the rates that all shares of bench/ are of, and what a graph costs.

    python bench/ceilings.py [--device cuda] [--json FILE]

A copy (GB/s), a matrix product in bf16 (TFLOP/s), an empty launch from Python (us); on a GPU also a graph of 2,000
launches: seconds of a replay and bytes of device memory that it takes, which no allocator counts.
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

import torch

from bench.record import made
from bench.timing import synchronise
from ijepa_fast.run.provenance import device_name

LAUNCHES = 2000


def seconds(function: Callable[[], object], device: str, times: int) -> float:
    """Of one call, the best of three rounds."""
    best = float("inf")
    for _ in range(3):
        synchronise(device)
        start = time.perf_counter()
        for _ in range(times):
            function()
        synchronise(device)
        best = min(best, (time.perf_counter() - start) / times)
    return best


def ceilings(device: str, elements: int = 1 << 28, rows: int = 32768, width: int = 1280) -> dict[str, float]:
    """elements: of the copy, of bf16; rows, width: of the product, which is of the shape of an MLP's first."""
    with torch.device(device):
        source = torch.empty(elements, dtype=torch.bfloat16).zero_()
        room = torch.empty_like(source)
        a, b = torch.randn(rows, width).bfloat16(), torch.randn(width, 4 * width).bfloat16()
        one = torch.zeros(1)
    copy = seconds(lambda: room.copy_(source), device, 10)
    product = seconds(lambda: a @ b, device, 10)
    found = {
        "copy_gb_per_second": 2 * source.nbytes / copy / 1e9,
        "product_tflops": 2 * rows * width * 4 * width / product / 1e12,
        "launch_us": 1e6 * seconds(lambda: one.add_(1), device, 500),
    }
    if device.startswith("cuda"):
        del source, room
        free, _ = torch.cuda.mem_get_info()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(LAUNCHES):
                one.add_(1)
        found["graph_bytes"] = free - torch.cuda.mem_get_info()[0]
        found["graph_us_per_launch"] = 1e6 * seconds(graph.replay, device, 3) / LAUNCHES
    return found


def main(argv: list[str] | None = None) -> int:
    """Print and write them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--small", action="store_true", help="tries the command, measures nothing")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args(argv)
    sizes = {"elements": 1 << 16, "rows": 64, "width": 32} if args.small else {}
    result = made() | {"device": device_name(args.device), "torch": torch.__version__} | ceilings(args.device, **sizes)
    print(json.dumps(result, indent=1))
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
