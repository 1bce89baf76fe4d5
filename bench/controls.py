"""What labels are read with from plain statistics of images, without an encoder: what a trained one must be above.

    python bench/controls.py --config quickstart --json bench/results/controls-quickstart.json

The probe is the linear one of a run of the configuration, on its probes' images; in place of features it has one vector
of statistics per image.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import torch.nn.functional as F

from bench.record import show
from ijepa_fast.command import one_sentence
from ijepa_fast.config import ConfigError, load_config
from ijepa_fast.eval.evaluate import evaluate
from ijepa_fast.eval.figures import METRICS, Figure
from ijepa_fast.run.provenance import provenance
from ijepa_fast.run.sources import evaluation, probe_folders

SHOWN = ("accuracy", "r2")
SIDE = 16  # of the small picture


def _colour(x: torch.Tensor) -> torch.Tensor:
    return x.mean((1, 2))


def _small(x: torch.Tensor) -> torch.Tensor:
    return F.adaptive_avg_pool2d(x.permute(0, 3, 1, 2), SIDE).flatten(1)


def _edges(x: torch.Tensor) -> torch.Tensor:
    return x.mean(3).diff(dim=2).abs().mean(2)


def _texture(x: torch.Tensor) -> torch.Tensor:
    return (x - x.median(2, keepdim=True).values).abs().mean((2, 3))


def _energies(x: torch.Tensor) -> torch.Tensor:
    across, down = (x.mean(3).diff(dim=axis).abs().flatten(1) for axis in (2, 1))
    return torch.stack([across.mean(1), down.mean(1), across.std(1), down.std(1)], 1)


# Images (B, H, W, C) in fp32 -> a row of statistics each.
CONTROLS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "mean colour": _colour,
    f"{SIDE} x {SIDE} pixels": _small,
    "edges, four numbers of the whole image": _energies,
    "edges of each row": _edges,
    "deviation from the median of each row": _texture,
    "both by row": lambda x: torch.cat([_edges(x), _texture(x)], 1),
}


def measure(config: str, overrides: list[str]) -> dict[str, Any]:
    """The content of a file of results. Raises ConfigError for a configuration without labelled images to probe."""
    settings = load_config(config, overrides)
    folders = probe_folders(settings)
    if folders is None:
        raise ConfigError(f"{config}: it has no labelled images to probe; set probe.test")
    train, test, options = evaluation(settings, folders, torch.device("cpu"))
    rows = []
    for name, control in CONTROLS.items():

        def encode(images: torch.Tensor, control: Callable = control) -> torch.Tensor:
            return control(images.float() / 255)[:, None]

        figures = [f for f in evaluate(encode, train, test, replace(options, probes=("linear",))) if f.metric in SHOWN]
        values = control(torch.zeros(2, *settings.data.size, settings.data.channels)).shape[1]
        rows.append({"control": name, "values": values, "figures": [figure.to_json() for figure in figures]})
    return provenance(torch.device("cpu")) | {"config": config, "overrides": overrides, "rows": rows}


def table(result: dict[str, Any]) -> list[str]:
    """A row for each control, with the standard error of its figures."""
    first = [Figure.from_json(figure) for figure in result["rows"][0]["figures"]]
    heads = ["without an encoder", "values", *(f"{figure.task}, {METRICS[figure.metric]}" for figure in first)]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in result["rows"]:
        found = [Figure.from_json(figure) for figure in row["figures"]]
        cells = [f"{figure.value:.3f}" + ("" if figure.error is None else f" ± {figure.error:.3f}") for figure in found]
        lines.append("| " + " | ".join([row["control"], str(row["values"]), *cells]) + " |")
    return [f"{first[0].n:,} test images; a linear probe.", "", *lines]


@one_sentence()
def main(argv: list[str] | None = None) -> int:
    """Print the table, write the JSON. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="quickstart")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="configuration keys to change")
    args = parser.parse_intermixed_args(argv)
    result = measure(args.config, args.overrides)
    show(result, table(result), args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
