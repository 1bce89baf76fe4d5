"""What a finished run leaves for a person: summary.json with the figures of the probes, loss.png and masks.png."""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from ijepa_fast.config import Config, ConfigError
from ijepa_fast.data.sources import Source
from ijepa_fast.engine.precision import Precision
from ijepa_fast.eval.evaluate import evaluate
from ijepa_fast.eval.figures import Figure, against, figures_of, headline, table, verdict
from ijepa_fast.interop.load import load
from ijepa_fast.masks.packing import MaskDraw
from ijepa_fast.methods.method import Method
from ijepa_fast.report.plots import plot_loss, plot_masks, read_log
from ijepa_fast.run.build import build_loader
from ijepa_fast.run.provenance import FORMAT, provenance
from ijepa_fast.run.sources import Evaluated, encode_with, held_out, probe_folders, untrained

SEEN = "tested_on_training_images"  # key of the summary
UNKNOWN = "not_evaluated"  # key of the summary: why there are no figures, null where the encoder was evaluated


def finish(
    config: Config,
    method: Method,
    source: Source | None,
    labelled: Evaluated | None,
    device: torch.device,
    began: float,
    precision: Precision,
) -> dict[str, Any]:
    """Write the run's results and print them. Called by rank 0. Returns what summary.json holds.

    labelled: what the encoder is evaluated with, None to evaluate nothing. began: time.perf_counter() of the start.
    precision: what was computed in, and why.
    """
    folder = config.folder
    bad = folder / "bad_files.txt"
    records = [record for record in read_log(folder / "log.jsonl") if "loss" in record]
    plot_loss(records, folder / "loss.png")
    _plot_masks(config, method, source)
    if config.log.tensorboard:
        _board(folder)
    summary = provenance(device) | {
        "wall_seconds": time.perf_counter() - began,  # of this launch, with what follows the last step
        "train_seconds": train_seconds(records, records[-1]["step"], config.batch_size),
        "steps": records[-1]["step"],
        "loss_first": records[0]["loss"],
        "loss_last": records[-1]["loss"],
        "images_per_second": statistics.median(r["images_per_second"] for r in records),
        "tokens_per_image": statistics.fmean(r["tokens_per_image"] for r in records),
        "data_wait": statistics.fmean(r["data_wait"] for r in records),
        "context_policy": config.mask.policy if method.reads_mask else None,
        "precision": precision.name,
        "precision_reason": precision.reason,
        "bad_files": len(bad.read_bytes().splitlines()) if bad.is_file() else 0,
        # Whether the test images are among those trained on, of which the probe did not see them.
        SEEN: labelled is not None and probe_folders(config) is None,
        "figures": [],
        UNKNOWN: _why_not(config, source, device) if labelled is None else "the evaluation did not finish",
    }
    _write(folder, summary)  # an evaluation that fails leaves what training cost hours for
    if labelled is not None:
        figures = [figure.to_json() for figure in _evaluate(config, method, labelled, device)]
        wall = time.perf_counter() - began
        summary |= {"wall_seconds": wall, "figures": figures, UNKNOWN: None}
        _write(folder, summary)
    print(describe(summary), file=sys.stderr)
    files = ", ".join(sorted(path.name for path in folder.iterdir() if path.is_file()))
    print(f"results are in {folder}/ ({files})", file=sys.stderr)
    return summary


def _write(folder: Path, summary: dict[str, Any]) -> None:
    """Write summary.json whole, or leave it as it was."""
    path = folder / "summary.json.part"
    path.write_text(json.dumps(summary, indent=2) + "\n")
    path.replace(folder / "summary.json")


def _why_not(config: Config, source: Source | None, device: torch.device) -> str:
    try:
        held_out(config, source, device)
    except ValueError as error:
        return str(error)
    return "nobody asked"


def read_summary(folder: Path) -> dict[str, Any] | None:
    """The summary.json of a run's folder, None where the run has not finished.

    Raises ValueError for another version of the format; the first had no number.
    """
    path = folder / "summary.json"
    if not path.is_file():
        return None
    again = f"evaluate the run again: python -m ijepa_fast probe --checkpoint {folder}"
    try:
        summary = json.loads(path.read_text())
    except ValueError:
        summary = None
    if not isinstance(summary, dict):
        raise ValueError(f"{path} cannot be read; {again}")
    if (found := summary.get("version", 1)) != FORMAT:
        raise ValueError(
            f"{path} has version {found} of the format, and this ijepa_fast reads version {FORMAT}; {again}"
        )
    return summary


def train_seconds(records: list[dict[str, Any]], step: int, batch: int) -> float:
    """Seconds of all steps up to `step` by the log's rates, over all launches; checkpoints and probes are not in it."""
    seconds, last = 0.0, 0
    for record in records:
        if "loss" in record and record["step"] <= step:
            images = record.get(
                "images", record["step"] * batch
            )  # earlier versions logged none, and kept the batch size
            seconds += (images - last) / record["images_per_second"]
            last = images
    return seconds


def describe(summary: dict[str, Any]) -> str:
    """A short text of a summary: loss, speed, and the main figures of the probes."""
    lines = [
        f"{summary['steps']} steps, loss {summary['loss_first']:.4f} -> {summary['loss_last']:.4f}, "
        f"{summary['images_per_second']:.0f} images/s at {summary['tokens_per_image']:.0f} tokens per image"
    ]
    if summary["bad_files"]:
        lines.append(f"{summary['bad_files']} files could not be decoded: bad_files.txt names them, with reasons")
    if figures := headline(figures_of(summary)):
        if summary.get(SEEN):
            lines.append("k-NN of training images that the probe did not see; probe.test=FOLDER names others")
        lines += [table(figures), *filter(None, [verdict(figures)])]
    return "\n".join(lines)


def _evaluate(config: Config, method: Method, labelled: Evaluated, device: torch.device) -> list[Figure]:
    train, test, _ = labelled
    some = "" if probe_folders(config) else f": k-NN of {len(test.source)} among {len(train.source)} training images"
    print(f"evaluating the encoder before and after training{some}", file=sys.stderr)
    before: list[Figure] = []
    try:
        first = untrained(config, device)
    except ConfigError as error:  # the weights it began with were moved away
        print(f"figures before training are left out: {error}", file=sys.stderr)
    else:
        before = evaluate(first, *labelled)
    # At ZeRO 3 the other ranks, which are not here, hold parts of a network; its last checkpoint is whole.
    whole = config.engine.zero < 3 or "encoder" in method.averaged
    after = encode_with(method) if whole else load(config.folder, device=device)
    return against(evaluate(after, *labelled), before)


def _board(folder: Path) -> None:
    """Show masks.png in TensorBoard too."""
    if not (folder / "masks.png").is_file():
        return
    import numpy as np
    from PIL import Image
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder / "tensorboard")) as board, Image.open(folder / "masks.png") as picture:
        board.add_image("masks", np.asarray(picture.convert("RGB")), dataformats="HWC")


def _plot_masks(config: Config, method: Method, source: Source | None) -> None:
    loader = build_loader(config, method, source, torch.device("cpu"), 0, 1)
    try:
        batch = next(loader)
        images, draw = batch.images, batch.draw
        if isinstance(draw, MaskDraw) and isinstance(images, torch.Tensor):  # iBOT's are of several views
            plot_masks(images[:8], draw, config.model.patch, config.folder / "masks.png")
    finally:
        loader.close()
