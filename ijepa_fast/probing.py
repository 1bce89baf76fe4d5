"""The probes of a run: frozen, average-pooled features of the target encoder before and after training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from ijepa_fast.config import Config, ConfigError
from ijepa_fast.data.dali import eval_batches
from ijepa_fast.data.scenes import ensure_scenes
from ijepa_fast.data.sources import Source, open_source
from ijepa_fast.eval.features import pooled_features
from ijepa_fast.eval.suite import probe_suite
from ijepa_fast.objective import IJEPA

HELD_OUT = 1000  # scenes to test on


def training_source(config: Config) -> Source | None:
    """The images a run trains on, None for random ones. Raises ConfigError naming data.source."""
    if config.data.source == "synthetic":
        return None
    try:
        if config.data.source == "scenes":
            return open_source(_scenes(config, "train"))
        return open_source(config.data.source, cache=_index_cache(config))
    except (ValueError, OSError) as error:
        raise ConfigError(f"data.source: {error}") from None


def probe_folders(config: Config) -> tuple[str, str] | None:
    """Labelled training and test images of the probes, or None where the run has none."""
    probe = config.probe
    if not probe.enabled:
        return None
    if config.data.source == "scenes" and probe.train is None and probe.test is None:
        return str(_scenes(config, "train")), str(_scenes(config, "test"))
    if probe.test is None:
        return None
    return probe.train or config.data.source, probe.test


def encode_with(objective: IJEPA) -> Callable[[torch.Tensor], torch.Tensor]:
    """images (b, H, W, 3) uint8 -> the target encoder's features (b, N, D)."""
    encoder = objective.target_encoder

    def encode(images: torch.Tensor) -> torch.Tensor:
        return encoder(objective.patchify(images), len(images)).view(len(images), encoder.patches, -1)

    return encode


def probe(config: Config, objective: IJEPA, folders: tuple[str, str], device: torch.device) -> dict:
    """Linear and k-NN probes of every task the labels allow; see eval.suite.probe_suite for what is returned."""
    features, labels = [], []
    for folder in folders:
        source = open_source(folder, cache=_index_cache(config))
        found, tasks = read_labels(source)
        batches = eval_batches(
            source,
            batch_size=256,
            crop=config.data.crop,
            resize=config.probe.resize or config.data.crop,
            device=device,
            interpolation=config.data.interpolation,
        )
        # Samples are in class order, so a part of them is drawn, not cut.
        rows = np.sort(np.random.default_rng(config.seed).permutation(len(source))[: config.probe.images])
        found_features, _ = pooled_features(encode_with(objective), batches, device)
        features.append(found_features[rows])
        labels.append({name: values[rows] for name, values in found.items()})
    return probe_suite(features[0], labels[0], features[1], labels[1], tasks)


def read_labels(source: Source) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Every label column (n,) of `source`, and its task: numbers are regressed, a column named count is counted."""
    if not source.columns:
        raise ConfigError(f"probe: {source.root} has no labels; expected one folder a class, or a labels.csv")
    labels = {name: torch.from_numpy(np.array(values)) for name, values in source.columns.items()}
    tasks = {name: "regression" if values.is_floating_point() else "classification" for name, values in labels.items()}
    return labels, tasks | {name: "counting" for name in tasks if name == "count"}


def _index_cache(config: Config) -> Path:
    """Where indices of images are kept: beside the runs, for all of them."""
    return Path(config.runs) / "index"


def _scenes(config: Config, split: str) -> Path:
    count, seed = (config.data.scenes, 0) if split == "train" else (HELD_OUT, 1)
    return ensure_scenes(Path(config.data.cache).expanduser(), count, config.data.scenes_size, seed)
