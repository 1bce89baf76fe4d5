"""Variants that only a device can choose among, each timed at a model's shapes; what is fastest is for the tables.

    python bench/sweep.py --what tiles,target,fp8 [--json FILE]

tiles: of attention's backward (kernels/varlen_attention/tiles.py), those that `--compile FILE` found to compile without
spills, for which no GPU is needed. target: the backends of the target encoder's dense attention. fp8: the
target encoder's products scaled by row and by tensor, beside bf16.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain, product
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from bench import aot
from bench.aot import ROOT
from bench.ceilings import seconds
from bench.record import made
from ijepa_fast.kernels.varlen_attention import dense_attention, tiles, varlen_attention_qkv
from ijepa_fast.kernels.varlen_attention.tiles import Tile
from ijepa_fast.run.provenance import device_name


@dataclass(frozen=True)
class Shape:
    """Attention of one stack: `count` sequences of up to `length` tokens, and heads."""

    name: str
    count: int
    length: int
    heads: int
    head_dim: int


# Of a batch of 128: context encoders and predictors (four target blocks) whose heads are of different widths.
SHAPES = (
    Shape("context H/14", 128, 192, 16, 80),
    Shape("predictor H/14", 512, 224, 16, 24),
    Shape("context L/16", 128, 150, 16, 64),
    Shape("predictor B/16", 512, 180, 12, 32),
)
TARGET = Shape("target H/14", 128, 256, 16, 80)
SMALL = Shape("small", 2, 16, 2, 32)
KERNEL = "ijepa_fast.kernels.varlen_attention.kernel"
CANDIDATES = tuple(Tile(*x, 2) for x in product((32, 64), (64, 128), (4, 8)))
# By the kernels' names in aot_cases; the one-pass backward holds all keys of a sequence, so its tiles are wider.
TABLES = {"bwd queries": "BWD_QUERIES", "bwd keys": "BWD_KEYS", "bwd whole": "WHOLE"}


@contextmanager
def forced(kind: str, capability: int, head_dim: int, tile: Tile) -> Iterator[None]:
    """The tables of tiles.py with `tile` for this kernel and width alone."""
    tables = getattr(tiles, TABLES[kind])
    family, width = tiles._family(capability), tiles._width(head_dim)
    before = tables[family]
    tables[family] = before | {width: (tile,) if kind == "bwd whole" else tile}
    try:
        yield
    finally:
        tables[family] = before


def compiled(job: tuple[str, int, int, Tile]) -> dict[str, Any]:
    """(kernel, capability, head dim, tile), compiled ahead of time: registers, spilled bytes, or what is wrong."""
    kind, capability, head_dim, tile = job
    if kind == "bwd whole":  # one pass, nothing to overlap
        tile = tile._replace(stages=1)
    with forced(kind, capability, head_dim, tile):
        cases = importlib.import_module(KERNEL).aot_cases(capability)
        index = next(i for i, c in enumerate(cases) if f" {kind}" in c.name and f"hd={head_dim} " in c.name)
        result = aot.compile_case(KERNEL, index, 10 * capability)
    facts = {"kernel": kind, "capability": capability, "head_dim": head_dim, "tile": list(tile)}
    return facts | {"registers": result.registers, "spilled": result.spilled_bytes, "error": result.error}


def compile_tiles(capabilities: list[int], candidates: tuple[Tile, ...], processes: int) -> Iterator[dict[str, Any]]:
    """Every candidate at every width, for devices that need not be here."""
    # The interpreter would take the kernels' place. The processes below read this before they import Triton.
    os.environ.pop("TRITON_INTERPRET", None)
    widths = {shape.head_dim for shape in SHAPES}
    jobs = list(product(TABLES, capabilities, sorted(widths), candidates))
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(compiled, jobs)


def packed(shape: Shape, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """qkv (T, 3, H, d) and cu_seqlens of ragged sequences, the mean three quarters of the longest."""
    lengths = torch.linspace(shape.length // 2, shape.length, shape.count).int()
    ends = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    qkv = torch.randn(int(ends[-1]), 3, shape.heads, shape.head_dim, device=device).bfloat16()
    return qkv.requires_grad_(), ends.to(device)


def time_tiles(device: str, shapes: tuple[Shape, ...], allowed: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Seconds of the whole backward with each tile that compiles well; the first is the table's own."""
    capability = torch.cuda.get_device_capability()[0]
    for shape in shapes:
        qkv, ends = packed(shape, device)
        out = varlen_attention_qkv(qkv, ends, shape.length, backend="triton")
        upstream = torch.randn_like(out)

        def backward(out=out, qkv=qkv, upstream=upstream):
            torch.autograd.grad(out, qkv, upstream, retain_graph=True)

        yield {"what": "tiles", "shape": shape.name, "tile": None, "seconds": seconds(backward, device, 10)}
        for found in allowed:
            if found["head_dim"] == shape.head_dim and found["capability"] == capability and not found["error"]:
                with forced(found["kernel"], capability, shape.head_dim, Tile(*found["tile"])):
                    yield {"what": "tiles", "shape": shape.name} | found | {"seconds": seconds(backward, device, 10)}


def time_target(device: str, shape: Shape) -> Iterator[dict[str, Any]]:
    """Dense attention without gradient by PyTorch's backends, and by this project's."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    qkv = torch.randn(shape.count, shape.length, 3, shape.heads, shape.head_dim, device=device).bfloat16()
    runs: dict[str, Callable] = {"default": lambda: dense_attention(qkv, "sdpa")}
    if device.startswith("cuda"):
        runs["triton"] = lambda: dense_attention(qkv, "triton")

    def by(backend: SDPBackend) -> None:
        with sdpa_kernel(backend):
            dense_attention(qkv, "sdpa")

    for name in ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH"):
        runs[name.lower()] = partial(by, getattr(SDPBackend, name))
    for name, function in runs.items():
        found = {"what": "target", "shape": shape.name, "backend": name}
        try:
            with torch.no_grad():
                yield found | {"seconds": seconds(function, device, 10)}
        except RuntimeError as error:
            yield found | {"error": str(error).splitlines()[0]}


def time_fp8(device: str, rows: int, width: int) -> Iterator[dict[str, Any]]:
    """The products of an MLP in bf16 and in e4m3, scaled by row and by tensor."""
    fp8 = torch.float8_e4m3fn
    for inner, outer in ((width, 4 * width), (4 * width, width), (width, 3 * width)):
        x, w = (torch.randn(n, inner, device=device).bfloat16() for n in (rows, outer))
        x8, w8, one = x.to(fp8), w.to(fp8), torch.ones((), device=device)
        by_row = torch.ones(rows, 1, device=device), torch.ones(1, outer, device=device)
        scaled = partial(torch._scaled_mm, x8, w8.t(), use_fast_accum=True, out_dtype=torch.bfloat16)
        runs = {
            "bf16": partial(torch.mm, x, w.t()),
            "fp8 by row": partial(scaled, *by_row),
            "fp8 by tensor": partial(scaled, one, one),
        }
        for name, function in runs.items():
            found = {"what": "fp8", "product": [rows, inner, outer], "variant": name}
            try:
                yield found | {"seconds": seconds(function, device, 10)}
            except RuntimeError as error:
                yield found | {"error": str(error).splitlines()[0]}


def main(argv: list[str] | None = None) -> int:
    """Print a line a variant, write them as they come."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--what", default="tiles,target,fp8", help="of tiles, target, fp8, with commas")
    parser.add_argument("--compile", metavar="FILE", help="only compile all tiles for sm_90 and sm_100, into this file")
    parser.add_argument(
        "--tiles", metavar="FILE", default="bench/results/tiles-compiled.json", help="what --compile made"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--small", action="store_true", help="tries the command, measures nothing")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args(argv)
    if args.compile:
        found = []
        for one in compile_tiles([9, 10], CANDIDATES[:1] if args.small else CANDIDATES, args.processes):
            found.append(one)
            Path(args.compile).write_text("[\n" + ",\n".join(map(json.dumps, found)) + "\n]\n")
        print(f"{len(found)} compiled, {sum(not x['error'] for x in found)} of them without spills")
        return 0
    wanted, cuda = args.what.split(","), args.device.startswith("cuda")
    rows: list[dict[str, Any]] = []
    parts: list[Iterator[dict[str, Any]]] = []
    if "tiles" in wanted and cuda:
        parts.append(time_tiles(args.device, SHAPES, json.loads((ROOT / args.tiles).read_text())))
    if "target" in wanted:
        parts.append(time_target(args.device, SMALL if args.small else TARGET))
    if "fp8" in wanted:
        parts.append(time_fp8(args.device, *((32, 32) if args.small else (128 * 256, 1280))))
    for row in chain(*parts):
        rows.append(row)
        print(json.dumps(row), flush=True)
        if args.json:
            facts = made() | {"device": device_name(args.device), "torch": torch.__version__}
            Path(args.json).write_text(json.dumps(facts | {"rows": rows}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
