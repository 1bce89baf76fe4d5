"""Time the ops: first an op's tests, then its implementations side by side; no figure where a test fails.

    python bench/run.py --all
    python bench/run.py --op layer_norm --models S/16,H/14 --json layer_norm.json

Of each case (bench/registry.py) in turn: the eager reference, torch.compile of it, what libraries there are, and this
project's kernel (Triton on a GPU, C++ on a CPU), forward and backward, interleaved and from a cold cache, together with
a large copy and a matrix product, the ceilings that shares refer to. Times are medians, with the quantiles .2 and .8.
Rows are added to a CSV file as they are measured; bench/report.py makes the documents' tables from it.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import re
import subprocess
import sys
from dataclasses import dataclass, fields
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch

from bench.baselines.steps import DTYPES
from bench.record import dirty, made
from bench.registry import MODELS, OPS, OWN, Batch, Case
from bench.timing import Times, Work, interleave, peak_memory, synchronise
from ijepa_fast.run.provenance import device_name

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
CPU_MODELS, CPU_BATCH = ("S/16", "B/16"), 16
# How far outputs and gradients may lie from the eager reference, as a share of their largest value.
AGREEMENT = {torch.float32: 1e-3, torch.bfloat16: 6e-2}
# The ceilings' sizes: copied bytes, and rows and columns of the product.
CEILINGS = {"cuda": (1 << 30, 8192), "cpu": (256 << 20, 1536)}


@dataclass
class Row:
    """One implementation in one pass, plain values in the units their names say."""

    date: str  # of the run's start: rows of one run have the same
    commit: str
    device: str
    versions: str
    op: str
    model: str
    images: int
    part: str
    shape: str
    dtype: str
    provider: str
    pass_: str  # forward, backward, both
    ms: float
    ms_20: float
    ms_80: float
    rounds: int
    cuda_graph: bool
    gb_per_s: float | None
    tflop_per_s: float | None
    share_of_copy: float | None
    share_of_matmul: float | None
    copy_gb_per_s: float
    matmul_tflop_per_s: float
    peak_memory_bytes: int | None  # forward and backward


class Log:
    """The CSV file, which gets each case's rows at once, and all rows for --json."""

    def __init__(self, path: Path):
        self.path, self.rows = path, []
        path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, rows: list[Row]) -> None:
        """Append `rows`, below a head if the file is new; print them."""
        new = not self.path.exists()
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, [field.name for field in fields(Row)])
            if new:
                writer.writeheader()
            writer.writerows({k: _short(v) for k, v in vars(row).items()} for row in rows)
        for row in rows:
            rate = f"{row.gb_per_s or 0:8.1f} GB/s {row.tflop_per_s or 0:8.2f} TFLOP/s"
            print(f"    {row.pass_:9} {row.provider:22} {row.ms:10.4f} ms {rate}", flush=True)
        self.rows += [vars(row) for row in rows]


def _short(value):
    return float(f"{value:.5g}") if isinstance(value, float) else value


def tests_pass(op: str) -> bool:
    """Whether the op's tests pass; prints what they say if not."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/ops/test_{op}.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    said = (done.stdout + done.stderr).strip()
    print(said[-4000:] if done.returncode else f"{op}: {said.splitlines()[-1]}", flush=True)
    return done.returncode == 0


def work_of(function, args: tuple) -> Work:
    """Forward of `function`, and backward to those of `args` that ask for a gradient, from random upstream ones."""
    leaves = [x for x in args if isinstance(x, torch.Tensor) and x.requires_grad]
    if not leaves:
        return Work(lambda: function(*args))
    upstream = [_upstream(y) for y in _tensors(function(*args)) if y.requires_grad]

    def backward(outputs):
        outputs = [y for y in _tensors(outputs) if y.requires_grad]
        return torch.autograd.grad(outputs, leaves, upstream)

    return Work(lambda: function(*args), backward)


def _tensors(outputs) -> tuple:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _upstream(y: torch.Tensor) -> torch.Tensor:
    """Ones for a loss, as in training; else numbers that no gradient vanishes for."""
    generator = torch.Generator(y.device).manual_seed(1)
    return torch.ones_like(y) if y.dim() == 0 else torch.empty_like(y).normal_(generator=generator)


def disagreement(work: Work, expected: Work, device) -> float:
    """Largest distance of outputs and gradients from the expected ones, as a share of the largest expected value."""
    results = []
    for one in (work, expected):
        outputs = one.forward()
        gradients = one.backward(outputs) if one.backward else ()
        results.append([x.detach().to(device).double() for x in (*_tensors(outputs), *gradients)])
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)) for a, b in zip(*results, strict=True))


def usable(case: Case, batch: Batch, wanted: list[str] | None) -> tuple[dict[str, Work], list[str]]:
    """The works of a case by provider, and what is wrong with this project's or PyTorch's own ones.

    A library that cannot do it, or does something else, is left out by name.
    """
    works, wrong = {}, []
    expected = work_of(case.eager, case.args)
    for name, function in case.providers.items():
        if wanted and name not in wanted and not (name in case.libraries and "library" in wanted):
            continue
        try:
            work = work_of(function, case.args)
            off = disagreement(work, expected, batch.device) if case.comparable else 0.0
            synchronise(batch.device)
        except Exception as error:
            reason = f"{name}: {' '.join(str(error).split())[:200]}"
        else:
            if off <= AGREEMENT[batch.dtype]:
                works[name] = work
                continue
            reason = f"{name}: computes something else than the reference, off by {off:.2g} of the largest value"
        print(f"    left out: {reason}", flush=True)
        if name not in case.libraries:
            wrong.append(reason)
    return works, wrong


def ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, Work]:
    """A copy and a matrix product to time among the providers."""
    size, n = CEILINGS[device.type]
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return {"copy": Work(partial(target.copy_, source)), "matmul": Work(partial(torch.mm, a, b))}


def rows_of(case: Case, times: dict[str, Times], works: dict[str, Work], batch: Batch, common: dict) -> list[Row]:
    """The rows of a measured case; `times` holds the ceilings too."""
    copied, n = CEILINGS[batch.device.type]
    amounts = {"copy": 2 * copied, "matmul": 2 * n**3}
    rates = {name: amount / float(np.median(times[name].forward)) for name, amount in amounts.items()}
    rows = []
    for name, work in works.items():
        passes = {"forward": (times[name].forward, case.bytes[0], case.flops[0])}
        if work.backward:
            passes["backward"] = times[name].backward, case.bytes[1], case.flops[1]
            passes["both"] = times[name].both, sum(case.bytes), sum(case.flops)
        memory = peak_memory(work, batch.device)
        for pass_, (seconds, moved, flops) in passes.items():
            median, low, high = (float(np.quantile(seconds, q)) for q in (0.5, 0.2, 0.8))
            rows.append(
                Row(
                    **common,
                    images=batch.images,
                    part=case.part,
                    shape=case.shape,
                    provider=name,
                    pass_=pass_,
                    ms=median * 1e3,
                    ms_20=low * 1e3,
                    ms_80=high * 1e3,
                    rounds=len(seconds),
                    cuda_graph=times[name].graph,
                    gb_per_s=moved / median / 1e9 if moved else None,
                    tflop_per_s=flops / median / 1e12 if flops else None,
                    share_of_copy=moved / median / rates["copy"] if moved else None,
                    share_of_matmul=flops / median / rates["matmul"] if flops else None,
                    copy_gb_per_s=rates["copy"] / 1e9,
                    matmul_tflop_per_s=rates["matmul"] / 1e12,
                    peak_memory_bytes=memory,
                )
            )
    return rows


def measure(op: str, model: str, batch: Batch, args, common: dict, log: Log) -> list[str]:
    """Time all cases of an op for a model; -> what is wrong."""
    wrong = []
    for case in OPS[op](batch):
        print(f"  {model} {case.part}: {case.shape}", flush=True)
        works, errors = usable(case, batch, args.providers)
        wrong += [f"{op} {model} {case.part}: {error}" for error in errors]
        if works:
            times = interleave(works | ceilings(batch.device, batch.dtype), batch.device, args.seconds, args.rounds)
            log.add(rows_of(case, times, works, batch, common | {"op": op, "model": model}))
        del works, case
        torch._dynamo.reset()
    return wrong


def about(device: torch.device, dtype: str) -> dict:
    """What every row of a run says about it."""
    libraries = {"torch": torch.__version__, "cuda": torch.version.cuda or "none"}
    for name in ("triton", "flash-attn", "flash-attn-4", "xformers"):
        try:
            libraries[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        **made(),
        "device": device_name(device),
        "versions": ", ".join(f"{k} {v}" for k, v in {"python": platform.python_version(), **libraries}.items()),
        "dtype": dtype,
    }


def slug(text: str) -> str:
    """A device's name as part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--op", help=f"of {', '.join(OPS)}, with commas")
    which.add_argument("--all", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--models", help=f"of {', '.join(MODELS)}; default: {', '.join(CPU_MODELS)} on a CPU, else all")
    parser.add_argument("--images", type=int, help=f"in the batch; default: as published, on a CPU {CPU_BATCH}")
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="default: bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--providers", help=f"of eager, compiled, library, {', '.join(OWN)}; default: all")
    parser.add_argument("--seconds", type=float, default=0.5, help="of measurement a case, about")
    parser.add_argument("--rounds", type=int, help="of measurement a case, exactly")
    parser.add_argument("--tests-passed", action="store_true", help="for a caller that has just run the ops' tests")
    parser.add_argument("--csv", metavar="FILE", type=Path, help="default: bench/results/kernels-DEVICE.csv")
    parser.add_argument("--json", metavar="FILE", type=Path)
    args = parser.parse_args(argv)
    cpu = args.device == "cpu"
    args.op = list(OPS) if args.all else args.op.split(",")
    published = [name for name in MODELS if name != "tiny"]
    args.models = args.models.split(",") if args.models else list(CPU_MODELS) if cpu else published
    args.providers = args.providers and args.providers.split(",")
    args.dtype = args.dtype or ("fp32" if cpu else "bf16")
    for name, given, known in (("op", args.op, OPS), ("models", args.models, MODELS)):
        if unknown := set(given) - set(known):
            parser.error(f"--{name}: expected of {', '.join(known)}, got {', '.join(sorted(unknown))}")
    return args


def main(argv: list[str] | None = None) -> int:
    """Test, time, write; 1 where a test failed or an implementation is broken."""
    args = parse(argv)
    device = torch.device(args.device)
    common = about(device, args.dtype)
    log = Log(args.csv or RESULTS / f"kernels-{slug(common['device'])}.csv")
    print(f"{common['device']}, {common['versions']}, commit {common['commit']} -> {log.path}")
    if dirty(common["commit"]):
        print("what is measured is in no commit: bench/report.py will refuse these rows")
    wrong = []
    for op in args.op:
        if not args.tests_passed and not tests_pass(op):
            wrong.append(f"{op}: its tests fail, so it was not timed")
            continue
        print(op, flush=True)
        for model in args.models:
            sizes = MODELS[model]
            images = args.images or (min(sizes.batch, CPU_BATCH) if args.device == "cpu" else sizes.batch)
            torch.manual_seed(0)
            wrong += measure(op, model, Batch(sizes, images, device, DTYPES[args.dtype]), args, common, log)
    if args.json:
        args.json.write_text(json.dumps(log.rows, indent=1))
    print(*(f"error: {line}" for line in wrong), sep="\n", end="\n" if wrong else "")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
