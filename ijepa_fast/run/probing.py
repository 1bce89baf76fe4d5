"""The probes of a run: frozen features of the target encoder, averaged over patches, before and after training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from ijepa_fast.config import Config, ConfigError
from ijepa_fast.data.scenes import ensure_scenes
from ijepa_fast.data.sources import Source, open_source
from ijepa_fast.eval.labels import match, open_labelled, read_features
from ijepa_fast.eval.suite import probe_suite

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


def encode_with(objective: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """images (b, H, W, 3) uint8 -> the target encoder's features (b, N, D); of a class token, N is 1."""
    encoder = objective.probed

    def encode(images: torch.Tensor) -> torch.Tensor:
        features = encoder(objective.patchify(images), len(images))
        return features.view(len(images), -1, features.shape[1])

    return encode


def probe(config: Config, objective: nn.Module, folders: tuple[str, str], device: torch.device) -> dict:
    """Linear and k-NN probes of every task the labels allow; see eval.suite.probe_suite for what is returned."""
    train, test = (open_labelled(folder, cache=_index_cache(config)) for folder in folders)
    parts = []
    for part in (train, match(train, test)):
        features, rows = read_features(
            encode_with(objective),
            part,
            part.rows(config.probe.images, config.seed),
            device,
            crop=config.data.crop,
            resize=config.probe.resize or config.data.crop,
            interpolation=config.data.interpolation,
        )
        parts += [features, part.at(rows)]
    return probe_suite(*parts, train.tasks)


def _index_cache(config: Config) -> Path:
    """Where indices of images are kept: beside the runs, for all of them."""
    return Path(config.runs) / "index"


def _scenes(config: Config, split: str) -> Path:
    count, seed = (config.data.scenes, 0) if split == "train" else (HELD_OUT, 1)
    return ensure_scenes(Path(config.data.cache).expanduser(), count, config.data.scenes_size, seed)
