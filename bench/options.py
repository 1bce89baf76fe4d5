"""What a step costs with each of I-JEPA's options, beside one without, in one run.

    python bench/options.py --model vit_small --batch 128                # on a GPU
    python bench/options.py --model vit_small --batch 8 --device cpu

Steps of all kinds take turns, on the same images; a step is forward and backward, without the optimiser, launched from
Python: no CUDA graphs and nothing compiled. Printed are medians in ms, over the step without options, and the work that
each counts, over the same. A frozen teacher is an encoder of the same size.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from bench.baselines.steps import DTYPES
from bench.compare.runs import OPTIONS
from bench.timing import synchronise
from ijepa_fast.config import ARCHITECTURES, load_config
from ijepa_fast.masks.draw import Draw
from ijepa_fast.methods.method import Method
from ijepa_fast.models.vit import Encoder
from ijepa_fast.run.build import build_method
from ijepa_fast.run.provenance import device_name


def methods_of(names: list[str], overrides: list[str], device: torch.device, dtype: torch.dtype) -> dict[str, Method]:
    """A method without options, and one with each of `names`, on the device."""
    found = {}
    for name in ["none", *names]:
        changes = [*OPTIONS.get(name, []), *(["objective.options.teacher_from=here"] if name == "salt" else [])]
        method = build_method(load_config("vit_small16", [*overrides, *changes]))
        for wanted in method.wanted:
            teacher = Encoder(**method.setup.encoder_sizes).requires_grad_(False).eval()
            method.give(wanted, teacher, method.setup.data.mean, method.setup.data.std)
        for network in [*method.networks.values(), *method.frozen.values()]:
            network.to(device, dtype)
        method.carried = {key: tensor.to(device) for key, tensor in method.carried.items()}
        found[name] = method
    return found


def seconds(method: Method, images: torch.Tensor, draw: Draw) -> float:
    """Of forward and backward of a step."""
    synchronise(images.device.type)
    begin = time.perf_counter()
    loss, _ = method(images, draw)
    loss.backward()
    synchronise(images.device.type)
    method.zero_grad()
    return time.perf_counter() - begin


def main(argv: list[str] | None = None) -> int:
    """Print the table. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", default=",".join(OPTIONS), help=f"of {', '.join(OPTIONS)}, with commas")
    parser.add_argument("--model", choices=sorted(ARCHITECTURES), default="vit_small")
    parser.add_argument("--crop", type=int, default=224)
    parser.add_argument("--patch", type=int, default=16)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=sorted(DTYPES), help="default: bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args(argv)
    names = args.runs.split(",")
    if unknown := sorted(set(names) - set(OPTIONS)):
        parser.error(f"--runs: expected of {', '.join(OPTIONS)}, got {', '.join(unknown)}")
    names.sort(key=list(OPTIONS).index)
    device = torch.device(args.device)
    precision = args.precision or ("bf16" if device.type == "cuda" else "fp32")
    overrides = [f"model.arch={args.model}", f"model.patch={args.patch}", f"data.crop={args.crop}"]
    overrides += [f"batch_size={args.batch}", *args.overrides]
    methods = methods_of(names, overrides, device, DTYPES[precision])
    images = torch.randint(256, (args.batch, args.crop, args.crop, 3), dtype=torch.uint8, device=device)
    times: dict[str, list[float]] = {name: [] for name in methods}
    work: dict[str, list[int]] = {name: [] for name in methods}
    for step in range(args.rounds + 2):
        for name, method in methods.items():
            draw = method.draw(args.batch, 0, step)
            taken = seconds(method, images, draw.to(device))
            if step >= 2:  # the first ones compile and warm up
                times[name].append(taken)
                work[name].append(method.work(draw).total)
    plain, counted = statistics.median(times["none"]), sum(work["none"])
    sizes = f"{args.model}/{args.patch}, crop {args.crop}, batch {args.batch}, {precision}"
    print(f"{device_name(args.device)}, torch {torch.__version__}, {sizes}")
    print("| option | ms | time, over none | work, over none |\n|---|---|---|---|")
    for name in methods:
        median = statistics.median(times[name])
        print(f"| {name} | {1e3 * median:.2f} | {median / plain:.3f} | {sum(work[name]) / counted:.3f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
