"""What a method is made from, and what its options and the run's sections must agree on; without torch.

So that front.py says what is wrong before torch is imported, as partly.py reads it out of the method's file.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ijepa_fast.config import ConfigError, Data, Engine, Mask, Model, parse_options

CAPABILITIES = ("graphs", "fp8", "target_stream", "forecast")  # of methods, see methods/method.py

# SIGReg compares means of cosines over a batch with a Gaussian's; of N they are known to 1 / sqrt(2 N) at best.
LEAST_SAMPLES = {"sigreg": 8, "vicreg": 2}


@dataclass(frozen=True)
class Setup:
    """What a method is made from: sections of the run's configuration, and its own options as they were given."""

    model: Model
    data: Data
    mask: Mask = field(default_factory=Mask)
    options: Any = field(default_factory=dict)  # a mapping, or the method's Options
    steps_per_epoch: int = 1
    micro_batch: int | None = None  # images of a micro-batch over all ranks, where that is known
    foreign: bool = True  # whether masks of somebody else's module may be imported

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of patches of a crop."""
        height, width = self.data.size
        return (height // self.model.patch, width // self.model.patch)

    @property
    def values(self) -> int:
        """Numbers in a patch."""
        return self.data.channels * self.model.patch**2

    @property
    def encoder_sizes(self) -> dict[str, Any]:
        """Arguments of an Encoder."""
        model = self.model
        sizes: dict[str, Any] = {"patch": model.patch, "dim": model.dim, "depth": model.depth, "heads": model.heads}
        sizes |= {"image_size": self.data.size, "channels": self.data.channels, "recompute": model.recompute}
        return sizes | {"mlp_ratio": model.mlp_ratio}


@dataclass
class NoOptions:
    """Of a method without options of its own."""


def check_masked(masked: int, setup: Setup) -> None:
    """ConfigError unless `masked`, of objective.options, leaves some of the patches of a crop."""
    patches = setup.grid[0] * setup.grid[1]
    if masked >= patches:
        raise ConfigError(f"objective.options.masked={masked}: expected fewer than the {patches} patches of a crop")


def check_blocks(smallest: int, largest: int | None) -> None:
    """ConfigError unless a masked block can have between `smallest` and `largest` patches, of objective.options."""
    if largest is not None and largest < smallest:
        raise ConfigError(
            f"objective.options.largest: expected at least objective.options.smallest={smallest}, got {largest}"
        )


def check_method(
    name: str, setup: Setup, kind: type, reads_mask: bool, agree: Callable[[Any, Setup], object] | None = None
) -> Any:
    """The options of the method `name`, of the dataclass `kind`, checked. Raises ConfigError, naming the key.

    reads_mask: whether the section `mask` means something to it. agree: what options and sections must agree on.
    """
    if not reads_mask and setup.mask != Mask():
        raise ConfigError(f"mask: objective.method={name} draws its own masks; remove the section")
    options = parse_options(setup.options, kind)
    if agree is not None:
        agree(options, setup)
    return options


def check_capabilities(method: str, engine: Engine, capabilities: Collection[str]) -> None:
    """ConfigError where `engine` wants what the method, which has `capabilities`, cannot do."""
    wanted = {
        "graphs": ("engine.cuda_graphs=on", engine.cuda_graphs == "on"),
        "fp8": ("engine.target_precision=fp8", engine.target_precision == "fp8"),
        "target_stream": ("engine.target_stream=true", engine.target_stream),
    }
    for capability, (setting, on) in wanted.items():
        if on and capability not in capabilities:
            key = setting.partition("=")[0]
            raise ConfigError(f"{setting}: objective.method={method} cannot do it; leave {key} at its default")


def check_samples(batch: int | None, kind: str = "sigreg") -> None:
    """ConfigError for a micro-batch, over all ranks, too small for the regulariser; None: it is not known."""
    least = LEAST_SAMPLES.get(kind, 1)
    if batch is not None and batch < least:
        raise ConfigError(
            f"batch_size: {kind} takes statistics over a batch and wants at least {least} images of a micro-batch over "
            f"all ranks, got {batch}; raise batch_size or lower engine.accumulation"
        )


def teacher_faults(teacher: str, path: str | None, cache: str | None, crops: int) -> dict[str, bool]:
    """Messages, and whether each holds, of a choice of teacher: ema, frozen (from `path`) or random."""
    ema, frozen = teacher == "ema", teacher == "frozen"
    return {
        "teacher_from: expected the folder of a teacher with teacher=frozen, got null": frozen and path is None,
        f"teacher_from={path}: the teacher is {'the average' if ema else 'the encoder as it begins'}; set "
        f"teacher=frozen": path is not None and not frozen,
        f"teacher_cache={cache}: expected a folder for the targets alone, which is made": cache is not None
        and Path(cache).name in ("", ".."),
        f"teacher_cache={cache}: the average moves; set teacher=frozen or random": ema and cache is not None,
        f"teacher_cache={cache}: with data.crops_per_image=0 no crop of an image comes twice; set it to 1 or more, or "
        f"teacher_cache=null": cache is not None and not crops,
    }


def check_targets(options: Any, depth: int, crops: int = 0) -> None:
    """ConfigError for options of I-JEPA that exclude each other. depth: `model.depth`. crops: of an image.

    Blocks of a frozen teacher are counted when it is there.
    """
    o, pixels = options, options.target == "pixels"
    alone, idle = o.regulariser == "none", not o.visible_weight
    fresh, by_place = type(o)(), o.target_norm.startswith("position")
    wrong = {
        f"target_layers={o.target_layers}: expected at most model.depth={depth}": o.teacher != "frozen"
        and o.target_layers > depth,
        f"target_layers={o.target_layers}: there are no blocks behind target=pixels; set target=features": pixels
        and o.target_layers > 1,
        f"visible_weight={o.visible_weight}: the context sees these pixels; set target=features": pixels and not idle,
        f"teacher={o.teacher}: there is no teacher of target=pixels; set target=features": pixels
        and o.teacher != "ema",
        "regulariser=vicreg: it compares with target features; set target=features, or regulariser=sigreg": pixels
        and o.regulariser == "vicreg",
        f"visible_epochs={o.visible_epochs}: it leads to visible_weight, which is 0": o.visible_epochs and idle,
        "projector: it leads to a regulariser, and regulariser=none; set one, or projector=[]": o.projector and alone,
        f"regulariser_weight={o.regulariser_weight}: there is no regulariser; set one, or null": alone
        and o.regulariser_weight is not None,
        f"slices={o.slices}: they are the directions of regulariser=sigreg; set it": o.slices != fresh.slices
        and o.regulariser != "sigreg",
        f"target_momentum={o.target_momentum}: it is of target_norm=position; set it": not by_place
        and o.target_momentum != fresh.target_momentum,
    } | teacher_faults(o.teacher, o.teacher_from, o.teacher_cache, crops)
    for words, holds in wrong.items():
        if holds:
            raise ConfigError("objective.options." + words)
