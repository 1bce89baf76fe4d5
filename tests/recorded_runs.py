"""Folders of runs that were never trained: a configuration, a log, a summary, as a run would leave them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from ijepa_fast.config import load_config, save_config
from ijepa_fast.eval.figures import Figure
from ijepa_fast.run.provenance import FORMAT, LAUNCHES

LAUNCH = {
    "date": "2026-03-01T10:00:00+00:00",
    "host": "node-1",
    "device": "a GPU",
    "versions": {"ijepa_fast": "0.1.0", "torch": "2.13.0"},
    "commit": "0123456789abcdef0123456789abcdef01234567-dirty",
    "command": "ijepa-fast train --config quickstart optim.lr=0.001",
    "step": 0,
    "ranks": 2,
}
UNTRAINED: dict[str, Any] = {
    "rankme": 40.0,
    "target_variance": 0.5,
    "position_share": 0.2,
    "residual_norm": 1.0,
    "kind": {"lidar": 3.5},
}


def record(step: int, loss: float = 0.5, probe: dict[str, Any] | None = None) -> dict[str, Any]:
    """A line of the log, with a batch of 64."""
    speed = {"images_per_second": 100.0, "tokens_per_second": 9000.0, "tokens_per_image": 90.0, "data_wait": 0.01}
    schedule = {"lr": 1e-3, "weight_decay": 0.05, "ema": 0.996, "images": 64 * step}
    return {"step": step, "loss": loss, **speed, **schedule} | ({"probe": probe} if probe else {})


def log(steps: int = 10, last: float = 0.3, rank: float = 30.0) -> list[dict[str, Any]]:
    """Lines of a run whose loss falls to `last` and whose probe ends with this RankMe."""
    lines = [record(step, 0.9 + (last - 0.9) * step / steps) for step in range(1, steps + 1)]
    now = UNTRAINED | {
        "rankme": rank,
        "untrained": UNTRAINED,
        "collapsed": False,
        "kind": {"accuracy": 0.4, "lidar": 3.0},
    }
    lines[-1]["probe"] = now
    return lines


def figure(task: str = "kind", value: float = 0.5, untrained: float | None = 0.3, n: int = 1000, **more: Any) -> Figure:
    """A linear probe's accuracy, with the standard errors of `n` test images."""
    error = (value * (1 - value) / n) ** 0.5
    before = None if untrained is None else (untrained * (1 - untrained) / n) ** 0.5
    found = Figure(task, "linear", "accuracy", value, None, (value,), 0.1, untrained, n, (), error, before)
    return replace(found, **more)


def folder_of(
    runs: Path,
    *overrides: str,
    name: str = "one",
    lines: list[dict[str, Any]] | None = None,
    figures: list[Figure] | None = None,
    launch: dict[str, Any] | None = LAUNCH,
) -> Path:
    """The folder of a run `name` in `runs`; figures: of its summary, None: it has not ended."""
    config = load_config("quickstart", ["data.source=synthetic", "batch_size=64", *overrides])
    folder = runs / name
    folder.mkdir(parents=True)
    save_config(replace(config, name=name), folder / "config.yaml")
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in (log() if lines is None else lines)))
    if launch:
        (folder / LAUNCHES).write_text(json.dumps(launch) + "\n")
    if figures is not None:
        summary = {key: value for key, value in LAUNCH.items() if key not in ("command", "step", "ranks")}
        summary |= {"version": FORMAT, "date": "2026-03-01T11:30:00+00:00", "figures": [f.to_json() for f in figures]}
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder
