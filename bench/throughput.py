"""Throughput of whole training steps, implementations side by side in one run.

    python bench/throughput.py --method ijepa --impl fast,strong,plain --model vit_small --batch 16 --device cpu

All contenders start from the same weights and take the same images and masks; a run in which their first losses or
gradients differ is refused. They take turns, a few steps each, so that a machine that is busy or warm is so for all.
Images/s may be compared at equal tokens only: opponents hold masks as rectangles, so they truncate the context, as
published.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch

from bench.baselines import others
from bench.baselines.case import Case
from bench.baselines.contenders import FAST, LR, Contender, make_contenders
from bench.baselines.steps import DTYPES
from bench.record import made
from bench.timing import synchronise
from ijepa_fast.config import ARCHITECTURES, load_config
from ijepa_fast.kernels.common.memory import keep_freed_memory
from ijepa_fast.methods import ibot, mae
from ijepa_fast.methods.method import METHODS, method_class
from ijepa_fast.models.flops import PEAKS
from ijepa_fast.run.provenance import device_name

IMPLS = (*FAST, "strong", "plain", "published")
CONTEXTS = ("truncate", "full", "budget")
# Relative differences of loss and gradient norm by rounding: fp32, and low precision whose casts differ.
AGREEMENT = {"fp32": (1e-4, 1e-3), "bf16": (3e-2, 2e-1)}


class Failures(dict):
    """Why a contender has no row, by its name and context. Nothing that one of them raises ends the others' run."""

    @contextmanager
    def of(self, contender: Contender) -> Iterator[None]:
        """Note what is raised for `contender`."""
        try:
            yield
        except Exception as error:
            self[contender.name, contender.context] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            contender.step = contender.evaluate = contender.network = None
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def left(self, contenders: list[Contender]) -> list[Contender]:
        """Those that have not failed."""
        return [c for c in contenders if (c.name, c.context) not in self]


def check_agreement(contenders: list[Contender], precision: str, failures: Failures | None = None) -> None:
    """Compare the first batch's loss and gradient of contenders of equal context.

    One against two or more has failed; where it is not clear who is wrong, raise ValueError.
    """
    failures = Failures() if failures is None else failures
    for context in sorted({c.context for c in contenders}):
        found = {}
        for c in contenders:
            if c.context == context and c.network is not None:
                with failures.of(c):
                    found[c.name] = c.fingerprint()
        if not found:
            continue
        middle, bound = np.median(list(found.values()), axis=0), np.array(AGREEMENT[precision])
        wrong = [name for name, value in found.items() if not (np.abs(value - middle) <= bound * middle).all()]
        if wrong and 2 * len(wrong) >= len(found):
            raise ValueError(
                f"the contenders do not compute the same step, so their times mean nothing; "
                f"first loss and gradient norm: {found}"
            )
        for c in contenders:
            if c.context == context and c.name in wrong:
                with failures.of(c):
                    raise ValueError(f"computes another step: loss and gradient norm {found[c.name]}, not {middle}")


class Ceiling:
    """The rate of a matrix product of the model's MLP shape, measured among the contenders."""

    def __init__(self, case: Case):
        dim = case.sizes["dim"]
        rows = case.batch * case.patches
        options = {"device": case.device, "dtype": DTYPES[case.precision]}
        self.a, self.b = torch.randn(rows, dim, **options), torch.randn(dim, 4 * dim, **options)
        self.flops = 2 * rows * dim * 4 * dim
        self.seconds: list[float] = []

    def measure(self, device: str) -> None:
        """Time the product for about a twentieth of a second."""
        times = 0
        start = time.perf_counter()
        while time.perf_counter() - start < 0.05:
            for _ in range(5):
                self.a @ self.b
            synchronise(device)
            times += 5
        self.seconds.append((time.perf_counter() - start) / times)

    @property
    def rate(self) -> float:
        """FLOP/s."""
        return self.flops / float(np.median(self.seconds))


def measure(
    contenders: list[Contender],
    case: Case,
    rounds: int,
    steps: int,
    warmup: int,
    with_data=None,
    failures: Failures | None = None,
    after: Callable[[list[Contender], dict], object] = lambda contenders, measured: None,
) -> dict:
    """Seconds a step of each contender by round, (contenders, rounds), the peak memory of each, and the ceiling.

    with_data: gives (images, masks) as a loader does; batches are then prepared inside the measured time. failures:
    those that fail are noted there and left out. after: called after every round with those that are left and what is
    measured so far.
    """
    ceiling, failures = Ceiling(case), Failures() if failures is None else failures
    seconds: dict[int, list[float]] = {id(c): [] for c in contenders}
    peak = dict.fromkeys(seconds, 0)
    cuda = case.device.startswith("cuda")

    def measured(left: list[Contender]) -> dict:
        values = np.array([seconds[id(c)] for c in left])
        return {"seconds": values, "step_memory": [peak[id(c)] for c in left], "ceiling": ceiling.rate}

    for r in range(rounds + 1):
        for contender in failures.left(contenders):
            count = warmup if r == 0 else steps
            with failures.of(contender):
                if cuda:
                    torch.cuda.reset_peak_memory_stats(case.device)
                    held = torch.cuda.memory_allocated(case.device)
                synchronise(case.device)
                start = time.perf_counter()
                for step in range(count):
                    if with_data is None:
                        contender.run(step)
                    else:
                        contender.step(contender.prepare(*next(with_data)), lr=LR)
                synchronise(case.device)
                if r:
                    seconds[id(contender)].append((time.perf_counter() - start) / count)
                elif said := getattr(contender.step, "said", None):
                    raise RuntimeError(said[0])
                if cuda:
                    # What graphs hold is held between steps too.
                    graphs = getattr(contender.step, "graphs", None) is not None
                    used = torch.cuda.memory_reserved(case.device) if graphs else held
                    most = torch.cuda.max_memory_allocated(case.device)
                    peak[id(contender)] = max(peak[id(contender)], used if graphs else most - held)
        ceiling.measure(case.device)
        if r:
            left = failures.left(contenders)
            after(left, measured(left))
    return measured(failures.left(contenders))


def rows_of(contenders, case: Case, measured: dict, data: bool) -> list[dict]:
    """One record a contender, plain values in the units their names say; ratios are medians over the rounds."""
    seconds = measured["seconds"]
    slowest, plain_fp32 = (
        next((i for i, c in enumerate(contenders) if c.name == name), None) for name in ("plain", "plain, fp32")
    )
    peak = next((v for k, v in PEAKS.items() if k in device_name(case.device)), None)
    rows = []
    for i, c in enumerate(contenders):
        median, low, high = (float(np.quantile(seconds[i], q)) for q in (0.5, 0.2, 0.8))
        rate = c.work * 1e9 * case.batch / median
        same_tokens = [at is not None and contenders[at].context == c.context for at in (slowest, plain_fp32)]
        rows.append(
            {
                "impl": c.name,
                "context": c.context,
                "data": data,
                "seconds_per_step": median,
                "seconds_20": low,
                "seconds_80": high,
                "images_per_second": case.batch / median,
                "tokens_per_second": case.batch * c.tokens / median,
                "tokens_per_image": c.tokens,
                "gflop_per_image": c.work,
                "executed_gflop_per_image": c.executed,
                "tflops": rate / 1e12,
                "share_of_ceiling": rate / measured["ceiling"],
                "share_of_peak": rate / peak if peak and case.low_precision else None,
                "step_memory_bytes": measured["step_memory"][i] or None,
                "speedup_over_plain": float(np.median(seconds[slowest] / seconds[i])) if same_tokens[0] else None,
            }
        )
        if plain_fp32 is not None:
            ratio = float(np.median(seconds[plain_fp32] / seconds[i])) if same_tokens[1] else None
            rows[-1]["speedup_over_plain_fp32"] = ratio
    return rows


def table(rows: list[dict]) -> str:
    """The records as a Markdown table."""
    heads = ("impl", "context", "data", "images/s", "tokens/s", "tokens/image", "GFLOP/image", "TFLOP/s")
    heads += ("of GEMM", "of peak", "step memory, GB", "x plain")
    both = any("speedup_over_plain_fp32" in r for r in rows)
    heads += ("x plain fp32",) * both
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for r in rows:
        cells = (
            r["impl"],
            r["context"],
            "yes" if r["data"] else "no",
            f"{r['images_per_second']:.1f}",
            f"{r['tokens_per_second']:.0f}",
            f"{r['tokens_per_image']:.0f}",
            f"{r['gflop_per_image']:.1f}",
            f"{r['tflops']:.3f}",
            f"{r['share_of_ceiling']:.0%}",
            _or_dash(r["share_of_peak"], "{:.0%}"),
            _or_dash(r["step_memory_bytes"], "{:.2f}", 1e-9),
            _or_dash(r["speedup_over_plain"], "{:.2f}"),
        )
        if both:
            cells += (_or_dash(r.get("speedup_over_plain_fp32"), "{:.2f}"),)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _or_dash(value, form: str, scale: float = 1.0) -> str:
    return "-" if value is None else form.format(value * scale)


def stream(case: Case, folder: str, threads: int):
    """Endless (images, masks) from the project's loader of `folder`, as the method crops; masks drawn when needed."""
    from ijepa_fast.data.dali import TrainLoader
    from ijepa_fast.data.sources import open_source
    from ijepa_fast.data.views import ViewLoader

    source, common = open_source(folder), {"batch_size": case.batch, "seed": case.seed, "threads": threads}
    if case.method == "ibot":
        loader = ViewLoader(source, views=ibot.views_of(case.crop, case.patch), **common)
    elif case.method not in ("ijepa", "mae") and (views := others.sketch(case).views()):
        loader = ViewLoader(source, views=views, **common)
    else:
        loader = TrainLoader(source, crop=case.crop, **(mae.VIEW if case.method == "mae" else {}), **common)
    try:
        for i, batch in enumerate(loader):
            yield batch.images, case.masks(i)
    finally:
        loader.close()


def largest_batch(case: Case, context: str) -> int:
    """The largest power of two whose step fits into the GPU's memory, truncated or not."""
    best, batch = 0, 8
    while True:
        trial = Case(**asdict(case) | {"batch": batch, "batches": 1})
        try:
            (contender,) = make_contenders(trial, ["fast"], [context])
            contender.run(0)
            contender.run(0)
            synchronise(case.device)
        except torch.OutOfMemoryError:
            return best
        finally:
            contender = None
            gc.collect()
            torch.cuda.empty_cache()
        best, batch = batch, 2 * batch


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line. Exits with one sentence for a value that does not exist."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", choices=METHODS, default="ijepa")
    parser.add_argument("--impl", default="fast,strong,plain", help=f"of {', '.join(IMPLS)}, with commas")
    parser.add_argument("--model", choices=sorted(ARCHITECTURES), default="vit_small")
    parser.add_argument("--config", metavar="FILE", help="the model, crop and patch of a run instead, see configs/")
    parser.add_argument("--crop", type=int, default=224)
    parser.add_argument("--patch", type=int, default=16)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--predictor-depth", type=int, help="default: the published one for the model")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=sorted(DTYPES), help="default: bf16 on a GPU, fp32 on a CPU")
    parser.add_argument(
        "--beside", choices=sorted(DTYPES), help="also time all of --impl in this precision, in the same turns"
    )
    parser.add_argument("--context", default="truncate", help=f"of {', '.join(CONTEXTS)}, with commas")
    parser.add_argument(
        "--engine", type=int, metavar="ZERO", help="also time this project's steps through DeepSpeed at this stage"
    )
    parser.add_argument("--external", metavar="PATH", help="also time a checkout of the published I-JEPA code")
    parser.add_argument(
        "--compile",
        help="of fast, strong (one graph), strong-blocks, none; default: fast,strong on a GPU, none on a CPU",
    )
    parser.add_argument("--data", metavar="FOLDER", help="also measure with images decoded from this folder")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="decoding threads")
    parser.add_argument(
        "--breakdown", action="store_true", help="the time of each stage of `fast` beside the roofline's prediction"
    )
    parser.add_argument("--max-batch", action="store_true", help="only find the largest batch of `fast` on the GPU")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="of each contender in a round")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args(argv)
    args.impl = args.impl.split(",")
    args.context = args.context.split(",")
    for name, allowed in (("impl", IMPLS), ("context", CONTEXTS)):
        if unknown := set(getattr(args, name)) - set(allowed):
            parser.error(f"--{name}: expected of {', '.join(allowed)}, got {', '.join(sorted(unknown))}")
    if args.external and "published" not in args.impl:
        args.impl.append("published")
    if "published" in args.impl and not args.external:
        parser.error("--impl published: expected --external PATH, a checkout of the published code")
    if args.method != "ijepa" and (args.external or args.engine is not None):
        parser.error("--external and --engine are for --method ijepa")
    if args.breakdown and (args.method != "ijepa" or "fast" not in args.impl):
        parser.error("--breakdown: expected --method ijepa with fast among --impl")
    if args.config and (args.method != "ijepa" or args.external):
        parser.error("--config is for --method ijepa, without --external: it names no published model")
    if args.max_batch and not args.device.startswith("cuda"):
        parser.error("--max-batch: expected --device cuda, there is no limit to find on a CPU")
    if args.beside and args.device.startswith("cuda"):
        parser.error("--beside: expected --device cpu")
    cuda = args.device.startswith("cuda")
    args.precision = args.precision or ("bf16" if cuda else "fp32")
    args.compile = args.compile or ("fast,strong" if cuda else "none")
    for impl in args.impl:
        if "graphs" in impl and ("graphs" not in method_class(args.method).capabilities or not cuda):
            able = " or ".join(name for name in METHODS if "graphs" in method_class(name).capabilities)
            parser.error(f"--impl {impl}: expected --method {able}, and --device cuda")
        if "fp8" in impl and (args.method != "ijepa" or args.precision != "bf16"):
            parser.error(f"--impl {impl}: expected --method ijepa and --precision bf16, which it is compared with")
    return args


def model_of(path: str) -> dict:
    """The keyword arguments of a Case that say which model the run's configuration at `path` trains."""
    config = load_config(path)
    model = config.model
    return {
        "arch": model.arch or config.name,
        "widths": (model.dim, model.depth, model.heads, model.mlp_ratio, model.predictor_dim),
        "crop": config.data.crop,
        "patch": model.patch,
        "predictor_depth": model.predictor_depth,
    }


def run(argv: list[str] | None = None) -> dict:
    """Measure as the command line says; -> what is written as JSON."""
    args = parse(argv)
    model = {"arch": args.model, "crop": args.crop, "patch": args.patch, "predictor_depth": args.predictor_depth}
    case = Case(
        method=args.method,
        batch=args.batch,
        device=args.device,
        precision=args.precision,
        seed=args.seed,
        compile=tuple(args.compile.split(",")),
        **(model_of(args.config) if args.config else model),
    )
    about = made() | {"case": asdict(case), "device": device_name(args.device), "torch": torch.__version__}
    if args.max_batch:
        return about | {"max_batch": {context: largest_batch(case, context) for context in args.context}}
    if args.device == "cpu":
        keep_freed_memory()  # for all contenders
    failures = Failures()
    contenders = make_contenders(case, args.impl, args.context, args.external, args.engine, failures)
    if not contenders:
        raise ValueError(f"--impl {','.join(args.impl)}: nothing to measure with --context {','.join(args.context)}")
    check_agreement(contenders, case.precision, failures)
    if args.beside:
        other = Case(**asdict(case) | {"precision": args.beside})
        more = make_contenders(other, args.impl, args.context, args.external, args.engine, failures)
        check_agreement(more, other.precision, failures)
        for contender in more:
            contender.name += f", {args.beside}"
        contenders += more
    contenders = failures.left(contenders)
    # Every batch runs once and is captured once before it is replayed.
    warmup = max(args.warmup, 2 * case.batches) if any("graphs" in impl for impl in args.impl) else args.warmup
    schedule = {"rounds": args.rounds, "steps": args.steps, "warmup": warmup}
    before: list[dict] = []

    def result_of(left: list[Contender], measured: dict, data: bool) -> dict:
        found = {"ceiling_tflops": measured["ceiling"] / 1e12, "rows": before + rows_of(left, case, measured, data)}
        failed = {f"{name}, {context}": why for (name, context), why in failures.items()}
        return about | schedule | {"rounds": measured["seconds"].shape[-1], "failed": failed} | found

    def save(left: list[Contender], measured: dict, data: bool = False) -> None:
        if args.json:
            Path(args.json).write_text(json.dumps(result_of(left, measured, data), indent=1))

    measured = measure(contenders, case, **schedule, failures=failures, after=save)
    contenders = failures.left(contenders)
    if not contenders:
        raise ValueError(f"nothing was measured: {dict(failures)}")
    result = result_of(contenders, measured, data=False)
    if args.data:
        batches, before = stream(case, args.data, args.threads), result["rows"]
        others = measure(contenders, case, **schedule, with_data=batches, failures=failures)
        result = result_of(failures.left(contenders), others, data=True)
        batches.close()
    launched = next((c for c in contenders if c.name == "fast"), None)
    if args.breakdown and launched is not None:
        from bench.breakdown import breakdown

        result["stages"] = breakdown(launched, case, measured["ceiling"], args.rounds * args.steps)
    return result


def main(argv: list[str] | None = None) -> int:
    """Print the table, write the JSON. Returns the exit status."""
    try:
        result = run(argv)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{result['device']}, torch {result['torch']}")
    if "max_batch" in result:
        for context, batch in result["max_batch"].items():
            print(f"largest batch, context {context}: {batch}")
    else:
        print(f"{result['case']}\nGEMM of the model's MLP: {result['ceiling_tflops']:.3f} TFLOP/s")
        print(table(result["rows"]))
        for name, why in result["failed"].items():
            print(f"{name}: no row, {why}")
    if "stages" in result:
        from bench.breakdown import table as stage_table

        print(stage_table(result["stages"]))
    path = parse(argv).json
    if path:
        Path(path).write_text(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
