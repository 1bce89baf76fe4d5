"""Accuracy by iteration, by work and by time: I-JEPA, MAE, I-JEPA on pixels, iBOT, and I-JEPA's masks, on real images.

    python bench/learning.py --data cifar10                      # cifar10/train/<class>/*.jpg and cifar10/test/<class>/
    python bench/learning.py --data cifar10 --runs options,salt+xavier --seeds 0,1,2      # I-JEPA's options
    python bench/learning.py --data cifar10 --runs masks         # multiblock, rasterized, block, random
    python bench/learning.py --data cifar10 --runs ijepa,mae,ibot --seeds 0,1,2 --steps 600 optim.lr=5e-4
    python bench/learning.py --data cifar10 --runs all --minutes 10 --seeds 0,1,2    # every method, equally long

Every run is the trainer's own command on a config of configs/, with the same images, encoder, batch, steps and probes;
augmentation and optimiser are each method's. A checkpoint is kept at fixed iterations, and linear and k-NN probes read
the encoder it leaves: the average over patches of its features, or of iBOT the class token. Results are in --out:
learning.json, learning.md and learning.png, of the runs that are named; one that was finished is not run again, its
checkpoints are gone by then. A method of tokens gets a tokenizer that is fitted to the training images, in --out.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch

from ijepa_fast.config import Config, ConfigError, load_config
from ijepa_fast.data import size_of
from ijepa_fast.data.sources import open_source
from ijepa_fast.engine.engine import DTYPES, choose_device
from ijepa_fast.engine.precision import choose_precision
from ijepa_fast.eval.evaluate import evaluate
from ijepa_fast.eval.figures import against, figures_of
from ijepa_fast.eval.labels import open_labelled
from ijepa_fast.eval.options import Options, matched
from ijepa_fast.eval.tokens import main as fit_tokenizer
from ijepa_fast.interop.load import load
from ijepa_fast.methods.method import METHODS
from ijepa_fast.report.plots import COLOURS, read_log
from ijepa_fast.report.summary import train_seconds
from ijepa_fast.run.build import build_draw, build_method
from ijepa_fast.run.provenance import FORMAT, provenance
from ijepa_fast.run.sources import evaluation, untrained

LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what says which job a process is of
ROOT = Path(__file__).resolve().parents[1]
MASKS = ("multiblock", "rasterized", "block", "random")
_ANY_MASK = ["mask.policy=full", "mask.min_keep=null"]
# What is compared: a config of configs/, and what is changed in it.
RUNS = {
    "ijepa": ("cifar10", []),
    "mae": ("mae_cifar10", []),
    "pixels": ("cifar10", ["objective.options.target=pixels", "objective.options.loss=l2"]),
    "ibot": ("ibot_cifar10", ["model.patch=4"]),  # as the others have
    "dino": ("dino_cifar10", ["model.patch=4"]),
    "msn": ("msn_cifar10", ["model.patch=4"]),
}
# Every other method by its own config.
RUNS |= {name: (f"{name}_cifar10", []) for name in METHODS if name not in RUNS}
RUNS |= {name: ("cifar10", [f"mask.strategy={name}", *_ANY_MASK]) for name in MASKS}
# Options of I-JEPA's that are not published, each a change of its run; several with a plus: xavier+deep.
OPTIONS = {
    "xavier": ["objective.options.init=xavier"],
    "flip": ["data.flip=true"],
    "position": ["objective.options.target_norm=position"],
    "position_token": ["objective.options.target_norm=position_token"],
    "batch": ["objective.options.target_norm=batch"],
    "unnormalised": ["objective.options.target_norm=none"],
    "deep": ["objective.options.target_layers=3"],
    "sets2": ["objective.options.mask_sets=2"],
    "sets4": ["objective.options.mask_sets=4"],
    "salt": ["objective.options.teacher=frozen"],  # the teacher is the run mae of the same seed
    "visible": ["objective.options.visible_weight=0.5"],
}
for _kind, _weights in (("vicreg", (1e-4, 1e-3, 1e-2)), ("sigreg", (2e-4, 2e-3, 2e-2))):
    OPTIONS |= {
        f"{_kind}{weight:g}": [
            f"objective.options.regulariser={_kind}",
            f"objective.options.regulariser_weight={weight}",
        ]
        for weight in _weights
    }
GROUPS = {"options": ("mae", "ijepa", *OPTIONS), "masks": MASKS, "methods": ("ijepa", "mae", "pixels"), "all": METHODS}
BATCHES = 20  # whose work is averaged
TIMED = 3  # steps, after one more, that say how many fit into --minutes
OTHER_SHARE = 0.15  # of a step beside forward and backward: optimiser, average, data
HEADS = ("linear", "20-NN")  # probes in the table and the plot


def changes_of(name: str) -> tuple[str, list[str]] | None:
    """The config of the run `name`, and what is changed in it; None for a run that there is not."""
    if name in RUNS:
        return RUNS[name]
    parts = name.split("+")
    if not set(parts) <= OPTIONS.keys():
        return None
    return RUNS["ijepa"][0], [change for part in parts for change in OPTIONS[part]]


def teacher_of(name: str, seed: int, out: Path) -> list[str]:
    """Where a run with a frozen teacher finds it: the setting, or none. Raises ConfigError where it is not yet."""
    if "salt" not in name.split("+"):
        return []
    path = out / f"mae-{seed}" / "weights.safetensors"
    if not path.is_file():
        raise ConfigError(f"{name}: its teacher is the run mae of the same seed, not found as {path}; run mae first")
    return [f"objective.options.teacher_from={path}"]


@dataclass(frozen=True)
class Preset:
    """steps and batch of a run, probes along it, images of each of a probe's sets, seeds, and what else is changed.

    rates: the best learning rate found for a run, where not its config's; masks have I-JEPA's.
    """

    steps: int
    batch: int
    probes: int
    images: int
    seeds: tuple[int, ...]
    overrides: tuple[str, ...] = ()
    rates: dict[str, float] = field(default_factory=dict)


# An encoder small enough for I-JEPA, MAE and pixels to see four epochs each, twice, in half an hour on two cores.
SMALL = ("model.dim=128", "model.depth=4", "model.heads=4", "model.predictor_dim=64", "model.predictor_depth=2")
PRESETS = {
    "cpu": Preset(6000, 32, 4, 4000, (0, 1), SMALL, {"ijepa": 5e-4, "mae": 2e-3, "pixels": 5e-4, "ibot": 2.5e-4}),
    "gpu": Preset(1500, 512, 5, 10_000, (0, 1, 2), ("engine.precision=bf16",)),
}


def overrides_of(preset: Preset, images: int) -> list[str]:
    """What makes the schedules of a config span `preset.steps` steps over `images` images, a tenth of it warm-up.

    What differs by run is in `method_overrides`.
    """
    epoch = images // preset.batch
    if epoch == 0:
        raise ConfigError(f"--batch: expected at most the {images} images of --data, got {preset.batch}")
    epochs = math.ceil(preset.steps / epoch)
    return [
        f"batch_size={preset.batch}",
        f"optim.steps={preset.steps}",
        f"optim.epochs={epochs}",
        f"optim.horizon={preset.steps / (epochs * epoch)}",
        f"optim.warmup_epochs={0.1 * preset.steps / epoch}",
        f"log.checkpoint_every={math.ceil(preset.steps / preset.probes)}",
        f"log.keep={preset.probes}",
        f"log.every={max(1, preset.steps // 50)}",
        "log.tensorboard=false",
        "probe.enabled=false",
        f"probe.images={preset.images}",
        *preset.overrides,
    ]


def method_overrides(name: str, preset: Preset, images: int) -> list[str]:
    """What differs by run: its learning rate, and what of its config is a share of the run."""
    epochs = preset.steps * preset.batch / images
    rate = preset.rates.get(name if name in RUNS and name not in MASKS else "ijepa")
    found = [] if rate is None else [f"optim.lr={rate}"]
    base, changes = changes_of(name) or RUNS["ijepa"]
    method = build_method(
        load_config(base, [*changes, *(["objective.options.teacher_from=."] if "salt" in name else [])])
    )
    if not method.averaged:
        return found
    # One in 150 of the first weights is left in the average at the end.
    ema = max(0.9, 1 - 5 / preset.steps)
    found += [f"optim.ema={ema}", f"optim.final_ema={ema}"]
    shares = {"temperature_epochs": 0.3 * epochs, "frozen_epochs": 0.05 * epochs}
    if not shares.keys() <= vars(method.options).keys():
        return found
    return [*found, *(f"objective.options.{key}={value}" for key, value in shares.items())]


def work_per_image(config: Config) -> float:
    """GFLOP of a training step of `config` per image, as executed here, from what its first batches draw."""
    method = build_method(config)
    draw = build_draw(config, method, torch.device("cpu"), 0, 1)
    return sum(method.work(draw(step)).total for step in range(BATCHES)) / BATCHES / config.batch_size / 1e9


def tokens(config: Config, train: Path, out: Path) -> list[str]:
    """The key that gives `config` its tokenizer, fitted to the images of `train` where it is not in `out`; or none."""
    method = build_method(config)
    if not hasattr(method.options, "tokenizer"):
        return []
    patch, count = method.options.token_patch, method.options.vocabulary
    size = max(method.setup.grid) * patch
    path = out / f"tokens-{count}-of-{patch}.safetensors"
    if not path.is_file():
        options = ["--source", str(train), "--patch", str(patch), "--size", str(size), "--vocabulary", str(count)]
        out.mkdir(parents=True, exist_ok=True)
        with contextlib.redirect_stdout(sys.stderr):
            failed = fit_tokenizer([*options, "--out", str(path)])
        if failed:
            raise RuntimeError("no tokenizer could be fitted, see above")
    return [f"objective.options.tokenizer={path}"]


def steps_in(minutes: float, name: str, preset: Preset, data: Path, out: Path, extra: list[str]) -> int:
    """Steps of a run in so many minutes of training on this machine: timed once, and kept in `out`."""
    if "salt" in name.split("+"):
        raise ConfigError(f"--minutes: {name} has a teacher that is not there when steps are timed; give --steps")
    kept = out / f"{name}-steps.json"
    if kept.is_file() and (found := json.loads(kept.read_text()))["minutes"] == minutes:
        return found["steps"]
    images = len(open_source(data / "train", cache=out / "index"))
    base, changes = changes_of(name) or RUNS["ijepa"]
    given = [
        "name=timed",
        *changes,
        *overrides_of(preset, images),
        *method_overrides(name, preset, images),
        *extra,
    ]
    config = load_config(ROOT / "configs" / f"{base}.yaml", given)
    config = load_config(ROOT / "configs" / f"{base}.yaml", [*given, *tokens(config, data / "train", out)])
    device = choose_device(config.engine.device)
    method, precision = build_method(config), choose_precision(config.engine.precision, device).name
    for network in method.networks.values():
        network.to(device, DTYPES[precision])
    method.carried = {key: value.to(device) for key, value in method.carried.items()}
    views = method.views()
    sides = [size_of(view.crop) for view in views] or [method.setup.data.size]
    drawn = [torch.randint(256, (preset.batch, *side, 3), dtype=torch.uint8, device=device) for side in sides]
    for step in range(1 + TIMED):
        if step == 1:
            start = time.perf_counter()
        loss, _ = method(drawn if views else drawn[0], method.draw(preset.batch, 0, step).to(device))
        loss.backward()
        method.zero_grad()
        loss.item()  # waits for the device
    seconds = (time.perf_counter() - start) / TIMED * (1 + OTHER_SHARE)
    steps = max(preset.probes, round(60 * minutes / seconds))
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps({"minutes": minutes, "steps": steps, "seconds_per_step": seconds}))
    return steps


def check_images(preset: Preset, data: Path, out: Path) -> None:
    """ValueError, before anything is trained, where the probes at the end could not be made."""
    train, test = (open_labelled(data / part, cache=out / "index") for part in ("train", "test"))
    matched(train, test, Options(crop=1, images=preset.images))


def run(name: str, seed: int, preset: Preset, data: Path, out: Path, extra: list[str]) -> dict:
    """Train and probe one run -> its record, also kept in its folder. What was finished before is read from there."""
    folder = out / f"{name}-{seed}"
    kept = folder / "learning.json"
    base, changes = changes_of(name) or RUNS["ijepa"]
    images = len(open_source(data / "train", cache=out / "index"))
    settings = [
        f"seed={seed}",
        *changes,
        *teacher_of(name, seed, out),
        *overrides_of(preset, images),
        *method_overrides(name, preset, images),
        *extra,
    ]
    if kept.is_file():
        record = json.loads(kept.read_text())
        if record["settings"] == settings and record.get("version") == FORMAT:
            return record
        raise ConfigError(f"{folder} holds a run with other settings or of an earlier version; give another --out")
    paths = [f"data.source={data / 'train'}", f"probe.test={data / 'test'}", f"runs={out}", f"name={name}-{seed}"]
    path, overrides = ROOT / "configs" / f"{base}.yaml", paths + settings
    overrides += tokens(load_config(path, overrides), data / "train", out)
    config = load_config(path, overrides)
    command = [sys.executable, str(ROOT / "ijepa_fast" / "train.py"), "--config", str(path), *overrides]
    print(f"{name}, seed {seed}", file=sys.stderr, flush=True)
    # The run is a job of its own, even where this process has one.
    environment = {key: value for key, value in os.environ.items() if key not in LAUNCHER}
    if subprocess.run(command, cwd=ROOT, env=environment).returncode:
        raise RuntimeError(f"{name}, seed {seed}: the trainer failed, see above; the same command goes on from there")
    device, log, work = choose_device(config.engine.device), read_log(folder / "log.jsonl"), work_per_image(config)
    labelled = evaluation(config, (str(data / "train"), str(data / "test")), device)
    checkpoints = {int(p.name.removeprefix("step-")): p for p in sorted((folder / "checkpoints").glob("step-*"))}
    found = {0: evaluate(untrained(config, device), *labelled)}
    found |= {step: evaluate(load(path, device=device), *labelled) for step, path in checkpoints.items()}
    points = [
        {
            "step": step,
            "petaflop": step * preset.batch * work / 1e6,
            "seconds": train_seconds(log, step, preset.batch),
            "figures": [figure.to_json() for figure in against(figures, found[0])],
        }
        for step, figures in found.items()
    ]
    losses = [record["loss"] for record in log if "loss" in record]
    record = provenance(device) | {
        "run": name,
        "seed": seed,
        "config": path.name,
        "settings": settings,
        "gflop_per_image": work,
        "loss_first": losses[0],
        "loss_last": losses[-1],
        "points": points,
    }
    kept.write_text(json.dumps(record, indent=1))
    shutil.copy(checkpoints[max(checkpoints)] / "weights.safetensors", folder)  # what a run with a teacher reads
    shutil.rmtree(folder / "checkpoints")
    return record


def table(records: list[dict]) -> str:
    """Markdown: accuracies of each run at its iterations, mean over seeds and, of several, the range."""
    lines = ["| run | seeds | step | PFLOP | seconds | linear probe | 20-NN |", "|---|---|---|---|---|---|---|"]
    for name in dict.fromkeys(record["run"] for record in records):
        runs = [record for record in records if record["run"] == name]
        for points in zip(*(record["points"] for record in runs)):
            cells = [name, str(len(runs)), str(points[0]["step"]), f"{np.mean([p['petaflop'] for p in points]):.3g}"]
            cells += [f"{np.mean([p['seconds'] for p in points]):.0f}"]
            cells += [_spread([_accuracy(p, probe) for p in points]) for probe in HEADS]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _accuracy(point: dict[str, Any], probe: str) -> float:
    (figure,) = (f for f in figures_of(point) if (f.probe, f.metric) == (probe, "accuracy"))
    return figure.value


def _spread(values: list[float]) -> str:
    mean = f"{np.mean(values):.1%}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.1%} to {max(values):.1%})"


def plot(records: list[dict], path: Path, source: str = "") -> None:
    """Draw the curves as a PNG: accuracy of both probes by iteration, by work and by time; a line per seed.

    source: what it is drawn of, for its metadata.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 7), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 3, sharey="row")
    colours = dict(zip(dict.fromkeys(record["run"] for record in records), COLOURS * 2))
    for row, probe in enumerate(HEADS):
        for column, (key, unit) in enumerate((("step", "iteration"), ("petaflop", "PFLOP"), ("seconds", "seconds"))):
            seen = set()
            for record in records:
                x = [point[key] for point in record["points"]]
                y = [_accuracy(point, probe) for point in record["points"]]
                name = record["run"] if record["run"] not in seen else None
                seen.add(record["run"])
                axes[row, column].plot(x, y, "o-", color=colours[record["run"]], label=name, markersize=3)
            axes[row, column].set(xlabel=unit)
            axes[row, column].grid(alpha=0.25)
        axes[row, 0].set(ylabel=f"accuracy, {probe}")
    axes[0, 0].legend(frameon=False)
    figure.savefig(path, metadata={"Description": source} if source else None)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line. Exits with one sentence for a run or preset that does not exist."""
    usage = "%(prog)s --data FOLDER [options] [key=value ...]"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], usage=usage)
    parser.add_argument("--data", type=Path, required=True, help="a folder with train/<class>/ and test/<class>/")
    parser.add_argument("--runs", default="methods", help=f"of {', '.join([*RUNS, *OPTIONS, *GROUPS])}, with commas")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="gpu" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--minutes", type=float, help="of training, in place of --steps: timed for each run")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--probes", type=int, help="along a run, beside the one before it")
    parser.add_argument("--images", type=int, help="a probe trains on, and is tested on")
    parser.add_argument("--seeds", help="with commas")
    parser.add_argument("--out", type=Path, default=Path("runs/learning"))
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="configuration keys to change in every run")
    args = parser.parse_intermixed_args(argv)
    names = [run for name in args.runs.split(",") for run in GROUPS.get(name, (name,))]
    if unknown := sorted({name for name in names if changes_of(name) is None}):
        parser.error(f"--runs: expected of {', '.join([*RUNS, *OPTIONS, *GROUPS])}, got {', '.join(unknown)}")
    given = {key: getattr(args, key) for key in ("steps", "batch", "probes", "images") if getattr(args, key)}
    if args.seeds:
        given["seeds"] = tuple(int(seed) for seed in args.seeds.split(","))
    if given.get("images", 20) < 20:
        parser.error(f"--images: expected at least 20, the neighbours that vote, got {args.images}")
    if args.minutes is not None and (args.steps or args.minutes <= 0):
        parser.error(f"--minutes: expected more than 0 and no --steps beside it, got {args.minutes}")
    args.runs, args.preset = names, replace(PRESETS[args.preset], **given)
    return args


def main(argv: list[str] | None = None) -> int:
    """Do the runs that are not done, write what all of them gave. Returns the exit status."""
    args = parse(argv)
    out, data = args.out.resolve(), args.data.resolve()
    records = []
    try:
        check_images(args.preset, data, out)
        presets = dict.fromkeys(args.runs, args.preset)
        if args.minutes:
            for name in args.runs:
                steps = steps_in(args.minutes, name, args.preset, data, out, args.overrides)
                presets[name] = replace(args.preset, steps=steps)
        for seed in args.preset.seeds:
            records += [run(name, seed, presets[name], data, out, args.overrides) for name in args.runs]
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    result = {"preset": asdict(args.preset), "device": records[0]["device"], "records": records}
    (out / "learning.json").write_text(json.dumps(result, indent=1))
    (out / "learning.md").write_text(table(records) + "\n")
    plot(records, out / "learning.png")
    print(table(records))
    return 0


if __name__ == "__main__":
    sys.exit(main())
