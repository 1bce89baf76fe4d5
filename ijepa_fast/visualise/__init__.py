"""Make what a run's predictor predicts visible: train a decoder from pooled predictions to images, and draw with it.

python -m ijepa_fast visualise RUN [--of prediction|target|untrained] [--steps N] [--images FOLDER]

It writes RUN/pictures/<of>.png and <of>.json, which the run's report shows; docs/pictures.md says how to read them.
"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from ijepa_fast.command import one_sentence, whole
from ijepa_fast.config import Config, load_config
from ijepa_fast.data.importing import is_code
from ijepa_fast.data.sources import Source, open_source
from ijepa_fast.files import publish
from ijepa_fast.report import predicted
from ijepa_fast.run.lock import Lock
from ijepa_fast.run.provenance import provenance
from ijepa_fast.run.sources import training_source
from ijepa_fast.visualise import checks, conditions, grid
from ijepa_fast.visualise.conditions import KINDS, Conditions
from ijepa_fast.visualise.decoder import Decoder, diffusers
from ijepa_fast.visualise.training import Stopped, Trainer, check_made

STEPS, BATCH = 5000, 32
COUNT, SIDE = 10_000, 32
LEAST_SIDE, MOST_SIDE = 8, 256
SAMPLING = 25  # steps of a sample
SEEDS = 2


def visualise(
    run: str | Path,
    of: str = "prediction",
    steps: int = STEPS,
    images: str | Path | None = None,
    count: int = COUNT,
    side: int = SIDE,
    seeds: int = SEEDS,
    guidance: float = 1.0,
) -> dict[str, Any]:
    """Train a decoder on what the run in folder `run` makes of target blocks, draw the sheet, and check it.

    of: what the decoder is told, of KINDS. steps: of training, BATCH images each; more of them go on where fewer ended.
    images: a folder, instead of the run's training images. count: how many of them at most. side: the shorter one of
    the pictures, pixels. seeds: of the samples and the checks. guidance: of the samples, 1: none.
    Returns what RUN/pictures/<of>.json holds. Raises ValueError and ImportError for what a user can mend, Stopped.
    """
    run, folder = Path(run), Path(run) / "pictures"
    diffusers()
    if not (run / "config.yaml").is_file():
        raise ValueError(f"{run}: expected the folder of a run, with config.yaml and checkpoints")
    config = load_config(run / "config.yaml")
    networks = conditions.networks_of(run, config)
    source = _source(config, images)
    size, fold = conditions.size_of_pictures(config.data.size, side)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    made = {
        "checkpoint": networks.checkpoint,
        "images": str(images or config.data.source),
        "count": count,
        "size": size,
    }
    with ExitStack() as stack:
        stack.callback(Lock(folder / ".lock").release)
        known = folder / "conditions.pt"
        if known.is_file():
            told, then = conditions.load(known)
            check_made(folder, then, made)
        else:
            told = conditions.conditions_of(config, networks, source, count, size, device)
            conditions.save(known, told, made)
        if config.data.channels != 3:
            shown = "the first three" if config.data.channels > 3 else "the first, in grey,"
            print(f"of {config.data.channels} channels {shown} are drawn; the encoder saw all", file=sys.stderr)
        torch.manual_seed(config.seed)
        decoder = Decoder(told.pooled[of].shape[-1], size, fold)
        trainer = Trainer(decoder, told, of, BATCH, config.seed, device)
        trainer.train(steps, folder / f"{of}.pt", made | {"batch": BATCH})
        results = provenance(device) | {"of": of, "made": made, "steps": trainer.step, "losses": trainer.losses}
        results |= {"images": len(told.images) - told.held, "held_out": told.held, "guidance": guidance}
        results["precision"] = decoder.precision
        results["parameters"] = sum(weight.numel() for weight in decoder.parameters())
        results["checks"] = _check(trainer.drawing, told, of, seeds, guidance, folder / f"{of}.png")
        with publish(folder / f"{of}.json") as draft:
            draft.write_text(json.dumps(results, indent=1) + "\n")
    return results


def _check(
    decoder: Decoder, told: Conditions, of: str, seeds: int, guidance: float, picture: Path
) -> list[dict[str, Any]]:
    """The checks for each seed; the sheet of the first is written to `picture`."""
    decoder.eval()
    found = []
    for seed in range(seeds):
        print(f"checks, seed {seed} of {seeds}", file=sys.stderr)
        samples = checks.samples_of(decoder, told, of, seed, SAMPLING, guidance)
        if seed == 0:
            with publish(picture) as draft:
                grid.draw(told, samples, of).save(draft, "PNG", optimize=True)
        denoising = checks.denoising(decoder, told, of, seed)
        found.append({"seed": seed, "denoising": denoising, "variance": checks.variances(told, samples)})
    return found


def _source(config: Config, images: str | Path | None) -> Source:
    if images is not None:
        return open_source(images, reading=config.data.reading)
    if is_code(config.data.source):  # a run's folder from elsewhere must not run code
        raise ValueError(f"{config.data.source} is code, which only training imports; name images with --images FOLDER")
    source = training_source(config)
    if source is None:
        raise ValueError(f"data.source={config.data.source} has no images to show; name some with --images FOLDER")
    return source


def parser() -> argparse.ArgumentParser:
    """The command line."""
    about = "Train a decoder from what a run's predictor predicts of a block to images, and draw with it."
    p = argparse.ArgumentParser(prog="ijepa-fast visualise", description=about)
    add = p.add_argument
    add("run", metavar="RUN", help="the run's folder")
    add(
        "--of",
        choices=KINDS,
        default=KINDS[0],
        help="what is drawn: the predictor's output, the target encoder's, or that of a predictor before training",
    )
    add("--steps", type=whole(), default=STEPS, help=f"of training, {BATCH} images each (default %(default)s)")
    add("--images", metavar="FOLDER", help="images to train the decoder on (default: the run's)")
    add("--count", type=whole(), default=COUNT, help="how many of them at most (default %(default)s)")
    add("--side", type=whole(LEAST_SIDE), default=SIDE, help="of the pictures, pixels (default %(default)s)")
    add("--seeds", type=whole(), default=SEEDS, help="of the samples and checks (default %(default)s)")
    add("--guidance", type=float, default=1.0, help="exaggerates what was predicted; 1: not at all (default)")
    return p


@one_sentence()
def main(argv: list[str] | None = None) -> int:
    """The command line; its exit status. Stopped by a signal, the same command goes on."""
    options = parser().parse_args(argv)
    if options.side > MOST_SIDE:
        raise ValueError(f"--side: expected at most {MOST_SIDE}, got {options.side}")
    if not 0 <= options.guidance <= 100:
        raise ValueError(f"--guidance: expected 0 to 100, got {options.guidance}")
    try:
        results = visualise(**vars(options))
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        return stopped.status
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130
    head, rows = predicted.HEAD, predicted.rows_of(results["checks"])
    widths = [max(map(len, column)) for column in zip(head, *rows)]
    print("\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in (head, *rows)))
    print("\n".join(predicted.verdict(results["checks"])))
    print(Path(options.run) / "pictures" / f"{options.of}.png")
    return 0
