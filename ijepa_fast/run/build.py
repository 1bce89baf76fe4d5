"""From the configuration to the parts of a run."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from functools import partial
from types import ModuleType

import torch
from torch import nn

from ijepa_fast.config import Config, ConfigError
from ijepa_fast.data.dali import TrainLoader
from ijepa_fast.data.sources import Source
from ijepa_fast.data.synthetic import SyntheticLoader
from ijepa_fast.data.views import ViewLoader
from ijepa_fast.engine.schedules import Schedule

SYNTHETIC_IMAGES = 1_281_167  # an epoch of random images: as many as ImageNet-1k has


def plan(config: Config, source: Source | None) -> tuple[Schedule, int]:
    """The schedules of a run over `source` (random images without one), and its number of steps."""
    images = SYNTHETIC_IMAGES if source is None else len(source)
    steps_per_epoch = images // config.batch_size
    if steps_per_epoch == 0:
        raise ConfigError(
            f"batch_size={config.batch_size} is more than the {images} images of {config.data.source}; "
            f"set batch_size to at most {images}"
        )
    build_masks(config, torch.device("cpu"), 0, 1)  # masks that cannot be drawn are an error before anything starts
    optim = config.optim
    schedule = Schedule(
        steps_per_epoch,
        optim.epochs,
        optim.warmup_epochs,
        optim.horizon,
        optim.start_lr,
        optim.lr,
        optim.final_lr,
        optim.weight_decay,
        optim.final_weight_decay,
        optim.weight_decay_shape,
        optim.momentum,
        optim.final_momentum,
        optim.momentum_shape,
    )
    total = optim.epochs * steps_per_epoch
    return schedule, total if optim.steps is None else min(total, optim.steps)


def method_of(config: Config) -> ModuleType:
    """The module of `objective.method`: objective.py, or one named by its import path, found where the trainer runs.

    It has build(config) -> nn.Module: `forward(images, batch)` is the loss, `encoder` and `predictor` are trained,
    `target_encoder` (the encoder's average, kept by the engine) is probed with `patchify`, and tensors named in the
    dict `carried`, where there is one, are checkpointed with the weights;
    make_batches(config, steps_per_epoch) -> draw(images, seed, step, rank): what the loss needs beside the images, with
    `images`, `tokens`, `to` and `pin_memory`; drawn by the arguments alone, so that a resumed run draws the same;
    work(config, batch) -> flops.Work of a step;
    and where an image is seen several times, make_views(config) -> list of data.views.View.
    """
    method = config.objective.method
    try:
        return importlib.import_module("ijepa_fast.methods.ijepa" if method == "ijepa" else method)
    except ImportError as error:
        raise ConfigError(
            f"objective.method: expected ijepa or the import path of a module, got {method!r} ({error}); "
            f"bench.baselines.* is found in a checkout"
        ) from None


def build_objective(config: Config) -> nn.Module:
    """The objective with its networks in fp32 on the CPU, initialised from `seed`."""
    torch.manual_seed(config.seed)
    return method_of(config).build(config)


def build_masks(config: Config, device: torch.device, rank: int, ranks: int, steps_per_epoch: int = 1) -> Callable:
    """The masks of this rank's micro-batch as a function of the micro-step alone, so that a resumed run draws the same.

    They are packed on the CPU, in pinned memory where `device` is a GPU. `steps_per_epoch` counts whole steps.
    """
    draw = method_of(config).make_batches(config, steps_per_epoch * config.engine.accumulation)
    batch = _micro_batch(config, ranks)

    def masks(step: int):
        packed = draw(batch, config.seed, step, rank)
        return packed.pin_memory() if device.type == "cuda" else packed

    return masks


def build_loader(config: Config, source: Source | None, device: torch.device, rank: int, ranks: int, first: int = 0):
    """The endless loader of this rank's micro-batches, from micro-step `first` on; Batch.extra is their PackedBatch.

    Masks are made ahead of the step, in the loader's threads. Without `source`, the images are random.
    """
    data, method = config.data, method_of(config)
    steps_per_epoch = (SYNTHETIC_IMAGES if source is None else len(source)) // config.batch_size
    common = {
        "batch_size": _micro_batch(config, ranks),
        "seed": config.seed,
        "rank": rank,
        "world_size": ranks,
        "device": device,
        "start_step": first,
        "extra": build_masks(config, device, rank, ranks, steps_per_epoch),
    }
    views = method.make_views(config) if hasattr(method, "make_views") else None
    if source is None:
        sides = [view.crop for view in views] if views else data.crop
        return SyntheticLoader(count=SYNTHETIC_IMAGES, crop=sides, **common)
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
    make = partial(ViewLoader, views=views) if views else partial(TrainLoader, crop=data.crop)
    return make(
        source,
        scale=tuple(data.scale),
        ratio=tuple(data.ratio),
        interpolation=data.interpolation,
        flip=data.flip,
        threads=data.threads or max(1, cores),
        prefetch=data.prefetch,
        hw_decoder_load=data.hw_decoder_load,
        bad_files=config.folder / "bad_files.txt",
        max_bad_share=data.max_bad_share,
        max_pixels=data.max_pixels,
        **common,
    )


def _micro_batch(config: Config, ranks: int) -> int:
    return config.batch_size // (ranks * config.engine.accumulation)
