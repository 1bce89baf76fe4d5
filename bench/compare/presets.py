"""How long a comparison's runs are, and what that makes of their configs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from bench.compare.runs import AVERAGE, PIXELS, STUDENTS, find, has_teacher
from ijepa_fast.config import Config, ConfigError, load_config
from ijepa_fast.data.resident import IN_PLACE
from ijepa_fast.front import check_method_early
from ijepa_fast.run.build import build_method


@dataclass(frozen=True)
class Preset:
    """steps and batch of a run, probes along it, images of each of a probe's sets, seeds, and what else is changed.

    rates: the best learning rate found for a run, where not its config's; a run without one has that of the run it is
    like.
    """

    steps: int
    batch: int
    probes: int
    images: int
    seeds: tuple[int, ...]
    overrides: tuple[str, ...] = ()
    rates: Mapping[str, float] = field(default_factory=dict)

    def rate(self, name: str) -> float | None:
        """The learning rate of a run; None: its config's."""
        while name not in self.rates and (run := find(name)) is not None and run.like:
            name = run.like
        return self.rates.get(name)


# An encoder small enough for I-JEPA, MAE and pixels to see four epochs each, with three seeds, in an hour on two cores.
SMALL = ("model.dim=128", "model.depth=4", "model.heads=4", "model.predictor_dim=64", "model.predictor_depth=2")
# 200 epochs of CIFAR-10, which lies in the GPU's memory, by ViT-T.
TINY = ("model.arch=vit_tiny", "model.dim=0", "model.depth=0", "model.heads=0", "model.predictor_depth=6")
IN_MEMORY = ("engine.precision=bf16", f"data.memory={IN_PLACE}")
RATES = {"ijepa": 5e-4, "mae": 2e-3, "pixels": 5e-4, "ibot": 2.5e-4, AVERAGE: 2e-3, PIXELS: 2e-3}
RATES |= dict.fromkeys(STUDENTS, 2e-3)
PRESETS = {
    "cpu": Preset(6000, 32, 8, 4000, (0, 1, 2), SMALL, RATES),
    "gpu": Preset(19_500, 512, 8, 10_000, (0, 1, 2), (*TINY, *IN_MEMORY)),
}


def overrides_of(preset: Preset, images: int) -> list[str]:
    """What makes the schedules of a config span `preset.steps` steps over `images` images, a tenth of it warm-up.

    What differs by run is in `method_overrides`.
    """
    epoch = images // preset.batch
    if epoch == 0:
        raise ConfigError(f"--batch: expected at most the {images} images of --data, got {preset.batch}")
    epochs = math.ceil(preset.steps / epoch)
    return [
        f"batch_size={preset.batch}",
        f"optim.steps={preset.steps}",
        f"optim.epochs={epochs}",
        f"optim.horizon={preset.steps / (epochs * epoch)}",
        f"optim.warmup_epochs={0.1 * preset.steps / epoch}",
        f"log.checkpoint_every={math.ceil(preset.steps / preset.probes)}",
        f"log.keep={preset.probes}",
        f"log.every={max(1, preset.steps // 50)}",
        "log.tensorboard=false",
        "probe.enabled=false",
        f"probe.images={preset.images}",
        *preset.overrides,
    ]


def at_rate(rate: float, config: Config) -> list[str]:
    """The learning rate `rate` for a run of `config`, whose warm-up is not to begin above it."""
    return [*([f"optim.start_lr={rate}"] if config.optim.start_lr > rate else []), f"optim.lr={rate}"]


def method_overrides(name: str, config: Config, preset: Preset, images: int) -> list[str]:
    """What differs by run: its learning rate, and what of its `config` is a share of the run."""
    epochs = preset.steps * preset.batch / images
    rate = preset.rate(name)
    found = [] if rate is None else at_rate(rate, config)
    method = build_method(config)
    if config.data.memory == IN_PLACE and method.views():  # which are made on the host
        found.append("data.memory=true")
    if not method.averaged:
        return found
    if config.optim.final_ema >= config.optim.ema:  # one that falls is part of a recipe
        # One in 150 of the first weights is left in the average at the end.
        ema = max(0.9, 1 - 5 / preset.steps)
        found += [f"optim.ema={ema}", f"optim.final_ema={ema}"]
    shares = {"temperature_epochs": 0.3 * epochs, "frozen_epochs": 0.05 * epochs}
    if not shares.keys() <= vars(method.options).keys():
        return found
    return [*found, *(f"objective.options.{key}={value}" for key, value in shares.items())]


def settings(name: str, preset: Preset, images: int, base: str, more: tuple[str, ...], extra: list[str]) -> list[str]:
    """Everything that is changed in the config `base` for the run `name` over `images` images.

    more: for the images that it sees, extra: what the command line says. A frozen teacher's place comes in between
    where the run is begun. Raises ConfigError for what cannot be.
    """
    run = find(name)
    assert run is not None
    given = [*overrides_of(preset, images), *run.changes, *more]
    unknown = ["objective.options.teacher_from=."] if has_teacher(name) else []
    known = [*given, *method_overrides(name, load_config(base, [*given, *unknown]), preset, images), *extra]
    check_method_early(load_config(base, [*known, *unknown]))
    return known
