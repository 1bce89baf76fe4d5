"""From the configuration to the parts of a run. Below this file, every part takes its own section or plain values."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ijepa_fast.agree import check_capabilities
from ijepa_fast.config import Config, ConfigError
from ijepa_fast.cores import cores
from ijepa_fast.data.dali import TrainLoader
from ijepa_fast.data.resident import IN_PLACE
from ijepa_fast.data.sources import Source
from ijepa_fast.data.synthetic import SyntheticLoader
from ijepa_fast.data.views import ViewLoader
from ijepa_fast.data.where import Inside
from ijepa_fast.engine.compiler import check_compiler
from ijepa_fast.engine.engine import Engine
from ijepa_fast.engine.precision import Precision, choose_precision
from ijepa_fast.interop.load import load
from ijepa_fast.masks.draw import Draw
from ijepa_fast.methods.method import Method, Setup, method_class
from ijepa_fast.models.vit import Encoder
from ijepa_fast.run.checkpoint import read_state

SYNTHETIC_IMAGES = 1_281_167  # an epoch of random images: as many as ImageNet-1k has


@dataclass(frozen=True)
class Length:
    """How long a run is, in optimiser steps."""

    steps_per_epoch: int
    steps: int

    @classmethod
    def of(cls, config: Config, images: int | None, more: int = 0) -> Length:
        """The length of a run over `images` images (None: random ones). Raises ConfigError for fewer than a batch.

        more: steps that were done so far, less those that the batch size of today would have taken.
        """
        images = SYNTHETIC_IMAGES if images is None else images
        steps_per_epoch = images // config.batch_size
        if steps_per_epoch == 0:
            raise ConfigError(
                f"batch_size={config.batch_size} is more than the {images} images of {config.data.source}; "
                f"set batch_size to at most {images}"
            )
        steps = config.optim.epochs * steps_per_epoch + more
        return cls(steps_per_epoch, steps if config.optim.steps is None else min(steps, config.optim.steps))


def build_method(config: Config, steps_per_epoch: int = 1, foreign: bool = True) -> Method:
    """The method with its networks in fp32 on the CPU, initialised from `seed`.

    foreign: see method_class. Raises ConfigError for what does not go together.
    """
    cls = method_class(config.objective.method, foreign)
    check_capabilities(config.objective.method, config.engine, cls.capabilities)
    torch.manual_seed(config.seed)
    setup = Setup(
        config.model,
        config.data,
        config.mask,
        config.objective.options,
        steps_per_epoch,
        micro_batch=config.batch_size // config.engine.accumulation,
        foreign=foreign,
    )
    method = cls(setup)
    if not isinstance(getattr(method, "encoder", None), Encoder):
        raise ConfigError(
            f"objective.method={config.objective.method}: {cls.__name__}.encoder: expected an "
            f"ijepa_fast.models.vit.Encoder, which is what a run leaves"
        )
    return method


def make_ready(method: Method) -> None:
    """Load what training alone needs: what the method knows of, and encoders it wants. Raises ConfigError."""
    method.ready()
    for name, path in method.wanted.items():
        try:
            loaded = load(path)
        except ValueError as error:
            raise ConfigError(f"objective.options.{name}_from: {error}") from None
        method.give(name, loaded.encoder, loaded.mean, loaded.std)


def with_options(config: Config, method: Method) -> Config:
    """The same configuration with every option of the method, defaults included."""
    return replace(config, objective=replace(config.objective, options=asdict(method.options)))


def with_precision(config: Config, last: Path | None, device: torch.device, rank: int) -> tuple[Config, Precision]:
    """The same configuration with bf16 or fp32 for `auto`, the same on all ranks, and why. Rank 0 says so.

    last: the checkpoint that the run goes on from.
    """
    before = None if last is None else read_state(last)["config"].get("engine.precision")
    chosen: list[Any] = [choose_precision(config.engine.precision, device, before) if rank == 0 else None]
    torch.distributed.broadcast_object_list(chosen)
    precision: Precision = chosen[0]
    if rank == 0:
        print(f"engine.precision={precision.name}: {precision.reason}", file=sys.stderr)
    return replace(config, engine=replace(config.engine, precision=precision.name)), precision


def micro_batch(config: Config, ranks: int) -> int:
    """Images of a micro-batch of one of `ranks` ranks. Raises ConfigError where they do not divide the batch."""
    parts = config.engine.accumulation * ranks
    if config.batch_size % parts:
        raise ConfigError(
            f"batch_size={config.batch_size} is not divisible by {ranks} ranks x engine.accumulation="
            f"{config.engine.accumulation}; set batch_size to a multiple of {parts}"
        )
    return config.batch_size // parts


def build_engine(config: Config, method: Method, device: torch.device, ranks: int) -> Engine:
    """The method on DeepSpeed. Raises ConfigError where a compiler is wanted and there is none."""
    check_compiler(config.engine.compile, device)
    return Engine(method, config.engine, config.optim, micro_batch(config, ranks), device)


def build_draw(config: Config, method: Method, device: torch.device, rank: int, ranks: int) -> Callable[[int], Draw]:
    """The draw of this rank's micro-batch as a function of the micro-step alone, so that a resumed run draws the same.

    It follows from the places of the images in the step's batch, so that another number of ranks draws the same, too.
    It lies in host memory, pinned where `device` is a GPU.
    """
    images = micro_batch(config, ranks)

    def draw(micro_step: int) -> Draw:
        step, number = divmod(micro_step, config.engine.accumulation)
        first = (number * ranks + rank) * images
        drawn = method.draw(images, config.seed, step, first, config.batch_size)
        return drawn.pin_memory() if device.type == "cuda" else drawn

    return draw


def build_loader(
    config: Config,
    method: Method,
    source: Source | None,
    device: torch.device,
    rank: int,
    ranks: int,
    first: int = 0,
    *,
    draws: bool = True,
    beside: Callable[[Any, np.ndarray], object] | None = None,
) -> TrainLoader | SyntheticLoader:
    """The endless loader of this rank's micro-batches, from micro-step `first` on; Batch.draw is their draw.

    Draws are made ahead of the step, in the loader's threads. Without `source`, the images are random.
    draws: whether any are made. beside: see TrainLoader.
    """
    data, views = config.data, method.views()
    if views and data.memory == IN_PLACE:
        raise ConfigError(
            f"data.memory=device: objective.method={config.objective.method} sees several views of an image, which are "
            "made on the host; set data.memory=true"
        )
    if source is not None and data.where is not None and not views:
        scale, ratio = (data.scale[0], data.scale[1]), (data.ratio[0], data.ratio[1])
        more = (data.flip, method.setup.grid, data.crops_per_image)
        method.inside = Inside(source, config.seed, scale, ratio, *more)
    common: dict[str, Any] = {
        "batch_size": micro_batch(config, ranks),
        "seed": config.seed,
        "rank": rank,
        "world_size": ranks,
        "device": device,
        "start_step": first,
        "draw": build_draw(config, method, device, rank, ranks) if draws else None,
    }
    if source is None:
        sides: Any = [view.crop for view in views] if views else data.size
        depth = "uint8" if data.depth == "auto" else data.depth
        return SyntheticLoader(count=SYNTHETIC_IMAGES, crop=sides, channels=data.channels, depth=depth, **common)
    share = cores() // int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
    make = partial(ViewLoader, views=views) if views else partial(TrainLoader, crop=data.size)
    return make(
        source,
        scale=(data.scale[0], data.scale[1]),
        ratio=(data.ratio[0], data.ratio[1]),
        interpolation=data.interpolation,
        flip=data.flip,
        crops_per_image=data.crops_per_image,
        threads=data.threads or max(1, share),
        prefetch=data.prefetch,
        hw_decoder_load=data.hw_decoder_load,
        bad_files=config.folder / "bad_files.txt",
        max_bad_share=data.max_bad_share,
        max_pixels=data.max_pixels,
        memory=data.memory,
        beside=beside,
        **common,
    )
