"""From the configuration to the parts of a run."""

from __future__ import annotations

import os

import torch

from ijepa_fast.config import Config, ConfigError
from ijepa_fast.data.dali import TrainLoader
from ijepa_fast.data.sources import Source
from ijepa_fast.models.predictor import Predictor
from ijepa_fast.models.vit import Encoder
from ijepa_fast.objective import IJEPA
from ijepa_fast.schedules import Schedule


def plan(config: Config, images: int) -> tuple[Schedule, int]:
    """The schedules of a run over `images` images, and its number of steps."""
    steps_per_epoch = images // config.batch_size
    if steps_per_epoch == 0:
        raise ConfigError(
            f"batch_size={config.batch_size} is more than the {images} images of {config.data.source}; "
            f"set batch_size to at most {images}"
        )
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
    )
    total = optim.epochs * steps_per_epoch
    return schedule, total if optim.steps is None else min(total, optim.steps)


def build_objective(config: Config) -> IJEPA:
    """Encoder, predictor and target encoder in fp32 on the CPU, initialised from `seed`."""
    torch.manual_seed(config.seed)
    model, data = config.model, config.data
    encoder = Encoder(data.crop, model.patch, model.dim, model.depth, model.heads, model.mlp_ratio, model.recompute)
    predictor = Predictor(
        encoder.grid,
        model.dim,
        model.predictor_dim,
        model.predictor_depth,
        model.heads,
        out_dim=3 * model.patch**2 if config.objective.target == "pixels" else None,
        recompute=model.recompute,
    )
    return IJEPA(
        encoder,
        predictor,
        loss=config.objective.loss,
        target=config.objective.target,
        mean=data.mean,
        std=data.std,
    )


def build_loader(config: Config, source: Source, device: torch.device, rank: int, ranks: int, first: int):
    """The endless loader of this rank's micro-batches of `source`, from micro-step `first` on."""
    data = config.data
    return TrainLoader(
        source,
        batch_size=config.batch_size // (ranks * config.engine.accumulation),
        crop=data.crop,
        scale=tuple(data.scale),
        ratio=tuple(data.ratio),
        interpolation=data.interpolation,
        flip=data.flip,
        seed=config.seed,
        rank=rank,
        world_size=ranks,
        device=device,
        threads=data.threads or max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", ranks))),
        prefetch=data.prefetch,
        start_step=first,
    )
