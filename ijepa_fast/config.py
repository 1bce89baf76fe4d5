"""The configuration of a run: typed sections, one YAML a run, dotted overrides.

Every key is written here once, with its type, default and meaning. An unknown key, a wrong type and a combination that
cannot work are ConfigErrors that name the key and what to change.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ijepa_fast import configs
from ijepa_fast.data import IMAGENET_MEAN, IMAGENET_STD


class ConfigError(ValueError):
    """A configuration that cannot run; the message names the key and what to change."""


@dataclass
class Data:
    # A folder, tar files, a text list of paths; "scenes", the embedded data set; "synthetic", random images.
    source: str = MISSING
    crop: int = 224  # side of the square crop, pixels
    scale: list[float] = field(default_factory=lambda: [0.3, 1.0])  # share of the image's area
    ratio: list[float] = field(default_factory=lambda: [3 / 4, 4 / 3])  # width over height
    interpolation: str = "bilinear"  # bilinear | bicubic
    flip: bool = False
    mean: list[float] = field(default_factory=lambda: list(IMAGENET_MEAN))  # in units of 0..1
    std: list[float] = field(default_factory=lambda: list(IMAGENET_STD))
    threads: int = 0  # decoding threads a rank; 0: the rank's share of the cores
    prefetch: int = 2  # batches decoded ahead
    cache: str = "~/.cache/ijepa_fast"  # where the embedded data set is written
    scenes: int = 4000  # images of the embedded data set
    scenes_size: int = 64  # their side, pixels
    hw_decoder_load: float = 0.65  # share of the JPEGs for the GPU's decode engine
    max_bad_share: float = 0.01  # unreadable files beyond this share end the run
    max_pixels: int = 178_956_970  # a file that declares more counts as unreadable (decompression bombs)


@dataclass
class Mask:
    strategy: str = "multiblock"  # multiblock | multiblock-reference | rasterized | block | random
    policy: str = "full"  # full | truncate | budget: what is kept of the context
    budget: int | None = None  # context patches an image under policy=budget
    ladder: bool = True  # token counts rounded up, under 1 %, so that few sizes occur and memory is found again
    targets: int | None = None  # None: the strategy's default, the published value
    target_scale: list[float] | None = None
    target_aspect: list[float] | None = None
    contexts: int | None = None
    context_scale: list[float] | None = None
    context_aspect: list[float] | None = None
    min_keep: int | None = None


@dataclass
class Model:
    arch: str | None = None  # vit_tiny ... vit_giant: sets dim, depth, heads, mlp_ratio
    dim: int | None = None
    depth: int | None = None
    heads: int | None = None
    mlp_ratio: float | None = None
    patch: int = 16
    patch_std: float = 0.02  # of the patch embedding's weights at the start; small patches want more than the published
    predictor_dim: int = 384
    predictor_depth: int = 12
    recompute: bool = False  # activation checkpointing by block


@dataclass
class Objective:
    method: str = "ijepa"  # or the module of another, such as ijepa_fast.methods.mae; see build.method_of
    options: dict[str, Any] = field(default_factory=dict)  # the other method's own settings; its module lists them
    loss: str = "l2"  # l2 (paper) | smooth_l1 (published code)
    target: str = "features"  # features | pixels


@dataclass
class Optim:
    epochs: int = 300
    steps: int | None = None  # ends the run early; the schedules still run over `epochs`
    warmup_epochs: float = 40
    horizon: float = 1.0  # stretches the schedules beyond the epochs trained
    start_lr: float = 2e-4
    lr: float = 1e-3
    final_lr: float = 1e-6
    weight_decay: float = 0.04
    final_weight_decay: float = 0.4
    weight_decay_shape: str = "cosine"  # cosine (published code) | linear (paper)
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float = 1e-8
    momentum: float = 0.996  # of the EMA, rising to final_momentum
    final_momentum: float = 1.0
    momentum_shape: str = "linear"  # linear | cosine (DINO, iBOT)
    clip: float = 0.0  # largest global gradient norm; 0: no clipping


@dataclass
class Engine:
    device: str = "auto"  # auto | cpu | cuda
    precision: str = "bf16"  # bf16 | fp32
    target_precision: str | None = None  # of the target encoder: fp8, or None, as `precision`
    zero: int = 1  # ZeRO stage, 0 to 3
    accumulation: int = 1  # micro-batches a step
    bucket: int = 50_000_000  # elements reduced and gathered at once; on a CPU at most 8 million
    compile: bool | None = None  # torch.compile by block; None: on a GPU, below ZeRO 3
    cuda_graphs: bool = False  # forward and backward as CUDA graphs, one for every shape of batch (graphs.py)
    target_stream: bool = False  # target encoder on a CUDA stream of its own, beside the context encoder
    timeout: int = 1800  # seconds after which a silent rank ends the run


@dataclass
class Log:
    every: int = 10  # steps between log lines; the only steps that wait for the device
    checkpoint_every: int = 500  # steps
    keep: int = 2  # checkpoints kept
    tensorboard: bool = True
    wandb: str | None = None  # a W&B project


@dataclass
class Probe:
    enabled: bool = True  # probe the frozen encoder before and after training
    train: str | None = None  # labelled images; None: the embedded data set's, or data.source
    test: str | None = None  # None: the embedded data set's held-out part
    images: int = 50_000  # at most, of each
    resize: int | None = None  # shorter side before the central crop, pixels; None: data.crop
    every: int = 100  # steps between online probes, each at the next log line; 0: none


@dataclass
class Config:
    name: str = MISSING  # the run's folder is runs/<name>
    runs: str = "runs"
    seed: int = 0
    batch_size: int = 2048  # images a step, over all ranks
    resume: bool = True  # continue the run in runs/<name> where there is one
    # Weights a new run starts from, with a fresh optimiser: a run, a published .pth.tar, a Hugging Face folder.
    init: str | None = None
    data: Data = field(default_factory=Data)
    mask: Mask = field(default_factory=Mask)
    model: Model = field(default_factory=Model)
    objective: Objective = field(default_factory=Objective)
    optim: Optim = field(default_factory=Optim)
    engine: Engine = field(default_factory=Engine)
    log: Log = field(default_factory=Log)
    probe: Probe = field(default_factory=Probe)
    kernels: Any = "auto"  # auto | triton | reference, for all ops or as a mapping op: implementation

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.runs) / self.name


CHOICES = {
    "data.interpolation": ("bilinear", "bicubic"),
    "mask.policy": ("full", "truncate", "budget"),
    "objective.loss": ("l2", "smooth_l1"),
    "objective.target": ("features", "pixels"),
    "optim.weight_decay_shape": ("cosine", "linear"),
    "optim.momentum_shape": ("linear", "cosine"),
    "engine.device": ("auto", "cpu", "cuda"),
    "engine.precision": ("bf16", "fp32"),
    "engine.target_precision": (None, "fp8"),
    "engine.zero": (0, 1, 2, 3),
}
POSITIVE = ("batch_size", "data.crop", "model.patch", "model.predictor_dim", "model.predictor_depth", "optim.epochs")
POSITIVE += ("engine.accumulation", "engine.bucket", "log.every", "log.checkpoint_every", "log.keep")


def load_config(path: str | Path, overrides: list[str] = ()) -> Config:
    """The checked configuration in the YAML at `path`, a file or the name of a ready one, with `key.key=value`
    overrides. Raises ConfigError.
    """
    try:
        path = configs.find(path)
    except ValueError as error:
        raise ConfigError(f"--config: {error}") from None
    for item in overrides:
        if "=" not in item:
            raise ConfigError(f"override {item!r}: expected key=value, for example optim.lr=1e-3")
    try:
        merged = OmegaConf.merge(OmegaConf.load(path), OmegaConf.from_dotlist(list(overrides)))
        _check_keys(OmegaConf.to_container(merged), Config)
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), merged))
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "?"
        raise ConfigError(f"{key}: {str(error).splitlines()[0]} ({path})") from None
    check(config)
    return config


def save_config(config: Config, path: Path) -> None:
    """Write every key of `config`, defaults included, as YAML."""
    OmegaConf.save(OmegaConf.structured(config), path)


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Every value of a configuration by its dotted key."""
    flat = {}
    for f in fields(config):
        value, key = getattr(config, f.name), prefix + f.name
        flat |= flatten(value, key + ".") if is_dataclass(value) else {key: value}
    return flat


def check(config: Config) -> None:
    """Resolve the model's architecture and check what fields must agree on. Raises ConfigError."""
    flat = flatten(config)
    for key, allowed in CHOICES.items():
        if flat[key] not in allowed:
            raise ConfigError(f"{key}: expected one of {', '.join(map(str, allowed))}, got {flat[key]!r}")
    for key in POSITIVE:
        if flat[key] < 1:
            raise ConfigError(f"{key}: expected at least 1, got {flat[key]}")
    if not config.model.patch_std > 0:
        raise ConfigError(f"model.patch_std: expected more than 0 (published: 0.02), got {config.model.patch_std}")
    _check_model(config.model)
    if config.data.crop % config.model.patch:
        raise ConfigError(
            f"data.crop={config.data.crop} is not divisible by model.patch={config.model.patch}; "
            f"set data.crop to {max(1, config.data.crop // config.model.patch) * config.model.patch}"
        )
    if config.batch_size % config.engine.accumulation:
        raise ConfigError(
            f"batch_size={config.batch_size} is not divisible by engine.accumulation={config.engine.accumulation}; "
            f"set batch_size to a multiple of it"
        )
    for key in ("data.scale", "data.ratio"):
        low, high = _pair(key, flat[key])
        if not 0 < low <= high:
            raise ConfigError(f"{key}: expected two numbers, 0 < first <= second, got {flat[key]}")
    if config.data.scale[1] > 1:
        raise ConfigError(f"data.scale: expected shares of the image's area, at most 1, got {config.data.scale}")
    if (config.mask.budget is None) != (config.mask.policy != "budget"):
        raise ConfigError(
            f"mask.budget={config.mask.budget} does not go with mask.policy={config.mask.policy}; "
            f"give a number with policy=budget, and none otherwise"
        )
    if config.engine.target_precision == "fp8" and (config.objective.method != "ijepa" or config.model.dim % 16):
        raise ConfigError(
            f"engine.target_precision=fp8 needs objective.method=ijepa and a model.dim that is a multiple of 16, got "
            f"{config.objective.method} and {config.model.dim}; set engine.target_precision=null"
        )
    if config.engine.compile and config.engine.zero == 3:
        raise ConfigError(
            "engine.compile=true: ZeRO 3 gathers weights in hooks that a compiled block cannot hold; "
            "set engine.compile=false or engine.zero to at most 2"
        )
    if config.engine.target_stream and config.engine.device == "cpu":
        raise ConfigError("engine.target_stream=true: there are no streams with engine.device=cpu; set it to false")
    if config.engine.cuda_graphs and config.objective.method != "ijepa":
        raise ConfigError("engine.cuda_graphs=true is for objective.method=ijepa; set it to false")
    if config.engine.cuda_graphs and (config.engine.zero == 3 or not config.mask.ladder):
        raise ConfigError(
            f"engine.cuda_graphs=true needs weights that stay and shapes that come again, got engine.zero="
            f"{config.engine.zero} and mask.ladder={str(config.mask.ladder).lower()}; set engine.zero to at most 2 and "
            f"mask.ladder=true, or engine.cuda_graphs=false"
        )
    if config.objective.method == "ijepa" and config.objective.options:
        raise ConfigError("objective.options: objective.method=ijepa has none; its settings are in mask and model")
    if config.objective.method != "ijepa" and config.mask != Mask():
        raise ConfigError(f"mask: objective.method={config.objective.method} draws its own masks; remove the section")
    if config.optim.warmup_epochs > config.optim.epochs * config.optim.horizon:
        raise ConfigError(
            f"optim.warmup_epochs={config.optim.warmup_epochs} is longer than optim.epochs={config.optim.epochs}; "
            f"lower optim.warmup_epochs"
        )


def options_of(config: Config, kind: type) -> Any:
    """`objective.options` as the dataclass `kind`, which has a method's own settings. Raises ConfigError."""
    given = config.objective.options
    _check_keys(given, kind, "objective.options.")
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), given))
    except OmegaConfBaseException as error:
        raise ConfigError(f"objective.options.{error.full_key}: {str(error).splitlines()[0]}") from None


def _check_model(model: Model) -> None:
    from ijepa_fast.models.vit import ARCHITECTURES

    if model.arch is not None:
        if model.arch not in ARCHITECTURES:
            raise ConfigError(f"model.arch: expected one of {', '.join(ARCHITECTURES)}, got {model.arch!r}")
        for name, value in zip(("dim", "depth", "heads", "mlp_ratio"), ARCHITECTURES[model.arch], strict=True):
            if getattr(model, name) is None:
                setattr(model, name, value)
    model.mlp_ratio = 4.0 if model.mlp_ratio is None else model.mlp_ratio
    for name in ("dim", "depth", "heads"):
        if getattr(model, name) is None:
            raise ConfigError(f"model.{name} is not set; set it, or model.arch to one of {', '.join(ARCHITECTURES)}")
    for name in ("dim", "predictor_dim"):
        width = getattr(model, name)
        if width % model.heads or width % 4:
            raise ConfigError(
                f"model.{name}={width} must be divisible by 4 and by model.heads={model.heads}; "
                f"change model.{name} or model.heads"
            )


def _pair(key: str, value: list[float]) -> tuple[float, float]:
    if len(value) != 2:
        raise ConfigError(f"{key}: expected two numbers, got {value}")
    return value[0], value[1]


def _check_keys(given: dict, section: type, prefix: str = "") -> None:
    known = {f.name: f for f in fields(section)}
    for key, value in given.items():
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {prefix}{close[0]}?" if close else f"the keys are {', '.join(known)}"
            raise ConfigError(f"{prefix}{key}: there is no such key; {hint}")
        factory = known[key].default_factory
        if isinstance(factory, type) and is_dataclass(factory):
            if not isinstance(value, dict):
                raise ConfigError(f"{prefix}{key}: expected a section with keys, got {value!r}")
            _check_keys(value, factory, f"{prefix}{key}.")
