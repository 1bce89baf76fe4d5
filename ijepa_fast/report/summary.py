"""What a finished run leaves for a person: probes, summary.json, loss.png and masks.png."""

from __future__ import annotations

import json
import statistics
import sys

import torch
from torch import nn

from ijepa_fast.config import Config
from ijepa_fast.masks.packing import MaskDraw
from ijepa_fast.report.plots import plot_loss, plot_masks, read_log
from ijepa_fast.run.build import build_loader, build_method
from ijepa_fast.run.probing import probe


def finish(config: Config, objective: nn.Module, source, folders: tuple[str, str] | None, device: torch.device) -> dict:
    """Write the run's results and print them. Called by rank 0. Returns what summary.json holds."""
    folder = config.folder
    bad = folder / "bad_files.txt"
    records = [record for record in read_log(folder / "log.jsonl") if "loss" in record]
    summary = {
        "steps": records[-1]["step"],
        "loss_first": records[0]["loss"],
        "loss_last": records[-1]["loss"],
        "images_per_second": statistics.median(r["images_per_second"] for r in records),
        "tokens_per_image": statistics.fmean(r["tokens_per_image"] for r in records),
        "data_wait": statistics.fmean(r["data_wait"] for r in records),
        "context_policy": config.mask.policy,
        "bad_files": len(bad.read_bytes().splitlines()) if bad.is_file() else 0,
        "probe": None,
    }
    plot_loss(records, folder / "loss.png")
    _plot_masks(config, objective, source)
    if folders is not None:
        print("probing the encoder before and after training", file=sys.stderr)
        untrained = build_method(config).to(device)
        untrained.probed.to(device)
        summary["probe"] = {
            "before": probe(config, untrained, folders, device),
            "after": probe(config, objective, folders, device),
        }
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(describe(summary), file=sys.stderr)
    files = ", ".join(sorted(path.name for path in folder.iterdir() if path.is_file()))
    print(f"results are in {folder}/ ({files})", file=sys.stderr)
    return summary


def describe(summary: dict) -> str:
    """A short text of a summary: loss, speed, and each probe before and after training."""
    lines = [
        f"{summary['steps']} steps, loss {summary['loss_first']:.4f} -> {summary['loss_last']:.4f}, "
        f"{summary['images_per_second']:.0f} images/s at {summary['tokens_per_image']:.0f} tokens an image"
    ]
    if summary["bad_files"]:
        lines.append(f"{summary['bad_files']} files could not be decoded: bad_files.txt names them, with reasons")
    if summary["probe"]:
        before, after = summary["probe"]["before"], summary["probe"]["after"]
        lines.append(f"{'probe':<32}{'untrained':>10}{'trained':>10}")
        for name in after:
            for head in ("linear", "knn"):
                key, was, now = _figure(before[name], after[name], head)
                lines.append(f"{f'{name} ({head}, {key})':<32}{was:>10.3f}{now:>10.3f}")
    return "\n".join(lines)


def _figure(before: dict, after: dict, head: str) -> tuple[str, float, float]:
    key = "r2" if after["task"] == "regression" else "accuracy"
    if head == "linear":
        return key, before["linear"][key], after["linear"][key]
    k = "20" if "20" in after["knn"] else next(iter(after["knn"]))
    return f"k={k}, {key}", before["knn"][k][key], after["knn"][k][key]


def _plot_masks(config: Config, method, source) -> None:
    loader = build_loader(config, method, source, torch.device("cpu"), 0, 1)
    try:
        batch = next(loader)
        if isinstance(batch.draw, MaskDraw):  # iBOT's masks are of several views
            plot_masks(batch.images[:8], batch.draw, config.model.patch, config.folder / "masks.png")
    finally:
        loader.close()
