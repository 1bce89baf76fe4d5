"""What a step costs with each of I-JEPA's options, beside one without, in one run.

    python bench/options.py --model vit_small --batch 128                # on a GPU
    python bench/options.py --model vit_small --batch 8 --precision bf16 --device cpu

A step with an option and one without take turns, on the same images, and the time of one is divided by that of the
other beside it: median and quartiles of these ratios. "none" is a step without options beside another, which says what
the machine's noise makes of two that are alike. A step is forward and backward, without the optimiser, launched from
Python: no CUDA graphs and nothing compiled. Work is what each step counts, over that without options. A frozen teacher
is an encoder of the same size.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from bench.baselines.steps import DTYPES
from bench.compare.runs import OPTIONS
from bench.record import show
from bench.timing import synchronise
from ijepa_fast.command import whole
from ijepa_fast.config import ARCHITECTURES, load_config
from ijepa_fast.masks.draw import Draw
from ijepa_fast.methods.method import Method
from ijepa_fast.models.vit import Encoder
from ijepa_fast.run.build import build_method
from ijepa_fast.run.provenance import provenance

NONE = "none"
# Options that are no part of forward and backward, or other masks: a step with such masks is another step; and deeper
# targets than those of "deep", which are the same pass.
SAME = ("flip", "crop", "mae-optimiser", "falling-average", "small-blocks", "random-masks", "all-blocks")
MEASURED = tuple(name for name in OPTIONS if name not in SAME)
WARM_UP = 2  # rounds that compile


def method_of(name: str, overrides: list[str], device: torch.device, dtype: torch.dtype) -> Method:
    """A method with an option, or without where the name is "none", on the device."""
    changes = [*OPTIONS.get(name, []), *(["objective.options.teacher_from=here"] if name == "salt" else [])]
    method = build_method(load_config("vit_small16", [*overrides, *changes]))
    for wanted in method.wanted:
        teacher = Encoder(**method.setup.encoder_sizes).requires_grad_(False).eval()
        method.give(wanted, teacher, method.setup.data.mean, method.setup.data.std)
    for network in [*method.networks.values(), *method.frozen.values()]:
        network.to(device, dtype)
    method.carried = {key: tensor.to(device) for key, tensor in method.carried.items()}
    return method


def seconds(method: Method, images: torch.Tensor, draw: Draw) -> float:
    """Of forward and backward of a step."""
    synchronise(images.device.type)
    begin = time.perf_counter()
    loss, _ = method(images, draw)
    loss.backward()
    synchronise(images.device.type)
    method.zero_grad()
    return time.perf_counter() - begin


def beside(name: str, plain: Method, other: Method, images: torch.Tensor, rounds: int) -> dict[str, Any]:
    """A row of the table: the steps of `other` beside those of `plain`, of which each comes first in turn."""
    times: list[tuple[float, float]] = []
    work = [0, 0]
    for step in range(WARM_UP + rounds):
        draws = [method.draw(len(images), 0, step) for method in (plain, other)]
        order = (0, 1) if step % 2 else (1, 0)
        taken = {i: seconds((plain, other)[i], images, draws[i].to(images.device)) for i in order}
        if step >= WARM_UP:
            times.append((taken[0], taken[1]))
            work = [work[i] + (plain, other)[i].work(draws[i]).total for i in range(2)]
    ratios = [b / a for a, b in times]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive") if rounds > 1 else ratios * 3
    milliseconds = 1e3 * statistics.median(b for _, b in times)
    return {"option": name, "ms": milliseconds, "ratio": middle, "quartiles": [low, high], "work": work[1] / work[0]}


def table(result: dict[str, Any]) -> list[str]:
    """What was measured, as Markdown."""
    lines = [f"{result['device']}; {result['sizes']}; {result['rounds']} rounds.", ""]
    lines += ["| option | ms | times the step without it (quartiles) | times its work |", "|---|---|---|---|"]
    for row in result["rows"]:
        spread = " to ".join(f"{value:.3f}" for value in row["quartiles"])
        lines.append(f"| {row['option']} | {row['ms']:.1f} | {row['ratio']:.3f} ({spread}) | {row['work']:.3f} |")
    return lines


def main(argv: list[str] | None = None) -> int:
    """Print the table, write the JSON. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", default=",".join(MEASURED), help=f"of {', '.join(MEASURED)}, with commas")
    parser.add_argument("--model", choices=sorted(ARCHITECTURES), default="vit_small")
    parser.add_argument("--crop", type=int, default=224)
    parser.add_argument("--patch", type=int, default=16)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=sorted(DTYPES), help="default: bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--rounds", type=whole(), default=10)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args(argv)
    names = args.runs.split(",")
    if unknown := sorted(set(names) - set(MEASURED)):
        parser.error(f"--runs: expected of {', '.join(MEASURED)}, got {', '.join(unknown)}")
    device = torch.device(args.device)
    precision = args.precision or ("bf16" if device.type == "cuda" else "fp32")
    overrides = [f"model.arch={args.model}", f"model.patch={args.patch}", f"data.crop={args.crop}"]
    overrides += [f"batch_size={args.batch}", *args.overrides]
    images = torch.randint(256, (args.batch, args.crop, args.crop, 3), dtype=torch.uint8, device=device)
    plain = method_of(NONE, overrides, device, DTYPES[precision])
    rows = []
    for name in [NONE, *sorted(set(names), key=MEASURED.index)]:
        other = method_of(name, overrides, device, DTYPES[precision])
        rows.append(beside(name, plain, other, images, args.rounds))
        print(f"{name}: {rows[-1]['ratio']:.3f}", file=sys.stderr, flush=True)
    sizes = f"{args.model}/{args.patch}, crop {args.crop}, batch {args.batch}, {precision}"
    result = provenance(device) | {"sizes": sizes, "rounds": args.rounds, "rows": rows}
    show(result, table(result), args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
