"""The papers' efficiency claims on this machine: hours of each published run at the rate measured here, and its work.

    python bench/claims.py                              # measures every run at its published size, on one device
    python bench/claims.py --small                      # measures small stand-ins: tries the command, not a claim
    python bench/claims.py --load runs/claims           # only makes table and plot of an earlier measurement anew

Rates are bench/throughput.py's: whole steps of this engine, without data loading. What bench/gpu_suite.py measured on
this device is taken from its files. Hours are images of all epochs over
that rate. Work is counted by each method's step_work, of the published computation at the published batch's masks.
Writes claims.json, claims.md and claims.png to --out.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from bench import throughput
from bench.baselines.case import Case
from bench.baselines.contenders import work_of
from bench.record import made
from ijepa_fast.methods.method import method_class
from ijepa_fast.run.provenance import device_name

ROOT = Path(__file__).resolve().parents[1]
IMAGES = 1_281_167  # ImageNet-1k's training images
SMALL = {"arch": "vit_tiny", "crop": 64, "patch": 8}


@dataclass(frozen=True)
class Run:
    """A published run. batch: images a step; device_batch: of them on one device, which sets I-JEPA's masks.

    device_hours, kind: the published cost, where there is one, and on what.
    """

    name: str
    method: str
    arch: str
    patch: int
    epochs: int
    batch: int
    device_batch: int
    device_hours: float | None = None
    kind: str | None = None
    crop: int = 224


# Epochs of iBOT L/16: table 1 of I-JEPA's paper; of B/16: iBOT's paper, 1,600 effective ones, of which multi-crop makes
# four of one. DINO S/16: 1.75 days on 8 GPUs, its README. The others: published commands for the smallest network.
RUNS = (
    Run("I-JEPA H/14", "ijepa", "vit_huge", 14, 300, 2048, 128, 16 * 72, "A100"),
    Run("I-JEPA L/16", "ijepa", "vit_large", 16, 600, 2048, 128),
    Run("I-JEPA B/16", "ijepa", "vit_base", 16, 600, 2048, 128),
    Run("MAE H/14", "mae", "vit_huge", 14, 1600, 4096, 64, None, "V100"),
    Run("iBOT S/16", "ibot", "vit_small", 16, 800, 1024, 64, 16 * 193.4, "V100"),
    Run("iBOT B/16", "ibot", "vit_base", 16, 400, 1024, 64),
    Run("iBOT L/16", "ibot", "vit_large", 16, 250, 1024, 64),
    Run("DINO S/16", "dino", "vit_small", 16, 100, 512, 64, 8 * 42, "V100"),
    Run("MSN S/16", "msn", "vit_small", 16, 800, 1024, 64),
    Run("data2vec B/16", "data2vec", "vit_base", 16, 800, 2048, 128),
    Run("BEiT B/16", "beit", "vit_base", 16, 800, 2048, 128),
    Run("CAE B/16", "cae", "vit_base", 16, 300, 2048, 64),
    Run("SimMIM B/16", "simmim", "vit_base", 16, 800, 2048, 128),
)
OURS = RUNS[0]


@dataclass(frozen=True)
class Claim:
    """What I-JEPA's paper says of another run beside I-JEPA H/14: at least `factor` times its device-hours."""

    other: str
    factor: float
    words: str


# Images a step on a GPU, where not given: enough that no model waits for its kernels' launches, and 80 GB hold them.
BATCHES = {"vit_tiny": 256, "vit_small": 256, "vit_base": 128, "vit_large": 64, "vit_huge": 64}

CLAIMS = (
    Claim("MAE H/14", 10.0, "over 10x more efficient than MAE H/14"),
    Claim("iBOT S/16", 2.5, "over 2.5x faster than iBOT S/16"),
)


def measure(run: Run, args: argparse.Namespace) -> dict:
    """Throughput of `run` on this machine, as bench/throughput.py reports it."""
    cuda = args.device.startswith("cuda")
    impl = "fast-graphs" if cuda and "graphs" in method_class(run.method).capabilities else "fast"
    batch = args.batch or (BATCHES[run.arch] if cuda else 2)
    options = ["--method", run.method, "--impl", impl, "--context", args.context, "--device", args.device]
    options += ["--model", run.arch, "--patch", str(run.patch), "--crop", str(run.crop), "--batch", str(batch)]
    options += ["--rounds", str(args.rounds), "--steps", str(args.steps), "--warmup", str(args.warmup)]
    result = throughput.run(options)
    # Of several contexts, the first that is asked for; only I-JEPA has a choice.
    return {"batch": batch} | {key: result[key] for key in ("device", "torch", "ceiling_tflops")} | result["rows"][0]


def suite_rate(run: Run, context: str, device: str, folder: Path) -> dict | None:
    """The best rate of `run` in bf16 that bench/gpu_suite.py measured on `device`, as `measure` gives it; or None."""
    wanted = {"method": run.method, "arch": run.arch, "patch": run.patch, "crop": run.crop}
    context = context if run.method == "ijepa" else "full"
    found = []
    for path in sorted(folder.glob("steps-*.json")):
        result = json.loads(path.read_text())
        if result.get("device") != device or wanted.items() - result.get("case", {}).items():
            continue
        facts = {"batch": result["case"]["batch"], "file": path.name}
        facts |= {key: result[key] for key in ("device", "torch", "ceiling_tflops")}
        rows = [row for row in result["rows"] if row["impl"] in ("fast", "fast-graphs") and row["context"] == context]
        found += [facts | row for row in rows if not row["data"]]
    return max(found, key=lambda row: row["images_per_second"], default=None)


def gigaflop(run: Run) -> float:
    """Work of a training step of the published computation, an image, with its context truncated as published."""
    # Ten batches: masks differ from batch to batch.
    case = Case(run.method, run.arch, crop=run.crop, patch=run.patch, batch=run.device_batch, batches=10)
    return work_of(case, "truncate")[1]


def figures(measured: dict[str, dict], small: bool) -> list[dict]:
    """One record a run: measured rate, hours of the whole run unless it is a stand-in's (`small`), its work, and both
    beside I-JEPA H/14's.
    """
    rows = []
    for run in RUNS:
        found, work = measured.get(run.name), gigaflop(run)
        rate = found and found["images_per_second"]
        rows.append(
            {
                **asdict(run),
                "gflop_per_image": work,
                "exaflop": work * IMAGES * run.epochs / 1e9,
                "steps": IMAGES * run.epochs // run.batch,
                "measured_batch": found and found["batch"],
                "images_per_second": rate,
                "tokens_per_image": found and found["tokens_per_image"],
                "share_of_ceiling": found and found["share_of_ceiling"],
                "share_of_peak": found and found["share_of_peak"],
                "hours": None if small or not rate else IMAGES * run.epochs / rate / 3600,
            }
        )
    ours = rows[RUNS.index(OURS)]
    for row in rows:
        peak = row["device_hours"] and throughput.PEAKS[row["kind"]] * row["device_hours"] * 3600
        row["published_share_of_peak"] = peak and row["exaflop"] * 1e18 / peak
        for ratio, key in (("work_ratio", "exaflop"), ("hours_ratio", "hours"), ("published_ratio", "device_hours")):
            row[ratio] = row[key] / ours[key] if ours[key] and row[key] else None
    return rows


def table(result: dict) -> str:
    """Markdown: what was measured and what follows, beside what was published, and what its factors are made of."""
    rows = result["rows"]
    by_name = {row["name"]: row for row in rows}
    lines = [f"{result['device']}, torch {result['torch']}.", ""]
    if result["small"]:
        lines = [
            "**Stand-ins:** the rates are of a vit_tiny at 64 pixels, patch 8, by each method. They say nothing of a "
            "claim, so no hours are drawn from them; work and published figures are the real runs'.",
            "",
            *lines,
        ]
    heads = ("run", "epochs", "images a step", "images/s, measured", "tokens/image", "of GEMM", "of peak")
    heads += (
        "hours at that rate",
        f"hours / {OURS.name}",
        "EFLOP of the run",
        f"work / {OURS.name}",
        "published device-hours",
    )
    heads += (f"published / {OURS.name}", "of peak, published")
    lines += _head(heads)
    for row in rows:
        hours = f"{row['device_hours']:,.0f} {row['kind']}" if row["device_hours"] else "-"
        cells = (row["name"], f"{row['epochs']:,}", _or_dash(row["measured_batch"], "{}"))
        cells += (_or_not(row["images_per_second"], "{:,.1f}"),)
        cells += (_or_dash(row["tokens_per_image"], "{:.0f}"), _or_dash(row["share_of_ceiling"], "{:.0%}"))
        cells += (_or_dash(row["share_of_peak"], "{:.0%}"), _or_dash(row["hours"], "{:,.0f}"))
        cells += (_or_dash(row["hours_ratio"], "{:.2f}"), f"{row['exaflop']:,.1f}")
        cells += (_or_dash(row["work_ratio"], "{:.2f}"), hours, _or_dash(row["published_ratio"], "{:.2f}"))
        cells += (_or_dash(row["published_share_of_peak"], "{:.0%}"),)
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", *_claims(by_name), "", *_iterations(by_name)]
    return "\n".join(lines)


def _claims(by_name: dict[str, dict]) -> list[str]:
    """What each published factor is made of: factor = work x hardware x utilisation."""
    heads = ("claim", "factor", "of it work", "of it hardware", "of it utilisation", "here, measured")
    lines = _head(heads)
    ours = by_name[OURS.name]
    for claim in CLAIMS:
        other = by_name[claim.other]
        factor = other["published_ratio"] or claim.factor
        hardware = throughput.PEAKS[ours["kind"]] / throughput.PEAKS[other["kind"]]
        least = "" if other["published_ratio"] else "> "
        cells = (claim.words, f"{least}{factor:.1f}", f"{other['work_ratio']:.2f}", f"{hardware:.2f}")
        cells += (f"{least}{factor / other['work_ratio'] / hardware:.2f}", _or_not(other["hours_ratio"], "{:.2f}"))
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "A factor is a ratio of device-hours, and work x hardware x utilisation. Hardware is the ratio of the dense "
        "16-bit peaks of an A100, on which I-JEPA was trained, and a V100, on which, as far as the papers tell, the "
        "others were. Utilisation is what is left: how much nearer to its device's peak I-JEPA's code came than the "
        "other. On one machine, at equal utilisation, only the work remains; below 1 the other run is the smaller one.",
    ]
    return lines


def _iterations(by_name: dict[str, dict]) -> list[str]:
    """The claim of five times fewer iterations than MAE, 7 % slower each."""
    ours, other = by_name[OURS.name], by_name["MAE H/14"]
    text = (
        f'"About 5x fewer iterations than MAE": {other["epochs"] / ours["epochs"]:.1f}x fewer epochs, '
        f"{other['steps'] / ours['steps']:.1f}x fewer optimiser steps, since MAE's batch is larger. "
        f'"7 % slower per iteration": by work an image costs {ours["gflop_per_image"] / other["gflop_per_image"]:.2f} '
        f"times MAE's; measured here, "
    )
    if not ours["hours"] or not other["hours"]:
        return [text + "not yet."]
    return [text + f"{other['images_per_second'] / ours['images_per_second']:.2f} times the time."]


def _head(names) -> list[str]:
    return ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]


def _or_dash(value, form: str) -> str:
    return "-" if value is None else form.format(value)


def _or_not(value, form: str) -> str:
    return "not measured" if value is None else form.format(value)


def plot(result: dict, path: Path) -> None:
    """Draw each run's hours at the measured rate, and its published, counted and measured ratios to I-JEPA H/14."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from ijepa_fast.report.plots import COLOURS

    rows = result["rows"]
    places, names = range(len(rows)), [row["name"] for row in rows]
    figure = Figure(figsize=(11, 0.7 * len(rows) + 1.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    left.barh(places, [row["hours"] or 0 for row in rows], color=COLOURS[0])
    left.set(xlabel=f"hours on {result['device']}", yticks=list(places), yticklabels=names, xlim=(0, None))
    claimed = {claim.other: claim.factor for claim in CLAIMS}
    kinds = (
        ("published_ratio", "published device-hours, or the claim"),
        ("work_ratio", "work"),
        ("hours_ratio", "hours here"),
    )
    for i, (key, label) in enumerate(kinds):
        values = [row[key] or (claimed.get(row["name"], 0) if key == "published_ratio" else 0) for row in rows]
        right.barh([place + 0.27 * (i - 1) for place in places], values, 0.25, color=COLOURS[2 - i], label=label)
    right.axvline(1, color="grey", linewidth=1)
    right.set(xlabel=f"ratio to {OURS.name}")
    right.legend(frameon=False)
    left.invert_yaxis()
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    if result["small"]:
        figure.suptitle("no hours: what was measured are stand-ins")
    figure.savefig(path)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line. Exits with one sentence for a run that does not exist."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cuda = torch.cuda.is_available()
    parser.add_argument("--runs", help=f"measure only these, with commas, of {', '.join(run.name for run in RUNS)}")
    parser.add_argument("--small", action="store_true", help="stand-ins of every model, for a CPU")
    parser.add_argument("--batch", type=int, help="images a step; default: by model on a GPU, 2 on a CPU")
    parser.add_argument("--context", choices=throughput.CONTEXTS, default="truncate", help="of I-JEPA")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4 if cuda else 2)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--rates", type=Path, default=ROOT / "bench" / "results", help="what gpu_suite.py wrote to")
    parser.add_argument("--rates-of", metavar="DEVICE", help="only take what was measured on DEVICE; measure nothing")
    parser.add_argument("--anew", action="store_true", help="measure what gpu_suite.py has measured on this device")
    parser.add_argument("--load", type=Path, metavar="DIR", help="measure nothing, read DIR/claims.json")
    parser.add_argument("--out", type=Path, help="default: --load's, or runs/claims")
    args = parser.parse_args(argv)
    args.runs = args.runs.split(",") if args.runs else [run.name for run in RUNS]
    if unknown := set(args.runs) - {run.name for run in RUNS}:
        parser.error(f"--runs: expected of {', '.join(run.name for run in RUNS)}, got {', '.join(sorted(unknown))}")
    args.out = args.out or args.load or Path("runs/claims")
    return args


def main(argv: list[str] | None = None) -> int:
    """Measure, then write JSON, table and plot, and print the table. Returns the exit status."""
    args = parse(argv)
    try:
        if args.load:
            loaded = json.loads((args.load / "claims.json").read_text())
            measured, small = loaded["measured"], loaded["small"]
        else:
            measured, small = {}, args.small
            here = args.rates_of or device_name(args.device)
            for run in [run for run in RUNS if run.name in args.runs]:
                rate = None if small or args.anew else suite_rate(run, args.context, here, args.rates)
                if rate is not None:
                    print(f"{run.name}: the rate of {rate['file']}", file=sys.stderr)
                elif not args.rates_of:
                    rate = measure(replace(run, **SMALL) if small else run, args)
                if rate is not None:
                    measured[run.name] = rate
            if not measured:
                raise ValueError(f"--rates-of {args.rates_of}: {args.rates} has no rates of this device")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    first = next(iter(measured.values()))
    about = made() | {"device": first["device"], "torch": first["torch"], "small": small}
    result = about | {"measured": measured, "rows": figures(measured, small)}
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "claims.json").write_text(json.dumps(result, indent=1))
    (args.out / "claims.md").write_text(table(result) + "\n")
    plot(result, args.out / "claims.png")
    print(table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
