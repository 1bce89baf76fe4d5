"""From the configuration to the parts of a run."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict

import torch

from ijepa_fast.config import Config, ConfigError
from ijepa_fast.data.dali import TrainLoader
from ijepa_fast.data.sources import Source
from ijepa_fast.data.synthetic import SyntheticLoader
from ijepa_fast.masks import make_sampler
from ijepa_fast.models.predictor import Predictor
from ijepa_fast.models.vit import Encoder
from ijepa_fast.objective import IJEPA
from ijepa_fast.packing import PackedBatch, pack
from ijepa_fast.schedules import Schedule

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


def build_masks(config: Config, device: torch.device, rank: int, ranks: int) -> Callable[[int], PackedBatch]:
    """The masks of this rank's micro-batch as a function of the micro-step alone, so that a resumed run draws the same.

    They are packed on the CPU, in pinned memory where `device` is a GPU.
    """
    options = asdict(config.mask)
    strategy, policy, budget = (options.pop(key) for key in ("strategy", "policy", "budget"))
    side = config.data.crop // config.model.patch
    sampler = make_sampler(strategy, (side, side), **options)
    batch = _micro_batch(config, ranks)

    def masks(step: int) -> PackedBatch:
        packed = pack(sampler(batch, config.seed, step, rank), policy, budget)
        return packed.pin_memory() if device.type == "cuda" else packed

    return masks


def build_loader(config: Config, source: Source | None, device: torch.device, rank: int, ranks: int, first: int = 0):
    """The endless loader of this rank's micro-batches, from micro-step `first` on; Batch.extra is their PackedBatch.

    Masks are made ahead of the step, in the loader's threads. Without `source`, the images are random.
    """
    data = config.data
    common = {
        "batch_size": _micro_batch(config, ranks),
        "crop": data.crop,
        "seed": config.seed,
        "rank": rank,
        "world_size": ranks,
        "device": device,
        "start_step": first,
        "extra": build_masks(config, device, rank, ranks),
    }
    if source is None:
        return SyntheticLoader(count=SYNTHETIC_IMAGES, **common)
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
    return TrainLoader(
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
