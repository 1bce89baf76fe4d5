"""Evaluate an encoder on labelled images, as the paper does and more.

    python -m ijepa_fast probe --checkpoint runs/photos --data /data/imagenet/train --test /data/imagenet/val
    python -m ijepa_fast probe runs/quickstart --probes linear,knn,attentive,lowshot,finetune --seeds 3 --untrained

Layouts of labelled images are in eval/labels.py. Without --data, a run is evaluated on the images that its own
configuration names. The untrained encoder's values stand beside where the run's end measured the same, or are measured
with --untrained.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ijepa_fast.command import one_sentence, whole
from ijepa_fast.config import load_config
from ijepa_fast.data.importing import is_code
from ijepa_fast.data.reading import Reading
from ijepa_fast.data.scenes import ensure_maps, is_scenes
from ijepa_fast.eval.evaluate import OF_IMAGES, PROBES, evaluate
from ijepa_fast.eval.figures import Figure, against, figures_of, overview, table, verdict
from ijepa_fast.eval.labels import Labelled, open_labelled
from ijepa_fast.eval.linear import HEADS
from ijepa_fast.eval.lowshot import PAPER_TUNING, SMALL_TUNING
from ijepa_fast.eval.options import FEATURES, OF_PLACES, Options
from ijepa_fast.eval.sweep import PROTOCOLS
from ijepa_fast.interop.load import PretrainedEncoder, load
from ijepa_fast.report.summary import read_summary
from ijepa_fast.run.provenance import provenance
from ijepa_fast.run.sources import as_begun, probe_folders, run_options

# What must be the same for features, and for heads on them, to be those of the run's end.
SAME = ("resize", "interpolation", "dtype")
FITTED = ("heads", "protocol", "seeds")
TUNINGS = {"paper": PAPER_TUNING, "small": SMALL_TUNING}
Parts = tuple[Labelled, Labelled]  # training and test images


def folders_of(options: argparse.Namespace, checkpoint: str) -> tuple[str, str]:
    """The labelled images that the command line names, or that the run `checkpoint` does. Raises ValueError."""
    if (options.data is None) != (options.test is None):
        raise ValueError("--data, --test: expected both, the images to train heads on and those to test them on")
    if options.data is not None:
        return options.data, options.test
    path = Path(checkpoint) / "config.yaml"
    if not path.is_file():
        raise ValueError(f"--data: expected a folder of labelled images, for {checkpoint} is no run's folder")
    folders = probe_folders(load_config(path))
    if folders is None:
        raise ValueError(f"--data: expected a folder of labelled images, for {path} names none (probe.test is not set)")
    if code := [folder for folder in folders if is_code(folder)]:
        raise ValueError(f"--data: {path} names code, {code[0]}, which only training imports; name --data and --test")
    return folders


def device_of(wanted: str) -> torch.device:
    """The device of an option `--device`: auto, cpu or cuda. Raises ValueError for a GPU that is not there."""
    cuda = torch.cuda.is_available()
    if wanted == "cuda" and not cuda:
        raise ValueError("--device cuda: torch sees no CUDA device; leave --device out")
    return torch.device("cuda" if cuda and wanted != "cpu" else "cpu")


def open_parts(options: argparse.Namespace, folders: tuple[str, str], reading: Reading) -> Parts:
    """The labelled images in `folders`, and the maps over them that the probes want. Raises ValueError."""
    tasks = dict(item.split("=", 1) for item in options.task)
    reading = replace(reading, where=None)  # the map was of the training's images
    label_maps = options.label_map, options.test_label_map or options.label_map
    depth_maps = options.depth_map, options.test_depth_map or options.depth_map
    of_images = [probe for probe in options.probes if probe in OF_IMAGES]
    parts = []
    for folder, label_map, depth_map in zip(folders, label_maps, depth_maps):
        named = {"segmentation": label_map, "depth": depth_map}
        wanted = [probe for probe in options.probes if probe in OF_PLACES]
        if is_scenes(folder) and any(named[probe] is None for probe in wanted):
            named = ensure_maps(folder) | {probe: where for probe, where in named.items() if where}
        maps = {probe: where for probe in wanted if (where := named[probe]) is not None}
        by_map = label_map if of_images else None
        part = open_labelled(folder, options.cache, tasks, reading, by_map, maps)
        parts.append(part if of_images else replace(part, tasks={}))
    train, test = parts
    return _only(train, options.labels) if of_images else train, test


def options_of(options: argparse.Namespace, encoder: PretrainedEncoder, device: torch.device) -> Options:
    """What `evaluate` takes, for an encoder."""
    low = options.precision == "bf16" or (options.precision == "auto" and device.type == "cuda")
    changes = {"epochs": options.finetune_epochs, "rate": options.finetune_rate, "batch": options.finetune_batch}
    return Options(
        crop=encoder.crop,
        resize=options.resize,
        interpolation=encoder.arch.interpolation,
        batch_size=options.batch_size,
        device=device,
        dtype=torch.bfloat16 if low else None,
        images=options.images,
        probes=options.probes,
        features=options.features,
        heads=options.heads,
        protocol=options.protocol,
        seeds=options.seeds,
        share=options.share,
        tuning=replace(TUNINGS[options.finetune], **{key: v for key, v in changes.items() if v is not None}),
        ways=options.ways,
        shots=options.shots,
        episodes=options.episodes,
    )


def said(how: Options) -> dict[str, Any]:
    """The options as JSON has them."""
    return asdict(how) | {"device": str(how.device), "dtype": "bf16" if how.dtype else "fp32"}


def probe(options: argparse.Namespace) -> dict[str, Any]:
    """Evaluate as the command line says; what is written as JSON. Raises ValueError for what a user can mend."""
    folders = folders_of(options, options.checkpoint)
    device = device_of(options.device)
    encoder = load(options.checkpoint, options.network, options.image_size, device, options.attention_heads)
    before = as_begun(_run(options) or options.checkpoint, encoder) if options.untrained else None
    train, test = open_parts(options, folders, encoder.arch.reading)
    how = options_of(options, encoder, device)
    figures = evaluate(encoder, train, test, how)
    if not figures:
        raise ValueError(
            f"--probes {','.join(options.probes)}: no figure, as retrieval, fewshot, lowshot and "
            "finetune take classes; name --probes linear"
        )
    known = _known(options, (train, test), how) if before is None else evaluate(before, train, test, how)
    figures = against(figures, known)
    return provenance(device) | {
        "checkpoint": str(options.checkpoint),
        "network": options.network,
        "arch": asdict(encoder.arch),
        "data": {"train": str(folders[0]), "test": str(folders[1])},
        "options": said(how),
        "figures": [figure.to_json() for figure in figures],
    }


def _run(options: argparse.Namespace) -> Path | None:
    """The folder of the run that the weights are of, or None."""
    path = Path(options.checkpoint)
    return next((folder for folder in (path, *path.parents[1:2]) if (folder / "config.yaml").is_file()), None)


def _known(options: argparse.Namespace, parts: Parts, how: Options) -> list[Figure]:
    """What the run's end found of the untrained encoder where it measured the same: on all of `parts`, `how`."""
    run = _run(options)
    if run is None or options.data is not None or options.image_size is not None:
        return []
    config = load_config(run / "config.yaml")
    end = run_options(config, torch.device("cpu"))
    drawn = [[part.rows(which.images, which.draw_seed) for part in parts] for which in (how, end)]
    if not all(map(np.array_equal, *drawn)):
        return []
    if [getattr(how, key) for key in SAME] != [getattr(end, key) for key in SAME] or how.features[0] != end.features[0]:
        return []
    try:
        figures = figures_of(read_summary(run) or {"figures": []})
    except ValueError:  # of another version
        return []
    heads = all(getattr(how, key) == getattr(end, key) for key in FITTED)
    measured = [replace(f, value=f.untrained, error=f.untrained_error) for f in figures if f.untrained is not None]
    return [f for f in measured if heads or f.probe.endswith("-NN")]


def _only(part: Labelled, names: tuple[str, ...] | None) -> Labelled:
    if names is None:
        return part
    for name in names:
        if name not in part.tasks:
            raise ValueError(f"--labels {name}: {part.source.root} has {', '.join(part.tasks)}")
    return replace(part, tasks={name: part.tasks[name] for name in names})


def _among(choices: Iterable[str]) -> Callable[[str], tuple[str, ...]]:
    def parse(text: str) -> tuple[str, ...]:
        names = tuple(text.split(","))
        if unknown := set(names) - set(choices):
            raise argparse.ArgumentTypeError(f"expected of {','.join(choices)}, got {','.join(sorted(unknown))}")
        return names

    return parse


def _numbers(text: str) -> tuple[int, ...]:
    read = whole()
    return tuple(read(part) for part in text.split(","))


def add_options(p: argparse.ArgumentParser, probes: tuple[str, ...]) -> None:
    """What `probe` and `compare` share; probes: by default."""
    add = p.add_argument
    add("--data", help="labelled images to train heads on: folders, shards, a list, labels.csv, Clevr's images/train")
    add("--test", help="labelled images to test on, in the same layout")
    add(
        "--label-map",
        help="a raster of classes over --data, or a folder of one per image; 0: none. For segmentation, and for labels "
        "of windows",
    )
    add("--test-label-map", help="the same for --test (default: --label-map)")
    add("--depth-map", help="numbers over --data, as --label-map; of depth, in any unit")
    add("--test-depth-map", help="the same for --test (default: --depth-map)")
    add("--probes", type=_among(PROBES), default=probes, help=f"of {','.join(PROBES)} (default {','.join(probes)})")
    add("--network", choices=("target_encoder", "encoder"), help="default: the average, where there is one")
    add("--untrained", action="store_true", help="measure a run's encoder before training too, which takes as long")
    add(
        "--features",
        type=_among(FEATURES),
        default=("last",),
        help="of last, last4 (concatenated) and blocks (each by itself), with commas; of several the best is named",
    )
    add("--heads", type=_among(HEADS), default=HEADS, help=f"of {','.join(HEADS)}; the best on held-out images is kept")
    add("--protocol", choices=PROTOCOLS, default="fast", help="paper: LARS, batch 16,384, 50 epochs; exact: converged")
    add("--seeds", type=whole(), default=1, help="of splits and heads; from 2 on, 95 %% intervals are given")
    add("--labels", type=lambda text: tuple(text.split(",")), help="label columns to probe; all by default")
    add("--task", action="append", default=[], metavar="LABEL=TASK", help="classification, counting or regression")
    add("--share", type=float, default=0.01, help="of the labels of each class, for lowshot and finetune")
    add(
        "--finetune",
        choices=TUNINGS,
        default="paper",
        help="paper: 50 epochs, batch 512, rate 3e-5; small: for few images",
    )
    add("--finetune-epochs", type=int)
    add("--finetune-rate", type=float)
    add("--finetune-batch", type=int)
    add("--ways", type=whole(2), default=Options.ways, help="classes of an episode of fewshot (default %(default)s)")
    add("--shots", type=_numbers, default=Options.shots, help="labelled images of each class (default 1,5)")
    add("--episodes", type=whole(2), default=Options.episodes, help="of fewshot (default %(default)s)")
    add("--images", type=whole(), help="of each set, drawn at random; all by default")
    add("--image-size", type=whole(), help="side of the images, pixels; positions are resampled")
    add(
        "--resize",
        type=whole(),
        help="shorter side before the central crop, pixels; the crop by default (usual: 256 for 224)",
    )
    add("--batch-size", type=whole(), default=256, help="images encoded at once")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="of the features; auto: bf16 on a GPU")
    add("--attention-heads", type=whole(), help="of a .pth.tar whose width is none of the published ones")
    add("--cache", help="a folder to keep the indices of the images in")


def read_options(p: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """The command line; it ends the program where `--task` is none."""
    options = p.parse_intermixed_args(argv)
    if wrong := [item for item in options.task if "=" not in item]:
        p.error(f"--task: expected LABEL=TASK, for example count=counting, got {wrong[0]}")
    return options


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="ijepa-fast probe", description=__doc__.splitlines()[0])
    p.add_argument("run", nargs="?", metavar="RUN", help="a run's folder; the same as --checkpoint RUN")
    p.add_argument("--checkpoint", help="a run, a checkpoint, a published .pth.tar, a Hugging Face folder")
    add_options(p, ("linear", "knn"))
    p.add_argument("--out", help="JSON file for the results")
    return p


@one_sentence()
def main(argv: list[str] | None = None) -> int:
    """Evaluate, print the table, write the JSON. Returns the exit status."""
    p = parser()
    options = read_options(p, argv)
    if (options.run is None) == (options.checkpoint is None):
        p.error("name one RUN, or --checkpoint PATH")
    options.checkpoint = options.checkpoint or options.run
    results = probe(options)
    if options.out:
        Path(options.out).write_text(json.dumps(results, indent=2) + "\n")
    figures = overview(figures_of(results))
    print("\n".join([table(figures), *filter(None, [verdict(figures)])]))
    if any(f.untrained is None for f in figures) and _run(options):
        print("untrained values that are not shown: --untrained measures them", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
