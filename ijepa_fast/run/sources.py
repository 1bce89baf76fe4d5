"""What a run reads: its training images, and the labelled images and options that its encoder is evaluated with."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ijepa_fast.config import Config, ConfigError, load_config
from ijepa_fast.data.headers import BadImage
from ijepa_fast.data.importing import is_code
from ijepa_fast.data.scenes import ensure_scenes
from ijepa_fast.data.settings import STATS, check_shares, is_measured
from ijepa_fast.data.sources import Source, open_source
from ijepa_fast.data.storage import Patience
from ijepa_fast.eval.features import Encode
from ijepa_fast.eval.labels import Labelled, labelled, open_labelled
from ijepa_fast.eval.options import Options, check_images
from ijepa_fast.interop.load import PretrainedEncoder, read
from ijepa_fast.interop.weights import load_state
from ijepa_fast.methods.method import Method
from ijepa_fast.run.build import build_method
from ijepa_fast.run.checkpoint import architecture
from ijepa_fast.run.initial import beginning

HELD_OUT = 1000  # scenes to test on
SAMPLED, HELD = 64, 1 << 28  # images whose contents are compared, and bytes of them after which no more are read
# Of labelled training images where a run names no test images: how many at most are read, one in how many is tested,
# and how few are not worth it.
READ, TESTED, FEWEST = 20_000, 10, 100


def training_source(config: Config) -> Source | None:
    """The images a run trains on, None for random ones. Raises ConfigError naming data.source, or runs.

    Rank 0 says what of the source is left out, and what is wrong with its labels.
    """
    if config.data.source == "synthetic":
        return None
    cache = _index_cache(config)
    try:
        if config.data.source == "scenes":
            return open_source(_scenes(config, "train"))
        source = open_source(config.data.source, cache=cache, reading=config.data.reading)
    except (ValueError, OSError) as error:
        named = str(error).startswith("data.source")
        raise ConfigError(f"{error}" if named else f"data.source: {error}") from None
    if os.environ.get("RANK", "0") == "0":
        if source.left_out:
            print(f"data.source: {len(source)} images; left out: {source.left_out}", file=sys.stderr)
        if source.index.problem:
            print(f"data.source: trained without labels: {source.index.problem}", file=sys.stderr)
    return source


def with_depth(config: Config, source: Source | None) -> Config:
    """The same configuration with the depth of the images for `auto`.

    Raises ConfigError where mean and std are those of photographs and the images are others.
    """
    data, depth = config.data, "uint8" if source is None else source.reading.depth
    if source is not None and (depth != "uint8" or data.stretch != "none") and not is_measured(data):
        what = f"images of {depth}" if depth != "uint8" else f"data.stretch={data.stretch}"
        raise ConfigError(
            f"data.mean, data.std: the defaults are those of photographs of 8 bits, and do not go with {what}; "
            f"{STATS.format(data.source, data.channels)}"
        )
    check_shares(data, depth)
    return config if data.depth == depth else replace(config, data=replace(data, depth=depth))


def label_columns(source: Source | None) -> tuple[dict[str, np.ndarray], dict[str, list[str]]]:
    """Labels of the training images: {label: values}, and {label: its classes}; none of random images."""
    return ({}, {}) if source is None else (source.columns, source.index.classes)


def identity(source: Source | None) -> dict[str, Any] | None:
    """What the training images are, wherever they lie: their number, and a digest of their names and places in shards.

    None for random images. Contents of loose files are not part of it.
    """
    if source is None:
        return None
    index, digest = source.index, hashlib.sha256()
    shards = json.dumps([Path(shard).name for shard in index.shards]).encode()
    places = (index.page, index.y, index.x)  # which add nothing where a file is an image
    for part in (index.names.blob, index.names.ends, shards, index.shard, index.start, index.size, *places):
        digest.update(np.ascontiguousarray(part).data if isinstance(part, np.ndarray) else part)
    return {"images": len(source), "sha256": digest.hexdigest()}


def contents(source: Source) -> str:
    """SHA-256 of what 64 images hold, or all of fewer, evenly spread: their files' bytes, or pixels of arrays.

    Of files of several megabytes there are fewer. What cannot be used counts as nothing. Raises StorageTrouble where
    storage stays away.
    """
    digest, held, patience = hashlib.sha256(), 0, Patience()
    count = min(SAMPLED, len(source))
    for index in (number * len(source) // count for number in range(count)):
        try:
            content = patience(partial(source.content, index), partial(source.name, index))
        except (BadImage, OSError):
            content = b""
        digest.update(f"{index} {len(content)} ".encode() + content)
        held += len(content)
        if held > HELD:
            break
    return digest.hexdigest()


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


def _check_probe(config: Config) -> None:
    """Raises ConfigError where keys of probe do not go together."""
    probe, short = config.probe, min(config.data.size)
    if probe.train is not None and probe.test is None:
        raise ConfigError(
            f"probe.train={probe.train}: it goes with probe.test, which is not set; set it, or leave probe.train out"
        )
    if probe.resize is not None and probe.resize < short:
        raise ConfigError(f"probe.resize={probe.resize}: expected at least the crop, {short} pixels, or null")


def _check_apart(folders: tuple[str, str], train: Labelled, test: Labelled) -> None:
    """Raises ValueError where the test images are the training images, each of which is its own nearest neighbour."""
    one, other = (folder if is_code(folder) else str(Path(folder).resolve()) for folder in folders)
    if one != other and (
        identity(train.source) != identity(test.source) or contents(train.source) != contents(test.source)
    ):
        return
    raise ValueError(f"{folders[1]}: the {len(test.source)} images to test on are those that probes are trained on")


def evaluation(config: Config, folders: tuple[str, str], device: torch.device) -> tuple[Labelled, Labelled, Options]:
    """What eval.evaluate takes beside an encoder: training images, test images, and options."""
    cache, reading = _index_cache(config), config.data.reading
    train, test = (open_labelled(folder, cache=cache, reading=reading) for folder in folders)
    return train, test, run_options(config, device)


def run_options(config: Config, device: torch.device) -> Options:
    """How a run's encoder is evaluated when it ends."""
    return Options(
        crop=config.data.size,
        resize=config.probe.resize,
        interpolation=config.data.interpolation,
        device=device,
        images=config.probe.images,
        draw_seed=config.seed,
    )


Evaluated = tuple[Labelled, Labelled, Options]  # what eval.evaluate takes beside an encoder


def evaluated(config: Config, source: Source | None, device: torch.device) -> Evaluated | None:
    """What a run's encoder is evaluated with when it ends; None where there are no labels, or nobody asked.

    Where the training images have labels and no test images are named, k-NN is tried on a tenth of 20,000 of them; of
    windows, all of an image are on one side. Where it cannot be, rank 0 says why on stderr. Raises ConfigError where
    the images that are named have no labels, one for all, or others than those they are to be tested on, where they
    are the same, and where they are fewer than k-NN's neighbours.
    """
    if config.probe.enabled:
        _check_probe(config)
    if (folders := probe_folders(config)) is not None:
        try:
            train, test, options = evaluation(config, folders, device)
            train, test = check_images(config.data, train, test, options)
            _check_apart(folders, train, test)
        except (ValueError, OSError) as error:
            raise ConfigError(f"probe.train, probe.test: {error}; or set probe.enabled=false") from None
        return train, test, options
    try:
        return held_out(config, source, device)
    except ValueError as error:  # training needs no labels
        if config.probe.enabled and source is not None and os.environ.get("RANK", "0") == "0":
            print(f"the encoder will not be evaluated: {error}", file=sys.stderr)
        return None


def held_out(config: Config, source: Source | None, device: torch.device) -> Evaluated:
    """A tenth of the training images to test on, and the others. Raises ValueError that says why there is none."""
    if not config.probe.enabled:
        raise ValueError("probe.enabled is false")
    if source is None:
        raise ValueError("probe.test is not set, and random images have no labels")
    if not source.columns:
        raise ValueError("probe.test is not set, and the training images have no labels")
    if len(source) < FEWEST:
        raise ValueError(f"probe.test is not set, and a tenth of {len(source)} labelled images is too few to test on")
    whole, place = labelled(source, config.data.source), _drawn(source, config.seed)
    rows = np.argsort(place, kind="stable")[:READ]
    held = place[rows] < max(1, place[rows[len(rows) // TESTED]])
    if held.all():
        raise ValueError(f"probe.test is not set, and all {len(source)} windows are of one image")
    test, train = (whole.take(np.sort(part)) for part in (rows[held], rows[~held]))
    options = replace(run_options(config, device), probes=("knn",))
    return *check_images(config.data, train, test, options), options


def _drawn(source: Source, seed: int) -> np.ndarray:
    """Of each sample, the place of its image in an order that `seed` draws, from 0, int64 (n,)."""
    index = source.index
    images = np.arange(len(source))
    if len(index.y):  # windows
        shard, page = (part if len(part) else np.zeros(len(source), int) for part in (index.shard, index.page))
        keys = [(index.names[i], int(shard[i]), int(page[i])) for i in range(len(source))]
        ids = {key: number for number, key in enumerate(dict.fromkeys(keys))}
        images = np.array([ids[key] for key in keys])
    return np.random.default_rng(seed).permutation(int(images.max()) + 1)[images]


def untrained(config: Config, device: torch.device, foreign: bool = True) -> PretrainedEncoder:
    """The encoder of the run before training, with the weights of `init` where it begins with some, on `device`.

    foreign: see method_class. Raises ConfigError, where those weights are not there any more too.
    """
    method = build_method(config, foreign=foreign)
    if config.init is not None:
        name = "target_encoder" if "encoder" in method.averaged else "encoder"
        try:
            state = beginning(read(config.init, config.model.heads), method, config.data.crop).get(name)
            if state is not None:
                load_state(method.probed, state, name)
        except (ValueError, OSError) as error:
            raise ConfigError(f"init: {error}") from None
    arch = architecture(method.encoder, config.model, config.data, config.objective.method, 0)
    return PretrainedEncoder(method.probed, arch).to(device)


def as_begun(run: str | Path, encoder: PretrainedEncoder) -> PretrainedEncoder:
    """The encoder of the folder `run` as it was before training; encoder: what it became, whose image size it has.

    Raises ValueError where `run` is no run's folder, ConfigError where its parts do not go together.
    """
    path = Path(run) / "config.yaml"
    if not path.is_file():
        raise ValueError(f"--untrained: expected a run's folder, which says how it began, got {run}")
    config = load_config(path)
    if encoder.arch.size != config.data.size:
        config = replace(config, data=replace(config.data, crop=encoder.crop))
    return untrained(config, encoder.encoder.norm.weight.device, foreign=False)


def encode_with(method: Method) -> Encode:
    """The encoder that a method leaves: images (b, H, W, C) -> features (b, N, D); of a class token, N is 1."""
    encoder = method.probed

    def encode(images: torch.Tensor) -> torch.Tensor:
        features = encoder(method.patchify(images), len(images))
        return features.view(len(images), -1, features.shape[1])

    return encode


def _index_cache(config: Config) -> Path:
    """Where indices of images are kept: beside the runs, for all of them. Raises ConfigError naming runs."""
    folder = Path(config.runs) / "index"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        usable = os.access(folder, os.W_OK | os.X_OK)
    except OSError as error:
        raise ConfigError(f"runs={config.runs}: cannot be written: {error.strerror}; set another folder") from None
    if not usable:
        raise ConfigError(f"runs={config.runs}: {folder} cannot be written; set another folder")
    return folder


def _scenes(config: Config, split: str) -> Path:
    count, seed = (config.data.scenes, 0) if split == "train" else (HELD_OUT, 1)
    return ensure_scenes(Path(config.data.cache).expanduser(), count, config.data.scenes_size, seed)
