"""Keys that a configuration leaves at `auto`: chosen when a run starts, from its images and the machine.

configs/photos.yaml leaves them so. Each rule is a function here; docs/photos.md has them as a table, and says what of
them is measured. A key that is given is kept, and the rules behind it follow from it.
"""

from __future__ import annotations

import copy
import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ijepa_fast.config import AUTO, Config, ConfigError, check, check_rates, flatten, select, update
from ijepa_fast.data.headers import BadImage
from ijepa_fast.data.sources import Source
from ijepa_fast.interop.weights import checkpoints, step_of
from ijepa_fast.run.build import SYNTHETIC_IMAGES
from ijepa_fast.run.checkpoint import CheckpointError, check_data, read_state
from ijepa_fast.run.sources import identity

PUBLISHED_RATE, PUBLISHED_BATCH = 1e-3, 2048
LARGEST_CROP = {True: 224, False: 128}  # pixels, with and without a GPU
PATCHES, LEAST_GRID = (16, 8, 4, 2, 1), 8  # patches a side of the crop, at least
LEAST_BATCH, LARGEST_BATCH = 32, {True: 512, False: 64}
EPOCH_STEPS = 100  # steps of an epoch, at least, before the batch grows
EPOCHS, LEAST_STEPS = 300, 6000  # as published; and the length that other rules were tried at, docs/photos.md
CPU_IMAGES = 1_000_000  # that a run without a GPU sees, at most
WARMUP, WARMUP_STEPS, LONGEST_WARMUP = 0.1, 600, 0.4  # share of the run; steps, at least; share, at most
EMA, LEAST_EMA, LIVES = 0.998, 0.9, 5  # momentum at most and at least; how often a run forgets its first average
OF_LENGTH = ("optim.epochs", "optim.warmup_epochs", "optim.ema")  # keys whose rules read the steps of the run
AVERAGE = "optim.ema"  # means nothing to a method without an average
LOOKED_AT = 64  # images whose sizes are read


@dataclass(frozen=True)
class Facts:
    """What the rules see. images: of the run. side: their shorter side, pixels, the median of some. gpu: whether the
    run is on one. parts: ranks times micro-batches, which divide the batch.
    """

    images: int
    side: int = 224
    gpu: bool = True
    parts: int = 1


def filled(config: Config, facts: Facts, before: dict[str, Any] | None = None) -> tuple[Config, dict[str, str]]:
    """The configuration with a value for each key that is left at `auto`, checked; and the reason for each.

    before: {key: value} of the run's last checkpoint, whose choices are kept; but for OF_LENGTH where optim.steps is
    another now. Raises ConfigError for values that do not go with those that were given.
    """
    config = copy.deepcopy(config)
    reasons = {}
    if "batch_size" in config.auto and facts.parts > facts.images:
        raise ConfigError(
            f"{facts.images} image{'s' * (facts.images > 1)} cannot be shared by {facts.parts} parts (ranks x "
            f"engine.accumulation); use at most {facts.images}"
        )
    kept = dict(before or {})
    if kept.get("optim.steps") != config.optim.steps:
        kept = {name: value for name, value in kept.items() if name not in OF_LENGTH}
    for name in AUTO:  # in an order in which each rule finds what it needs
        if name not in config.auto:
            continue
        if name in kept:
            value, reason = kept[name], "as the run began"
        else:
            value, reason = RULES[name](config, facts)
        update(config, name, value)
        config.auto.remove(name)
        reasons[name] = reason
    if reasons:
        check(config)
    check_rates(config)
    return config, reasons


def said(config: Config, reasons: dict[str, str]) -> str:
    """A line for each key that was chosen: its value, and why."""
    return "\n".join(f"{name}={_shown(select(config, name))}: {reason}" for name, reason in reasons.items())


def begin(config: Config, source: Source | None, gpu: bool, rank: int, ranks: int) -> tuple[Config, str]:
    """`filled` for a run that starts, or goes on, here. Rank 0 says what was chosen.

    But for the line of the average, which is returned: whether there is one, the method knows when it is built.
    source: its images, None: random ones. Where it has a checkpoint, what it chose is kept. Raises CheckpointError
    where that is of other images.
    """
    if not config.auto:
        check_rates(config)
        return config, ""
    config, reasons = filled(config, facts_of(config, source, gpu, ranks), _begun(config, source))
    average = {AVERAGE: reasons.pop(AVERAGE)} if AVERAGE in reasons else {}
    if rank == 0 and reasons:
        print(said(config, reasons), file=sys.stderr)
    return config, said(config, average)


def facts_of(config: Config, source: Source | None, gpu: bool, ranks: int) -> Facts:
    """What the rules see of a run over `source`; None: images that are not here, or random ones."""
    parts = ranks * config.engine.accumulation
    if source is None:
        return Facts(SYNTHETIC_IMAGES, gpu=gpu, parts=parts)
    return Facts(len(source), shorter_side(source) if config.auto else Facts.side, gpu, parts)


def shorter_side(source: Source) -> int:
    """The median of the shorter sides of at most LOOKED_AT images, pixels; those that cannot be opened are left out."""
    sides = []
    for row in np.unique(np.linspace(0, len(source) - 1, LOOKED_AT).astype(int)).tolist():
        try:
            image = source.opened(row)
        except (BadImage, OSError):
            continue
        sides.append(min(image.height, image.width))
    return int(statistics.median(sides)) if sides else Facts.side


def _begun(config: Config, source: Source | None) -> dict[str, Any] | None:
    """{key: value} of the checkpoint that the run goes on from; None where there is none, or it is to be a new run."""
    if config.resume is False:  # a run that is there is refused, by run.recover.choose
        return None
    found = reversed(checkpoints(config.folder))
    wanted = None if config.resume is True else int(config.resume.removeprefix("step-"))
    for path in (path for path in found if wanted in (None, step_of(path))):
        try:
            state = read_state(path)
        except CheckpointError:  # said when the run goes on from another
            continue
        settings: dict[str, Any] = state["config"]
        if (settings.get("data.source") == "synthetic") != (source is None):  # refused when the checkpoint is loaded
            return None
        check_data(path, state.get("data"), identity(source), flatten(config))
        return settings
    return None


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace(" ", "")


Rule = Callable[[Config, Facts], tuple[Any, str]]


def _where(facts: Facts) -> str:
    return "on a GPU" if facts.gpu else "on a CPU"


def _patch(config: Config, facts: Facts) -> tuple[int, str]:
    given = "data.crop" not in config.auto
    sides = config.data.size if given else (min(LARGEST_CROP[facts.gpu], facts.side),)
    roomy = [patch for patch in PATCHES if min(sides) // patch >= LEAST_GRID]
    names = ", ".join(map(str, PATCHES))
    if not roomy:
        return PATCHES[-1], f"the smallest of {names}: {min(sides)} pixels have no {LEAST_GRID} of any"
    if not given:
        return roomy[0], f"the largest of {names} with {LEAST_GRID} in {min(sides)} pixels"
    patch = next(patch for patch in roomy if not any(side % patch for side in sides))
    reason = f"the largest of {names} that divides data.crop={_shown(config.data.crop)} and has {LEAST_GRID} a side"
    reason += f": {math.prod(side // patch for side in sides)} patches"
    if patch < roomy[0]:
        other = [side // roomy[0] * roomy[0] for side in sides]
        count = math.prod(side // roomy[0] for side in sides)
        crop = other[0] if isinstance(config.data.crop, int) else other
        reason += f"; {count} of {roomy[0]} pixels with data.crop={_shown(crop)}"
    return patch, reason


def _crop(config: Config, facts: Facts) -> tuple[int, str]:
    most, patch = LARGEST_CROP[facts.gpu], config.model.patch
    side = min(most, facts.side)
    reason = f"the images' shorter side is {side}" if facts.side < most else f"at most {most} {_where(facts)}"
    if side < patch:
        return patch, f"one patch of {patch}, though {reason}"
    whole = side // patch * patch
    return whole, reason if whole == side else f"{reason}, down to whole patches of {patch}"


def _batch(config: Config, facts: Facts) -> tuple[int, str]:
    images, most, parts = facts.images, LARGEST_BATCH[facts.gpu], facts.parts
    share = 2 ** int(math.log2(max(1, images // EPOCH_STEPS)))
    if images < LEAST_BATCH:
        wanted, reason = images, "all of them"
    elif share < LEAST_BATCH:
        wanted, reason = LEAST_BATCH, "the least, as a hundredth of them is fewer"
    elif share > most:
        wanted, reason = most, f"the most {_where(facts)}"
    else:
        wanted, reason = share, "the largest power of two in a hundredth of them"
    whole = max(1, wanted // parts) * parts
    if whole < wanted:
        reason = f"{wanted}, {reason}, down to a multiple of {parts} parts"
    elif whole > wanted:
        reason = f"one for each of {parts} parts"
    return whole, f"{images} images: {reason}"


def _epochs(config: Config, facts: Facts) -> tuple[int, str]:
    per_epoch, images = _per_epoch(config, facts), facts.images
    if config.optim.steps is not None:
        return math.ceil(config.optim.steps / per_epoch), f"for optim.steps={config.optim.steps}, {per_epoch} an epoch"
    wanted, reason = EPOCHS, "as published"
    if EPOCHS * per_epoch < LEAST_STEPS:
        wanted, reason = math.ceil(LEAST_STEPS / per_epoch), f"for {LEAST_STEPS} steps of {per_epoch} an epoch"
    if facts.gpu or wanted * images <= CPU_IMAGES:
        return wanted, reason
    if images >= CPU_IMAGES:
        return 1, f"the least: on a CPU no more than {CPU_IMAGES} images are to be seen, and {images} are here"
    return CPU_IMAGES // images, f"on a CPU no more than {CPU_IMAGES} images are to be seen"


def _warmup(config: Config, facts: Facts) -> tuple[float, str]:
    steps = _steps(config, facts)
    share = min(LONGEST_WARMUP, max(WARMUP, WARMUP_STEPS / steps))
    reason = f"{share:.0%} of {steps} steps"
    if share == LONGEST_WARMUP:
        reason += f", the most: {WARMUP_STEPS} are more"
    elif share > WARMUP:
        reason += f", which are {WARMUP_STEPS}, the least"
    return share * steps / _per_epoch(config, facts), reason


def _rate(config: Config, facts: Facts) -> tuple[float, str]:
    rate = PUBLISHED_RATE * math.sqrt(config.batch_size / PUBLISHED_BATCH)
    return rate, f"the published {PUBLISHED_RATE} of {PUBLISHED_BATCH} images, by the square root of the batch"


def _start_rate(config: Config, facts: Facts) -> tuple[float, str]:
    return config.optim.lr / 5, "a fifth of optim.lr, as published"


def _ema(config: Config, facts: Facts) -> tuple[float, str]:
    steps, optim = _steps(config, facts), config.optim
    wanted = 1 - LIVES / steps
    if wanted > EMA:
        value, reason = EMA, f"the most: 1 - {LIVES} / {steps} steps are more"
    elif wanted < LEAST_EMA:
        value, reason = LEAST_EMA, f"the least: 1 - {LIVES} / {steps} steps are less"
    else:
        value, reason = wanted, f"1 - {LIVES} / {steps} steps"
    if optim.final_ema == value:
        return value, f"{reason}; it stays"
    way = "rises" if optim.final_ema > value else "falls"
    whole = steps >= optim.horizon * optim.epochs * _per_epoch(config, facts)
    return value, f"{reason}; it {way} {'to' if whole else 'towards'} {optim.final_ema:g}"


def _per_epoch(config: Config, facts: Facts) -> int:
    return max(1, facts.images // config.batch_size)


def _steps(config: Config, facts: Facts) -> int:
    """Steps of the run, as run.build.Length counts them."""
    steps = config.optim.epochs * _per_epoch(config, facts)
    return steps if config.optim.steps is None else min(steps, config.optim.steps)


RULES: dict[str, Rule] = {
    "model.patch": _patch,
    "data.crop": _crop,
    "batch_size": _batch,
    "optim.epochs": _epochs,
    "optim.warmup_epochs": _warmup,
    "optim.lr": _rate,
    "optim.start_lr": _start_rate,
    "optim.ema": _ema,
}
