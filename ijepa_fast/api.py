"""The Python interface: train a run, and turn images into vectors.

    run = ijepa_fast.train("photos/", config="quickstart", name="photos", optim={"epochs": 10})
    vectors = ijepa_fast.embed(["a.jpg", "b.jpg"], run.encoder())     # float32 (2, width)

`python -m ijepa_fast embed SOURCE --checkpoint RUN --out vectors.npy` does the latter from a shell.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from ijepa_fast import train as training
from ijepa_fast.command import one_sentence, whole
from ijepa_fast.config import load_config
from ijepa_fast.data.central import eval_batches
from ijepa_fast.data.datasets import DatasetSource
from ijepa_fast.data.expand import expand
from ijepa_fast.data.formats import needs
from ijepa_fast.data.held import Arrays, hold
from ijepa_fast.data.index import Index, Names
from ijepa_fast.data.sources import Source, open_source
from ijepa_fast.eval.labels import Samples
from ijepa_fast.files import publish
from ijepa_fast.interop.load import PretrainedEncoder, load
from ijepa_fast.probe import device_of
from ijepa_fast.report.plots import read_log
from ijepa_fast.report.summary import read_summary
from ijepa_fast.run import lock, pulse

POOLS = ("mean", "none")


@dataclass(frozen=True)
class Run:
    """A finished run. folder: where its results are."""

    folder: Path

    @property
    def log(self) -> list[dict[str, Any]]:
        """The records of its log."""
        return read_log(self.folder / "log.jsonl")

    @property
    def summary(self) -> dict[str, Any] | None:
        """What its summary.json holds."""
        return read_summary(self.folder)

    def encoder(self, **options: Any) -> PretrainedEncoder:
        """Its encoder. options: of `ijepa_fast.load`."""
        return load(self.folder, **options)


def train(data: Any = None, config: str | Path = "quickstart", **overrides: Any) -> Run:
    """Train in this process, on one device, to the end; a run of that name that was interrupted goes on.

    Args:
        data: what `data.source` may be; or a data set, or an array (N, C, H, W) or (N, H, W, C), of this program.
            A mapping is the section `data` of the configuration, whose `source` is one of these. None: as the
            configuration says.
        config: a YAML file, or the name of a ready one.
        overrides: keys of the configuration, sections as mappings: batch_size=64, optim={"epochs": 10}.

    Raises ValueError (ConfigError) for what a user can mend, as the command says it.
    """
    section = dict(data) if isinstance(data, Mapping) else {} if data is None else {"source": data}
    if "source" in section and not isinstance(section["source"], str | os.PathLike):
        section["source"] = hold(section["source"])
    given = _dotted(overrides | {f"data.{name}": value for name, value in section.items()})
    settings = load_config(config, [f"{name}={json.dumps(value)}" for name, value in given])
    try:
        training.train(settings)
    finally:
        pulse.end()
        lock.release()
    return Run(settings.folder)


def embed(
    data: Any,
    encoder: str | Path | PretrainedEncoder,
    *,
    batch_size: int = 64,
    pool: str = "mean",
    device: str | torch.device = "cpu",
) -> np.ndarray:
    """Features of images, in their order: float32 (n, D), or (n, N, D) of N patches with pool="none".

    Args:
        data: a list of paths; a path, as `data.source` may be; an array (n, C, H, W) or (n, H, W, C); or a data set.
        encoder: what `ijepa_fast.load` gives, or takes.
        batch_size: images encoded at once.
        pool: "mean" over patches, or "none".
        device: of the encoder, where it is not loaded yet.

    Raises ValueError, naming the first image that cannot be used.
    """
    if isinstance(encoder, str | Path):
        encoder = load(encoder, device=device)
    source = _source(data, encoder)
    parts = list(vectors(source, encoder, batch_size, pool))
    found = np.concatenate([rows for rows, _ in parts]) if parts else np.empty(0, np.int64)
    if len(found) < len(source):
        bad = sorted(set(range(len(source))) - set(found.tolist()))
        raise ValueError(f"{source.name(bad[0])} cannot be decoded ({len(bad)} of {len(source)}); leave it out")
    return np.concatenate([features for _, features in parts])


@torch.no_grad()
def vectors(
    source: Source, encoder: PretrainedEncoder, batch_size: int, pool: str
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(numbers of samples int64 (b,), their features float32) of those that can be decoded, batch by batch."""
    if pool not in POOLS:
        raise ValueError(f"pool: expected one of {', '.join(POOLS)}, got {pool!r}")
    device = encoder.encoder.norm.weight.device
    options: dict[str, Any] = {"crop": encoder.crop, "resize": encoder.crop, "device": device}
    options |= {"interpolation": encoder.arch.interpolation, "max_bad_share": 1.0}
    for images, rows in eval_batches(Samples(source, np.arange(len(source))), batch_size=batch_size, **options):
        features = encoder(images).float()
        yield rows.numpy(), (features.mean(1) if pool == "mean" else features).cpu().numpy()


def _source(data: Any, encoder: PretrainedEncoder) -> Source:
    reading = replace(encoder.arch.reading, where=None)  # the map was of the training's images
    if isinstance(data, str | os.PathLike):
        return open_source(os.fspath(data), reading=reading)
    if isinstance(data, np.ndarray | torch.Tensor):
        return DatasetSource("array", Arrays(data), reading)
    if isinstance(data, Sequence) and all(isinstance(item, str | os.PathLike) for item in data):
        index = Index(Names.of(map(os.fspath, data)))
        return Source("", index if reading.window is None else expand(index, "", reading), reading=reading)
    return DatasetSource("data", data, reading)


def _dotted(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping) and f"{prefix}{name}" != "objective.options":
            yield from _dotted(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", str(value) if isinstance(value, Path) else value


@one_sentence()
def main(argv: list[str] | None = None) -> int:
    """The command `embed`; its exit status."""
    parser = argparse.ArgumentParser(prog="python -m ijepa_fast embed", description="Turn images into vectors.")
    parser.add_argument("path", help="whatever data.source takes")
    parser.add_argument("--checkpoint", required=True, metavar="RUN_OR_FILE", help="whatever ijepa_fast.load takes")
    parser.add_argument("--out", required=True, type=Path, help=".npy, with the names beside it in .txt; or .parquet")
    parser.add_argument("--pool", choices=POOLS, default="mean")
    parser.add_argument("--batch-size", type=whole(), default=64)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    args = parser.parse_args(argv)
    if args.out.suffix not in (".npy", ".parquet"):
        raise ValueError(f"--out: expected a name that ends in .npy or .parquet, got {args.out.name!r}")
    encoder = load(args.checkpoint, device=device_of(args.device))
    source = _source(args.path, encoder)
    batches = vectors(source, encoder, args.batch_size, args.pool)
    bar = tqdm(batches, "encoding", -(-len(source) // args.batch_size), unit="batch", mininterval=1, disable=None)
    parts = list(bar)
    if not parts:
        raise ValueError(f"{args.path}: none of {len(source)} images can be decoded")
    rows, features = (np.concatenate(part) for part in zip(*parts))
    names = [source.name(row) for row in rows.tolist()]
    if args.out.suffix == ".parquet":
        arrow = needs("pyarrow", "--out *.parquet")
        parquet = needs("pyarrow.parquet", "--out *.parquet")
        table = arrow.table({"name": names, "features": list(features.reshape(len(features), -1))})
        with publish(args.out) as draft:
            parquet.write_table(table, draft)
    else:
        with publish(args.out) as draft, open(draft, "wb") as file:
            np.save(file, features)
        args.out.with_suffix(".txt").write_text("".join(f"{name}\n" for name in names))
    left = f"; {len(source) - len(rows)} could not be decoded" if len(rows) < len(source) else ""
    print(f"{args.out}: {' x '.join(map(str, features.shape))}{left}")
    return 0
