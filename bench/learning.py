"""What learns how fast: methods, I-JEPA's options, and what the paper ablates, by iteration, by work and by time.

    python bench/learning.py --data cifar10                  # cifar10/train/<class>/*.jpg and cifar10/test/<class>/
    python bench/learning.py --data cifar10 --runs fair --search-lr          # by the best learning rates that it finds
    python bench/learning.py --data cifar10 --runs options,salt+xavier       # I-JEPA's options
    python bench/learning.py --data cifar10 --runs masks     # and scale, targets, space, predictor-depth, sizes, data
    python bench/learning.py --data cifar10 --runs noise     # I-JEPA, MAE and pixels beneath a random texture
    python bench/learning.py --data scenes --runs tasks      # kind against count and distance, of the embedded scenes
    python bench/learning.py --data cifar10 --runs all --minutes 10          # every method, equally long
    python bench/learning.py --data cifar10 --preset gpu --runs mae,ijepa    # 200 epochs of ViT-T, on a GPU

Every run is the trainer's own command on a config of configs/, with the same images, encoder, batch, steps and probes;
augmentation and optimiser are each method's. A checkpoint is kept at fixed iterations, and linear and k-NN probes read
the encoder it leaves: the average over patches of its features, or of iBOT the class token. The first and the last
encoder are also read by an attentive probe, by 1 % of the labels, and block by block. Results are in --out:
learning.json, learning.md, learning.png, and a plot for every group that has an axis, of the runs that are named; one
that was finished is not run again, its checkpoints are gone by then. docs/learning.md has the groups' questions.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from bench.compare import plots
from bench.compare.images import NEIGHBOURS, SCENES, Images, open_images
from bench.compare.minutes import steps_in
from bench.compare.presets import PRESETS, Preset
from bench.compare.runs import GROUPS, NAMES, SWEEPS, find
from bench.compare.search import SEED, search, searched
from bench.compare.tables import tables
from bench.compare.train import ENDS, Job, do, done
from ijepa_fast.command import one_sentence, whole
from ijepa_fast.config import ConfigError


def parser() -> argparse.ArgumentParser:
    """The command line."""
    usage = "%(prog)s --data FOLDER [options] [key=value ...]"
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], usage=usage)
    add = p.add_argument
    add("--data", required=True, help=f"a folder with train/<class>/ and test/<class>/, or {SCENES}, the embedded ones")
    add(
        "--runs",
        default="methods",
        help=f"of {', '.join(NAMES)}, with commas; of I-JEPA's options several with a plus; on images with a nuisance "
        "of 32 of 255, or one in 64: mae@noise32, mae@share64",
    )
    add("--preset", choices=sorted(PRESETS), default="gpu" if torch.cuda.is_available() else "cpu")
    add("--steps", type=whole())
    add("--minutes", type=float, help="of training, in place of --steps: timed for each run")
    add("--batch", type=whole())
    add("--probes", type=whole(), help="along a run, beside the one before it")
    add("--images", type=whole(), help="a probe trains on, and is tested on")
    add("--ends", default=",".join(ENDS), help="probes of the first and the last encoder alone, of the default; none")
    add("--seeds", help="with commas")
    add("--search-lr", action="store_true", help="search each run's learning rate first, by shorter runs")
    add("--search-steps", type=whole(), help="of such a run; half of a run's where it is not given")
    add("--out", type=Path, default=Path("runs/learning"))
    add("overrides", nargs="*", metavar="key=value", help="configuration keys to change in every run")
    return p


def names_of(text: str) -> list[str]:
    """The runs that --runs names. Raises ConfigError for one that there is not."""
    names = list(dict.fromkeys(run for name in text.split(",") for run in GROUPS.get(name, (name,))))
    if unknown := [name for name in names if find(name) is None]:
        raise ConfigError(f"--runs: expected of {', '.join(NAMES)}, got {', '.join(unknown)}")
    return names


def preset_of(args: argparse.Namespace) -> Preset:
    """The preset with what the command line changes. Raises ConfigError for what cannot be."""
    given: dict[str, Any] = {key: getattr(args, key) for key in ("steps", "batch", "probes", "images")}
    given = {key: value for key, value in given.items() if value is not None}
    if args.seeds:
        try:
            given["seeds"] = tuple(dict.fromkeys(int(seed) for seed in args.seeds.split(",")))
        except ValueError:
            raise ConfigError(f"--seeds: expected whole numbers with commas, got {args.seeds}") from None
    if given.get("images", NEIGHBOURS) < NEIGHBOURS:
        raise ConfigError(f"--images: expected at least {NEIGHBOURS}, the neighbours that vote, got {args.images}")
    if args.minutes is not None and (args.steps or args.minutes <= 0):
        raise ConfigError(f"--minutes: expected more than 0 and no --steps beside it, got {args.minutes}")
    preset = replace(PRESETS[args.preset], **given)
    if args.search_steps and not args.search_lr:
        raise ConfigError("--search-steps: there is no search without --search-lr; give both")
    if args.search_lr and SEED in preset.seeds:
        raise ConfigError(f"--seeds: {SEED} is the seed of --search-lr; name others")
    if preset.probes > preset.steps:
        raise ConfigError(f"--probes: expected at most the {preset.steps} steps of a run, got {preset.probes}")
    return replace(preset, rates={}) if args.data == SCENES else preset  # they were found on CIFAR-10


def ends_of(text: str) -> tuple[str, ...]:
    """The probes that --ends names. Raises ConfigError for one that there is not."""
    names = () if text in ("", "none") else tuple(text.split(","))
    if unknown := [name for name in names if name not in ENDS]:
        raise ConfigError(f"--ends: expected of {', '.join(ENDS)}, or none, got {', '.join(unknown)}")
    return names


def check(jobs: list[Job], images: Images, searching: bool, timing: bool) -> None:
    """Raise ValueError for what would fail later: images, configs, teachers, runs of other settings in their place."""
    images.check(jobs[0].preset.images)
    before: set[tuple[str, int]] = set()
    for job in jobs:
        kept = job.folder.is_dir() and not searching and not timing
        if kept or job.seed == jobs[0].seed:
            changed = job.settings()
            if kept:
                done(job, changed)
        if job.teacher and (job.teacher, job.seed) not in before and (searching or not job.ready):
            raise ConfigError(job.no_teacher)
        before.add((job.name, job.seed))


@one_sentence()
def main(argv: list[str] | None = None) -> int:
    """Do the runs that are not done, write what all of them gave. Returns the exit status."""
    args = parser().parse_intermixed_args(argv)
    names, preset, ends = names_of(args.runs), preset_of(args), ends_of(args.ends)
    out = args.out.resolve()
    images = open_images(args.data, out)
    jobs = [Job(name, seed, preset, images, out, args.overrides, ends) for seed in preset.seeds for name in names]
    check(jobs, images, args.search_lr, args.minutes is not None)
    try:
        presets = dict.fromkeys(names, preset)
        if args.minutes:
            for name in names:
                steps = steps_in(args.minutes, name, preset, images, args.overrides)
                presets[name] = replace(preset, steps=steps)
        found: dict[str, Any] = {}
        if args.search_lr:
            for name in searched(names):
                length = presets.get(name, preset).steps
                short = replace(preset, steps=args.search_steps or max(1, length // 2))
                found[name] = search(Job(name, SEED, short, images, out, args.overrides), found)
        rates = {name: result["rate"] for name, result in found.items()}
        records = []
        for job in jobs:
            chosen = replace(presets[job.name], rates={**preset.rates, **rates})
            records.append(do(replace(job, preset=chosen)))
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    result = {"preset": asdict(preset), "device": records[0]["device"], "search": found, "records": records}
    (out / "learning.json").write_text(json.dumps(result, indent=1))
    (out / "learning.md").write_text(tables(result) + "\n")
    plots.curves(records, out / "learning.png")
    for name, sweep in SWEEPS.items():
        plots.ends(records, sweep, out / f"{name}.png")
    print(tables(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
