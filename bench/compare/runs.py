"""What bench/learning.py compares: runs by name, and groups of them that answer a question.

A name is a method's, an ablation's, or options of I-JEPA's joined by a plus (xavier+deep); behind an @ it may say on
what images: mae@noise32 sees images with a random texture, ijepa@share64 one image in 64.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from ijepa_fast.methods.method import METHODS


@dataclass(frozen=True)
class Run:
    """A config of configs/, and what is changed in it.

    like: the run whose learning rate it has, unless its own is known. searched: whether a search finds it one of its
    own; what changes one thing of a run keeps that run's. images: "", noise<sigma> or share<n>, see compare/images.py.
    """

    config: str
    changes: tuple[str, ...] = ()
    like: str = ""
    searched: bool = True
    images: str = ""


@dataclass(frozen=True)
class Sweep:
    """Runs along an axis: for each line of its plot, the runs by their places, numbers or words."""

    axis: str
    lines: dict[str, dict[float | str, str]]
    logarithmic: bool = False

    @property
    def runs(self) -> tuple[str, ...]:
        """All of them, each once."""
        return tuple(dict.fromkeys(run for places in self.lines.values() for run in places.values()))


MASKS = ("multiblock", "rasterized", "block", "random")
_ANY_MASK = ("mask.policy=full", "mask.min_keep=null")  # as some strategies leave little context
BASE = "published_cifar10"  # the config of I-JEPA's runs, which options change
RUNS = {"ijepa": Run(BASE)}
# Every other method by its own config, with patches of the size that the others have.
PATCH = ("model.patch=4",)
RUNS |= {name: Run(f"{name}_cifar10", PATCH) for name in METHODS if name not in RUNS}

# One thing of I-JEPA changed, as in the paper's tables, by its learning rate.
_SCALES = ((0.075, 0.2), (0.1, 0.2), (0.125, 0.2), (0.15, 0.2), (0.2, 0.25), (0.2, 0.3))
_BLOCKS = ("mask.strategy=multiblock", *_ANY_MASK)
ABLATIONS: dict[str, tuple[str, ...]] = {name: (f"mask.strategy={name}", *_ANY_MASK) for name in MASKS}
ABLATIONS |= {f"targets{n}": (*_BLOCKS, f"mask.targets={n}") for n in (1, 2, 3)}
ABLATIONS |= {f"scale{a}-{b}": (*_BLOCKS, f"mask.target_scale=[{a},{b}]") for a, b in _SCALES if a != 0.15}
ABLATIONS |= {f"predictor-depth{n}": (f"model.predictor_depth={n}",) for n in (1, 2, 4, 8)}
ABLATIONS |= {f"predictor-width{n}": (f"model.predictor_dim={n}",) for n in (48, 96, 192, 384)}
SIZES = {"64x3": (64, 3, 2), "128x4": (128, 4, 4), "192x6": (192, 6, 3), "256x8": (256, 8, 4)}  # width, depth, heads
RUNS |= {
    name: Run(BASE, (f"model.dim={dim}", f"model.depth={depth}", f"model.heads={heads}"), "ijepa")
    for name, (dim, depth, heads) in SIZES.items()
}

# Options of I-JEPA's that are not published, each a change of its run; several with a plus.
OPTIONS = {
    "xavier": ["objective.options.init=xavier"],
    "flip": ["data.flip=true"],
    "crop": ["data.scale=[0.2,1.0]", "data.interpolation=bicubic"],  # with flip, what MAE sees
    "position": ["objective.options.target_norm=position"],
    "position_token": ["objective.options.target_norm=position_token"],
    "batch": ["objective.options.target_norm=batch"],
    "unnormalised": ["objective.options.target_norm=none"],
    "deep": ["objective.options.target_layers=3"],
    "all-blocks": ["objective.options.target_layers=0"],
    "falling-average": ["optim.ema=0.9995", "optim.final_ema=0.99"],  # slow at first, so that targets keep their rank
    "sets2": ["objective.options.mask_sets=2"],
    "sets4": ["objective.options.mask_sets=4"],
    "salt": ["objective.options.teacher=frozen"],  # the teacher is the run mae of the same seed
    "random-teacher": ["objective.options.teacher=random"],
    "small-blocks": [*_BLOCKS, "mask.targets=6", "mask.target_scale=[0.05,0.1]", "mask.context_scale=[0.3,0.5]"],
    "random-masks": ["mask.strategy=random", "mask.target_scale=[0.75,0.75]", *_ANY_MASK],  # MAE's
    "mae-optimiser": ["optim.betas=[0.9,0.95]", "optim.weight_decay=0.05", "optim.final_weight_decay=0.05"],
    "visible": ["objective.options.visible_weight=0.5"],
}
for _kind, _weights in (("vicreg", (1e-4, 1e-3, 1e-2)), ("sigreg", (2e-4, 2e-3, 2e-2))):
    OPTIONS |= {
        f"{_kind}{weight:g}": [
            f"objective.options.regulariser={_kind}",
            f"objective.options.regulariser_weight={weight}",
        ]
        for weight in _weights
    }
# All that a name may join by a plus.
CHANGES = {
    **ABLATIONS,
    **OPTIONS,
    "pixels": ["objective.options.target=pixels", "objective.options.loss=l2"],
    "projector": ["objective.options.projector=[512,128]"],  # of a regulariser
}
TEACHER = "mae"  # the run that is the frozen teacher of those with salt
ALIKE = "xavier+flip+crop"  # I-JEPA with MAE's initialisation and augmentation
FRAME = f"{ALIKE}+random-masks+mae-optimiser"  # and with MAE's kind of masks and optimiser: all but what is predicted
STUDENT = f"salt+{FRAME}"
AVERAGE = f"{FRAME}+all-blocks+falling-average"  # the best found without a teacher
PIXELS = f"{FRAME}+pixels"  # the same with pixels as targets
# By name on a plot: I-JEPA's run with each of the paper's mask strategies and with MAE's, and so the student's.
_MASKS = {name: name for name in MASKS} | {"random\n75 %": "random-masks"}
_STUDENT_MASKS = {
    shown: STUDENT if name == "random-masks" else f"salt+{ALIKE}+mae-optimiser+{name}" for shown, name in _MASKS.items()
}
STUDENTS = tuple(_STUDENT_MASKS.values())


def has_teacher(name: str) -> bool:
    """Whether the run has a frozen teacher."""
    return "salt" in name.partition("@")[0].split("+")


_SIGMAS, _SHARES = (16, 32, 64), (64, 16, 4)


def _on(name: str, kind: str, values: tuple[int, ...]) -> dict[float | str, str]:
    return {value: f"{name}@{kind}{value}" for value in values}


SWEEPS = {
    "masks": Sweep("mask strategy", {"I-JEPA": _MASKS, "MAE's frozen encoder as teacher": _STUDENT_MASKS}),
    "scale": Sweep(
        "share of the image of a target block",
        {"I-JEPA": {f"{a}-{b}": "multiblock" if a == 0.15 else f"scale{a}-{b}" for a, b in _SCALES}},
    ),
    "targets": Sweep("target blocks", {"I-JEPA": {1: "targets1", 2: "targets2", 3: "targets3", 4: "multiblock"}}),
    "space": Sweep("what is predicted", {"I-JEPA": {"features": "ijepa", "pixels": "pixels"}}),
    "predictor-depth": Sweep("blocks of the predictor", {"I-JEPA": {n: f"predictor-depth{n}" for n in (1, 2, 4, 8)}}),
    "predictor-width": Sweep(
        "width of the predictor", {"I-JEPA": {n: f"predictor-width{n}" for n in (48, 96, 192, 384)}}
    ),
    "data": Sweep(
        "share of the images",
        {name: {1 / n: f"{name}@share{n}" for n in _SHARES} | {1.0: name} for name in ("ijepa", "mae")},
        logarithmic=True,
    ),
    "sizes": Sweep("width x depth of the encoder", {"I-JEPA": {name: name for name in SIZES}}),
    "tasks": Sweep("method", {"": {name: name for name in ("ijepa", "mae", "dino", "ibot")}}),
    "noise": Sweep(
        "nuisance: standard deviation of the texture, of 255",
        {
            line: {0: name} | _on(name, "noise", _SIGMAS)
            for line, name in (("I-JEPA", AVERAGE), ("the same on pixels", PIXELS), ("MAE", "mae"))
        },
    ),
}
GROUPS: dict[str, tuple[str, ...]] = {
    "options": (TEACHER, "ijepa", *OPTIONS, "vicreg0.001+projector", "sigreg0.02+projector", AVERAGE, STUDENT),
    "methods": (TEACHER, "ijepa", "pixels", AVERAGE, STUDENT),
    "fair": (
        TEACHER,
        "ijepa",
        ALIKE,
        "salt",
        f"salt+{ALIKE}",
        AVERAGE,
        STUDENT,
        "pixels",
        "data2vec",
        "dino",
        "ibot",
        "lejepa",
    ),
    "all": tuple(METHODS),
}
for _name, _sweep in SWEEPS.items():
    GROUPS[_name] = ((TEACHER,) if any(map(has_teacher, _sweep.runs)) else ()) + _sweep.runs
NAMES = (*RUNS, *CHANGES, *GROUPS)
_IMAGES = re.compile(r"(noise|share)[1-9]\d*")


def find(name: str) -> Run | None:
    """The run `name`; None where there is none."""
    base, at, images = name.partition("@")
    if at and not _IMAGES.fullmatch(images):
        return None
    run, parts = RUNS.get(base), base.split("+")
    if run is None:
        if not set(parts) <= CHANGES.keys():
            return None
        changes = tuple(change for part in parts for change in CHANGES[part])
        run = Run(BASE, changes, "ijepa", searched=not set(parts) <= ABLATIONS.keys())
    return replace(run, like=base, searched=False, images=images) if at else run
