"""The configuration of a run: typed sections, one YAML a run, dotted overrides.

Every key is written once, here or in data/settings.py, with its type, default, meaning, what it may be, and whether a
run may be resumed with another value. An unknown key, a wrong type and a value out of its range are ConfigErrors that
name the key and what to change. What a method's own options may be is the method's to say (methods/).
"""

from __future__ import annotations

import copy
import math
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import Field, dataclass, field
from pathlib import Path
from typing import Any

from ijepa_fast import configs
from ijepa_fast.data import IMAGENET_MEAN, IMAGENET_STD, settings
from ijepa_fast.data.settings import GREY_MEAN, GREY_STD, LONGEST, Data
from ijepa_fast.given import (
    MISSING,
    RATIOS,
    RENAMED,
    RENAMED_METHODS,
    SHARES,
    SWITCH,
    UNREAD,
    ConfigError,
    check_keys,
    expanded,
    fixed,
    key,
    keys,
    read,
    wrong_type,
)

BELOW_ONE = 0.9999999

# Keys that may be `auto`, which the start of a run decides (run/auto.py), in the order in which it does.
AUTO = (
    "model.patch",
    "data.crop",
    "batch_size",
    "optim.epochs",
    "optim.warmup_epochs",
    "optim.lr",
    "optim.start_lr",
    "optim.ema",
)


RATES = {"optim.start_lr", "optim.lr", "optim.warmup_epochs"}  # keys that check_rates compares

# The strategies of masks/samplers.py, known here so that a wrong one is said before torch is imported.
STRATEGIES = ("multiblock-reference", "multiblock", "rasterized", "block", "random", "channels")
IMPLEMENTATIONS = ("auto", "triton", "reference")


# name: (width, depth, heads, MLP ratio), as published
ARCHITECTURES = {
    "vit_tiny": (192, 12, 3, 4.0),
    "vit_small": (384, 12, 6, 4.0),
    "vit_base": (768, 12, 12, 4.0),
    "vit_large": (1024, 24, 16, 4.0),
    "vit_huge": (1280, 32, 16, 4.0),
    "vit_giant": (1408, 40, 16, 48 / 11),
}


@dataclass
class Mask:
    """Of I-JEPA's masks. None: the strategy's default, the published value."""

    strategy: str = fixed("multiblock", "see masks/samplers.py; module:function: see masks/foreign.py")
    hidden_channels: float | None = fixed(
        None, "share of an image's channels that its contexts do not see, under strategy=channels", above=0, most=1
    )
    policy: str = fixed("full", "what is kept of the context", choices=("full", "truncate", "budget"))
    budget: int | None = fixed(None, "context patches per image under policy=budget", least=1)
    group: int | None = fixed(None, "images whose contexts a policy compares; None: all of a step", least=1)
    padding: bool = fixed(True, "pads token counts, by under 1 %, so that few sizes occur and memory is found again")
    targets: int | None = fixed(None, "target blocks per image", least=1, most=1000)
    target_scale: list[float] | None = fixed(None, "range of a target block's share of the image", **SHARES)
    target_aspect: list[float] | None = fixed(None, "range of a target block's height over its width", **RATIOS)
    contexts: int | None = fixed(None, "context blocks per image", least=1, most=1000)
    context_scale: list[float] | None = fixed(None, "range of a context block's share of the image", **SHARES)
    context_aspect: list[float] | None = fixed(None, "range of a context block's height over its width", **RATIOS)
    min_keep: int | None = fixed(None, "a context keeps more patches than this", least=0)


@dataclass
class Model:
    arch: str | None = fixed(None, "a published size: dim, depth, heads and mlp_ratio", choices=(None, *ARCHITECTURES))
    dim: int = fixed(0, "width of the encoder; 0, here and in the next three: as `arch` says", least=0, most=65536)
    depth: int = fixed(0, "blocks of the encoder", least=0, most=1000)
    heads: int = fixed(0, "attention heads", least=0, most=1024)
    mlp_ratio: float = fixed(
        0.0, "hidden width of a block's MLP over its width; 4 where there is no `arch`", least=0, most=64
    )
    patch: int = fixed(16, "side of a patch, pixels", least=1, most=1024)
    patch_std: float = fixed(0.02, "of the first patch embedding; small patches want more than .02", above=0, most=10)
    predictor_dim: int = fixed(384, "width of the predictor, of MAE's decoder", least=1, most=65536)
    predictor_depth: int = fixed(12, "blocks of the predictor, of MAE's decoder", least=1, most=1000)
    recompute: bool = key(False, "activation checkpointing by block")


@dataclass
class Objective:
    method: str = fixed("ijepa", "a method's name, or the import path of another (methods/method.py)")
    options: dict[str, Any] = fixed({}, "the method's own options; its file lists them")


@dataclass
class Optim:
    epochs: int = key(300, "passes over the images", least=1, most=10**6)
    steps: int | None = key(None, "ends the run early; the schedules still run over `epochs`", least=1, most=2**32 - 1)
    warmup_epochs: float = key(40, "of the learning rate", least=0, most=10**6)
    horizon: float = key(1.0, "stretches the schedules beyond the epochs trained", above=0, most=1000)
    start_lr: float = key(2e-4, "learning rate at the start of the warm-up", least=0, most=10)
    lr: float = key(1e-3, "learning rate at its end", least=0, most=10)
    final_lr: float = key(1e-6, "learning rate at the end of the run", least=0, most=10)
    drop_epochs: list[float] = key([], "epochs at which it falls to a tenth; none: it falls as a cosine", least=0)
    weight_decay: float = key(0.04, "at the start", least=0, most=100)
    final_weight_decay: float = key(0.4, "at the end of the run", least=0, most=100)
    weight_decay_shape: str = key("cosine", "cosine: published code; linear: paper", choices=("cosine", "linear"))
    betas: list[float] = key([0.9, 0.999], "AdamW's", least=0, most=BELOW_ONE, length=2)
    eps: float = key(1e-8, "AdamW's", above=0, most=1)
    ema: float = key(0.996, "momentum of the EMA at the start: the share of it that a step keeps", least=0, most=1)
    final_ema: float = key(1.0, "momentum of the EMA at the end of the run", least=0, most=1)
    ema_shape: str = key("linear", "linear: I-JEPA; cosine: DINO, iBOT", choices=("linear", "cosine"))
    clip: float = key(0.0, "largest norm of the gradient; 0: no clipping", least=0)
    clip_by: str = key("whole", "whose norm: of all together, or of each parameter", choices=("whole", "parameter"))


@dataclass
class Engine:
    device: str = key("auto", "where to train", choices=("auto", "cpu", "cuda"))
    precision: str = key(
        "auto", "of weights and activations (the optimiser's are fp32)", choices=("auto", "bf16", "fp32")
    )
    target_precision: str | None = key(None, "of the target encoder; None: as precision", choices=(None, "fp8"))
    zero: int = key(1, "ZeRO stage", choices=(0, 1, 2, 3))
    accumulation: int = key(1, "micro-batches of a step", least=1, most=10**6)
    bucket: int = key(
        50_000_000, "elements reduced and gathered at once; on a CPU at most 8 million", least=1, most=10**10
    )
    compile: bool | None = key(None, "torch.compile by block; None: on a GPU, below ZeRO 3")
    cuda_graphs: str = key("auto", "steps as CUDA graphs, one for every shape of batch", choices=("auto", "on", "off"))
    target_stream: bool = key(False, "the target encoder on a CUDA stream of its own, beside the context encoder")
    timeout: int = key(1800, "seconds after which a silent rank ends the run", least=1, most=10**7)


@dataclass
class Log:
    every: int = key(10, "steps between log lines; the only steps that wait for the device", least=1)
    checkpoint_every: int = key(500, "steps between checkpoints", least=1)
    checkpoint_minutes: float = key(10, "minutes between checkpoints, at most; 0: only by steps", least=0)
    keep: int = key(2, "newest checkpoints kept", least=1)
    keep_every: int = key(0, "checkpoints of a multiple of so many steps are kept for good; 0: none", least=0)
    tensorboard: bool = key(True, "whether to write TensorBoard events")
    wandb: str | None = key(None, "a W&B project to log to")
    loggers: list[str] = key([], "others, as module:function: called with (folder, name, settings)")


@dataclass
class Probe:
    enabled: bool = key(True, "probe the frozen encoder before and after training")
    train: str | None = key(None, "labelled images; None: the embedded data set's, or data.source", path=True)
    test: str | None = key(None, "labelled images; None: the embedded data set's, or a tenth of data.source", path=True)
    images: int = key(50_000, "at most, of each", least=1)
    resize: int | None = key(
        None, "shorter side before the central crop, pixels; None: data.crop", least=1, most=LONGEST
    )
    every: int = key(100, "steps between online probes, each at the next log line; 0: none", least=0)


@dataclass
class Config:
    name: str = key(MISSING, "the run's folder is runs/<name>")
    runs: str = key("runs", "the folder of all runs", path=True)
    seed: int = fixed(0, "of weights, order, crops and masks", least=0, most=2**63 - 1)
    batch_size: int = key(
        2048, "images of a step, over all ranks; may change where it divides the images seen", least=1, most=10**7
    )
    resume: Any = key(True, "go on with the run in runs/<name> where there is one; step-<number>: from that checkpoint")
    hooks: list[str] = key([], "module:function, called with (step, record, method) at log lines, on every rank")
    init: str | None = fixed(
        None, "weights a new run starts from: a run, a published .pth.tar, a Hugging Face folder", path=True
    )
    data: Data = field(default_factory=Data)
    mask: Mask = field(default_factory=Mask)
    model: Model = field(default_factory=Model)
    objective: Objective = field(default_factory=Objective)
    optim: Optim = field(default_factory=Optim)
    engine: Engine = field(default_factory=Engine)
    log: Log = field(default_factory=Log)
    probe: Probe = field(default_factory=Probe)
    kernels: Any = key("auto", "auto | triton | reference, for all ops or as a mapping op: implementation")
    auto: list[str] = key([], "keys that were given as auto, until the start of the run chooses their values")

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.runs) / self.name


FORMER_DEFAULTS = {"data.max_pixels": 178_956_970}  # fixed keys whose default was another: it refuses no resume


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The checked configuration in the YAML at `path`, a file or the name of a ready one, with `key.key=value`
    overrides. Raises ConfigError.
    """
    try:
        path = configs.find(path)
    except ValueError as error:
        raise ConfigError(f"--config: {error}") from None
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    given = {item.partition("=")[0]: item for item in overrides}  # the last one holds
    try:
        merged = read(path, overrides, Config)
        left = _left_open(merged)
        plain = OmegaConf.to_container(merged)
        try:
            typed: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), merged))
        except OmegaConfBaseException as error:
            raise wrong_type(str(getattr(error, "full_key", None)), plain, Config) from None
        config = resolve(typed)
        config.auto = list(dict.fromkeys([*config.auto, *left]))
        check(config)
    except ConfigError as error:
        name = re.split("[:=]", str(error))[0]
        in_file = ": expected" in str(error) and not name.startswith("override ")
        item = next((item for key, item in given.items() if key == name or key.startswith(f"{name}.")), None)
        where = f"override {item}" if item else str(path) if in_file else ""
        raise ConfigError(f"{error} ({where})" if where and where not in str(error) else str(error)) from None
    return config


def _left_open(given: Any) -> list[str]:
    """The keys of AUTO that are `auto`, which are taken out of what was given: their types have no such value."""
    from omegaconf import OmegaConf

    left = [name for name in AUTO if OmegaConf.select(given, name) == "auto"]
    for name in left:
        section, _, last = name.rpartition(".")
        (OmegaConf.select(given, section) if section else given).pop(last)
    return left


def select(config: Any, name: str) -> Any:
    """The value of the dotted key `name`."""
    for part in name.split("."):
        config = getattr(config, part)
    return config


def update(config: Config, name: str, value: Any) -> None:
    """Set the dotted key `name`."""
    section, _, last = name.rpartition(".")
    setattr(select(config, section) if section else config, last, value)


def save_config(config: Config, path: Path) -> None:
    """Write every key of `config`, defaults included, as YAML."""
    from omegaconf import OmegaConf

    OmegaConf.save(OmegaConf.structured(config), path)


def as_yaml(config: Config) -> str:
    """Every key of `config` as YAML, with what it means behind it."""
    import yaml

    lines, section = [], ""
    for name, f in keys(Config):
        *above, last = name.split(".")
        if above and above[0] != section:
            section = above[0]
            lines.append(f"{section}:")
        value = "auto" if name in config.auto else select(config, name)
        text = yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("\n...\n").strip()
        lines.append(f"{'  ' if above else ''}{last}: {text}".ljust(44) + f"  # {f.metadata['meaning']}")
    return "\n".join(lines) + "\n"


def flatten(config: Any) -> dict[str, Any]:
    """Every value of a configuration by its dotted key; the method's options are keys of their own."""
    flat: dict[str, Any] = {}
    for name, _ in keys(type(config)):
        value = select(config, name)
        if name == "objective.options":
            flat |= {f"{name}.{option}": chosen for option, chosen in value.items()}
        else:
            flat[name] = value
    return flat


def is_fixed(name: str) -> bool:
    """Whether a run resumed with another value of the key `name` would not be the run that was begun."""
    return name.startswith("objective.options.") or FIXED.get(name, False)


FIXED = {name: f.metadata["fixed"] for name, f in keys(Config)}


def present(flat: dict[str, Any]) -> dict[str, Any]:
    """A flattened configuration of an earlier version by today's keys and values."""
    flat = dict(flat)
    method = flat.get("objective.method")
    if method in RENAMED_METHODS:
        flat["objective.method"] = RENAMED_METHODS[method]
        for name in UNREAD:
            flat.pop(name, None)
    for option, value in (flat.pop("objective.options", None) or {}).items():
        flat[f"objective.options.{option}"] = value
    for name in flat:
        if name.startswith("objective.options."):  # whose paths were not expanded: no other value begins with a ~
            flat[name] = expanded(flat[name])
    flat = {name: value for name, value in flat.items() if FORMER_DEFAULTS.get(name) != value}
    if isinstance(graphs := flat.get("engine.cuda_graphs"), bool):
        flat["engine.cuda_graphs"] = SWITCH[graphs]
    return {RENAMED.get(name, name): value for name, value in flat.items()}


def resolve(config: Config) -> Config:
    """The same configuration with the sizes of `model.arch` filled in where the model's own are not set, and the home
    folder in its paths.
    """
    config = copy.deepcopy(config)
    model = config.model
    if model.arch in ARCHITECTURES:
        for name, value in zip(("dim", "depth", "heads", "mlp_ratio"), ARCHITECTURES[model.arch], strict=True):
            setattr(model, name, getattr(model, name) or value)
    model.mlp_ratio = model.mlp_ratio or 4.0
    data = config.data
    for name, f in keys(Config):
        if f.metadata["path"]:
            update(config, name, expanded(select(config, name)))
    if data.channels == 1 and data.mean == list(IMAGENET_MEAN) and data.std == list(IMAGENET_STD):
        data.mean, data.std = list(GREY_MEAN), list(GREY_STD)  # of photographs in grey
    return config


def check(config: Config) -> None:
    """Check what each key may be, and what keys must agree on. Raises ConfigError."""
    flat = flatten(config)
    for name, f in keys(Config):
        if name in flat:
            _check_value(name, f, flat[name])
    folder = Path(config.name)
    if folder.is_absolute() or ".." in folder.parts or not folder.parts:
        raise ConfigError(f"name={config.name!r}: expected the name of a folder inside {config.runs}; choose another")
    if not isinstance(config.kernels, dict) and config.kernels not in IMPLEMENTATIONS:
        raise ConfigError(
            f"kernels: expected one of {', '.join(IMPLEMENTATIONS)}, or a mapping such as {{layer_norm: reference}}, "
            f"got {config.kernels!r}"
        )
    if not isinstance(config.resume, bool) and not re.fullmatch(r"step-\d+", str(config.resume)):
        raise ConfigError(f"resume: expected true, false or step-<number>, got {config.resume!r}")
    if unknown := set(config.auto) - set(AUTO):
        raise ConfigError(f"auto: expected of {', '.join(AUTO)}, got {', '.join(sorted(unknown))}")
    _check_model(config.model)
    settings.check(config.data, 1 if {"data.crop", "model.patch"} & set(config.auto) else config.model.patch)
    if config.batch_size % config.engine.accumulation and "batch_size" not in config.auto:
        raise ConfigError(
            f"batch_size={config.batch_size} is not divisible by engine.accumulation={config.engine.accumulation}; "
            f"set batch_size to a multiple of it"
        )
    if config.mask.strategy not in STRATEGIES and ":" not in config.mask.strategy:
        names = ", ".join(STRATEGIES)
        raise ConfigError(f"mask.strategy: expected one of {names}, or module:function, got {config.mask.strategy!r}")
    if (config.mask.budget is None) != (config.mask.policy != "budget"):
        raise ConfigError(
            f"mask.budget={config.mask.budget} does not go with mask.policy={config.mask.policy}; "
            f"give a number with policy=budget, and none otherwise"
        )
    _check_engine(config.engine)
    if config.engine.target_precision == "fp8" and config.model.dim % 16:
        raise ConfigError(
            f"engine.target_precision=fp8 needs a model.dim that is a multiple of 16, got {config.model.dim}; "
            f"set engine.target_precision=null"
        )
    longer = config.optim.warmup_epochs > config.optim.epochs * config.optim.horizon
    if longer and not {"optim.warmup_epochs", "optim.epochs"} & set(config.auto):
        raise ConfigError(
            f"optim.warmup_epochs={config.optim.warmup_epochs} is longer than optim.epochs={config.optim.epochs}; "
            f"lower optim.warmup_epochs"
        )


def check_rates(config: Config) -> None:
    """ConfigError for a warm-up that descends. Of runs that train: one that has done so can still be read."""
    optim = config.optim
    if optim.start_lr > optim.lr and optim.warmup_epochs and not RATES & set(config.auto):
        raise ConfigError(
            f"optim.start_lr={optim.start_lr:g} is more than optim.lr={optim.lr:g}, which the warm-up rises to; set "
            f"optim.start_lr to at most optim.lr, or optim.warmup_epochs=0"
        )


def parse_options(given: Any, kind: type) -> Any:
    """`objective.options`, a mapping, as the dataclass `kind`, which has a method's own options. Raises ConfigError.

    One that is of `kind` already is returned as it is.
    """
    if isinstance(given, kind):
        return given
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    prefix = "objective.options."
    check_keys(given, kind, prefix)
    try:
        options = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), given))
    except OmegaConfBaseException as failed:
        error = wrong_type(str(failed.full_key), given, kind)
        raise ConfigError(f"{prefix}{error}") from None
    for name, f in keys(kind, prefix):
        if f.metadata.get("path"):
            setattr(options, f.name, expanded(getattr(options, f.name)))
        _check_value(name, f, getattr(options, f.name))
    return options


def _check_value(name: str, f: Field, value: Any) -> None:
    choices, length = f.metadata.get("choices"), f.metadata.get("length")
    if choices is not None and value not in choices:
        names = ", ".join("null" if choice is None else str(choice) for choice in choices)
        raise ConfigError(f"{name}: expected one of {names}, got {value!r}")
    if length is not None and value is not None and len(value) != length:
        raise ConfigError(f"{name}: expected {NUMBERS[length]} numbers, got {value}")
    for number in value if isinstance(value, list | tuple) else [value]:
        if isinstance(number, float) and not math.isfinite(number):
            raise ConfigError(f"{name}: expected finite numbers, got {value}")
        for limit, words, holds in LIMITS:
            bound = f.metadata.get(limit)
            if bound is not None and number is not None and not holds(number, bound):
                raise ConfigError(f"{name}: expected {words} {bound:.10g}, got {value}")


NUMBERS = {2: "two", 3: "three"}
LIMITS: tuple[tuple[str, str, Callable[[float, float], bool]], ...] = (
    ("least", "at least", operator.ge),
    ("above", "more than", operator.gt),
    ("most", "at most", operator.le),
)


def _check_engine(engine: Engine) -> None:
    if engine.compile and engine.zero == 3:
        raise ConfigError(
            "engine.compile=true: ZeRO 3 gathers weights in hooks that a compiled block cannot hold; "
            "set engine.compile=false or engine.zero to at most 2"
        )
    if engine.target_stream and engine.device == "cpu":
        raise ConfigError("engine.target_stream=true: there are no streams with engine.device=cpu; set it to false")


def _check_model(model: Model) -> None:
    for name in ("dim", "depth", "heads"):
        if not getattr(model, name):
            raise ConfigError(f"model.{name} is not set; set it, or model.arch to one of {', '.join(ARCHITECTURES)}")
    check_width("dim", model)


def check_width(name: str, model: Model) -> None:
    """ConfigError unless `model.<name>` is a width that fixed positions and the attention heads divide."""
    width = getattr(model, name)
    if width % model.heads or width % 4:
        raise ConfigError(
            f"model.{name}={width} must be divisible by 4 and by model.heads={model.heads}; "
            f"change model.{name} or model.heads"
        )
