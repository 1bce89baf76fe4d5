"""Weights in one form, whatever file they came from: the published code's key names, fp32, and the architecture.

The state dict of a network with fixed positions carries their table (`pos_embed` (1, N, D); `predictor_pos_embed`
(1, N, Dp)), which the models keep in a buffer of another name because it is not trained. One file of all networks is a
safetensors file with keys `<network>.<published name>` and the Arch as JSON in its header: the form that checkpoints
have.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ijepa_fast.config import ARCHITECTURES
from ijepa_fast.data import IMAGENET_MEAN, IMAGENET_STD, Size, size_of
from ijepa_fast.data.kinds import kind_of_file
from ijepa_fast.data.pixels import Pixels
from ijepa_fast.data.reading import Reading
from ijepa_fast.data.sources import EIGHT_BITS
from ijepa_fast.interop.tensors import write_tensors
from ijepa_fast.models.positions import sincos_2d
from ijepa_fast.models.relative import resample_table

State = dict[str, torch.Tensor]
HEADS = {dim: heads for dim, _, heads, _ in ARCHITECTURES.values()}  # the published width -> heads
MAX_HEADER = 1 << 24  # bytes of a safetensors header; its JSON takes some hundred times as many in memory
TABLE = "rel_pos_bias.relative_position_bias_table"  # of relative positions
HEADER = "ijepa_fast"  # key of the header's metadata


def position_key(network: str) -> str:
    """The published name of the position table of a network."""
    name = network.removeprefix("target_")
    return "pos_embed" if name == "encoder" else f"{name}_pos_embed"


@dataclass(frozen=True)
class Arch:
    """What a state dict alone does not say. image_size: a side, or height and width; patch: pixels.

    mean, std, stretch, low, high, channel_names: the training's, see data.reading.Pixels. reading: how its files became
    images, with a depth that is known. interpolation: of its resizing, bilinear or bicubic. step: of the training,
    where it is known. method: that trained it. class_token to key_bias are models.vit.Encoder's, of layer_scale whether
    it is 0.
    """

    image_size: int | Size
    patch: int
    dim: int
    depth: int
    heads: int
    mlp_ratio: float = 4.0
    predictor_dim: int | None = None
    predictor_depth: int | None = None
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    interpolation: str = "bilinear"
    step: int | None = None
    method: str = "ijepa"
    class_token: bool = False
    learned_positions: bool = False
    mask_token: bool = False
    readout: str = "patches"
    relative_positions: bool = False
    layer_scale: float = 0.0
    key_bias: bool = True
    stretch: str = "none"
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    channel_names: tuple[str, ...] = ()
    reading: Reading = EIGHT_BITS

    @property
    def size(self) -> Size:
        """Height and width of an image, pixels."""
        return size_of(self.image_size)

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of patches."""
        return (self.size[0] // self.patch, self.size[1] // self.patch)

    @property
    def pixels(self) -> Pixels:
        """What the model makes of pixels first."""
        return Pixels(self.mean, self.std, self.stretch, self.low, self.high, self.channel_names)

    def images(self) -> dict[str, Any]:
        """What other libraries' configurations do not say of images; {} of RGB of eight bits."""
        names = ("stretch", "low", "high", "channel_names")
        special = {name: getattr(self, name) for name in names if getattr(self, name) != getattr(Arch, name)}
        reading = asdict(self.reading)
        return special | ({} if self.reading == EIGHT_BITS else {"reading": reading})

    def encoder_options(self) -> dict[str, Any]:
        """Arguments of models.vit.Encoder."""
        sizes = ("image_size", "patch", "dim", "depth", "heads", "mlp_ratio")
        parts = ("class_token", "learned_positions", "mask_token", "readout", "relative_positions", "layer_scale")
        options = {name: getattr(self, name) for name in (*sizes, *parts, "key_bias")}
        return options | {"channels": len(self.mean)}


def images_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of Arch from JSON, lists as tuples and the reading as one."""

    def tuples(given: Mapping[str, Any]) -> dict[str, Any]:
        return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}

    known = tuples(values)
    return known | ({"reading": Reading(**tuples(known["reading"]))} if "reading" in known else {})


@dataclass
class Weights:
    """The state dicts of the networks that a file has, by name: published keys, fp32, on the CPU.

    Of I-JEPA: encoder, predictor, target_encoder. Other methods have others; "target_<name>" is a network's average.
    """

    arch: Arch
    networks: dict[str, State] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.networks = {name: state for name, state in self.networks.items() if state}

    @property
    def held(self) -> str:
        """The names of the networks, for a message."""
        return ", ".join(self.networks)

    @property
    def best(self) -> str:
        """The encoder that is probed, loaded and exported by default: the average where there is one."""
        return "target_encoder" if "target_encoder" in self.networks else "encoder"

    def network(self, name: str | None = None) -> State:
        """The state dict of `name`, of `best` by default; ValueError where the file does not have it."""
        name = name or self.best
        if name not in self.networks:
            raise ValueError(f"network: the file has no {name}; choose of {self.held}")
        return self.networks[name]

    def renamed(self, former: Mapping[str, str]) -> Weights:
        """The same weights by today's names of parameters. former: prefixes then and now."""
        networks: dict[str, State] = {}
        for network, state in self.networks.items():
            for key, tensor in state.items():
                name, _, rest = today(f"{network}.{key}", former).partition(".")
                networks.setdefault(name, {})[rest] = tensor
        return Weights(self.arch, networks)

    def with_fixed_positions(self) -> Weights:
        """The same encoders with a table (1, N, D), as an encoder has that learns none: of a table with the class
        token's position, that position is added to the token.
        """
        if not (self.arch.class_token and self.arch.learned_positions):
            return self
        networks = dict(self.networks)
        for name in networks.keys() & {"encoder", "target_encoder"}:
            state = dict(networks[name])
            state["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
            state["pos_embed"] = state["pos_embed"][:, 1:]
            networks[name] = state
        return Weights(replace(self.arch, learned_positions=False), networks)


def infer_arch(
    encoder: State,
    predictor: State | None = None,
    *,
    heads: int | None = None,
    source: Any = "checkpoint",
    **known: Any,
) -> Arch:
    """The Arch of a published encoder state dict.

    heads: not to be read off weights; by the published sizes unless given. known: further fields of Arch; image_size
    is asked for where the grid is no square.
    """
    for key in ("patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc1.weight"):
        if key not in encoder:
            raise ValueError(f"{source}: expected an I-JEPA encoder with key {key!r}, which is missing")
    if encoder["patch_embed.proj.weight"].dim() != 4:
        found = tuple(encoder["patch_embed.proj.weight"].shape)
        raise ValueError(f"{source}: patch_embed.proj.weight: expected shape (D, C, P, P), got {found}")
    dim, channels, patch, _ = encoder["patch_embed.proj.weight"].shape
    class_token = "cls_token" in encoder
    extra = class_token and known.get("learned_positions", False)
    size = size_of(known.pop("image_size", 0) or 0)
    count = encoder["pos_embed"].shape[1] - extra if encoder["pos_embed"].dim() == 3 else -1
    if size[0] == size[1] or (size[0] // patch) * (size[1] // patch) != count:
        size = (patch * _side(encoder["pos_embed"], f"{source}: pos_embed", extra),) * 2
    if channels != len(known.get("mean", IMAGENET_MEAN)):
        raise ValueError(
            f"{source}: expected mean and std of {channels} channels, as patch_embed.proj.weight has, got "
            f"{len(known.get('mean', IMAGENET_MEAN))}"
        )
    if heads is None and dim not in HEADS:
        raise ValueError(f"{source}: heads: not to be read off weights of width {dim}; say how many there are")
    if predictor:
        if "predictor_embed.weight" not in predictor:
            raise ValueError(f"{source}: predictor: expected key 'predictor_embed.weight', which is missing")
        known |= {
            "predictor_dim": predictor["predictor_embed.weight"].shape[0],
            "predictor_depth": _depth(predictor, "predictor_blocks."),
        }
    ratio = mlp_ratio(encoder["blocks.0.mlp.fc1.weight"].shape[0], dim)
    known |= {"class_token": class_token, "mask_token": "masked_embed" in encoder}
    image_size = size[0] if size[0] == size[1] else size
    return Arch(image_size, patch, dim, _depth(encoder, "blocks."), heads or HEADS[dim], ratio, **known)


def mlp_ratio(hidden: int, dim: int) -> float:
    """The ratio for which int(dim * ratio) is `hidden` again, also for the giant's 48/11."""
    return hidden / dim if int(dim * (hidden / dim)) == hidden else (hidden + 0.5) / dim


def _depth(state: State, prefix: str) -> int:
    numbers = {int(key[len(prefix) :].split(".")[0]) for key in state if key.startswith(prefix)}
    return max(numbers, default=-1) + 1


def _side(positions: torch.Tensor, name: str, class_token: bool = False) -> int:
    """Patches along the square grid of a table (1, n*n, D), or (1, 1 + n*n, D) with the class token's position."""
    count = positions.shape[1] - class_token if positions.dim() == 3 else -1
    side = round(max(count, 0) ** 0.5)
    if side < 1 or side**2 != count:
        token = (
            "with the class token's position, (1, 1 + n*n, D)" if class_token else "without class token, (1, n*n, D)"
        )
        raise ValueError(f"{name}: expected a square grid {token}, got {tuple(positions.shape)}")
    return side


def read_json(path: Path) -> Any:
    """The content of a JSON file; ValueError that names it where it is none."""
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: expected a readable JSON file, got: {error}") from None


def read_safetensors(path: Path) -> tuple[State, dict[str, str]]:
    """(tensors by key, metadata of the header) of a safetensors file, on the CPU; ValueError where it is none."""
    from safetensors import SafetensorError, safe_open

    try:
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
        if MAX_HEADER < size <= path.stat().st_size:
            raise ValueError(
                f"{path}: its header has {size} bytes, over the bound of {MAX_HEADER}; a ViT's has 100,000"
            )
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError) as error:
        # Only now: the length that a good file begins with may look like another kind's first bytes.
        raise ValueError(f"{path}: expected a safetensors file, got: {kind_of_file(path) or error}") from None


def header(arch: Arch) -> dict[str, str]:
    """The metadata of a weights file's header."""
    return {"format": "pt", HEADER: json.dumps(asdict(arch))}


def save_weights(path: str | Path, weights: Weights) -> None:
    """Write all networks as one safetensors file, fp32, with the Arch in its header."""
    tensors = {
        f"{network}.{key}": value.detach().to("cpu", torch.float32)
        for network, state in weights.networks.items()
        for key, value in state.items()
    }
    write_tensors(Path(path), tensors, header(weights.arch))


def load_weights(path: str | Path) -> Weights:
    """Weights of a checkpoint's weights.safetensors, or of a file written by save_weights."""
    tensors, metadata = read_safetensors(Path(path))
    networks: dict[str, State] = {}
    former = _former_names(tensors)
    for key, tensor in tensors.items():
        network, _, name = today(key, former).partition(".")
        networks.setdefault(network, {})[name] = tensor.float()
    if not networks.get("encoder") and not networks.get("target_encoder"):
        found = sorted(networks)
        raise ValueError(f"weights {path}: expected keys that begin with encoder. or target_encoder., got {found}")
    if HEADER not in metadata:
        raise ValueError(
            f"weights {path}: expected the architecture under {HEADER!r} in the header, got {sorted(metadata)}"
        )
    arch = _arch(json.loads(metadata[HEADER]), networks.get("encoder") or networks["target_encoder"], former, path)
    widths = {"encoder": arch.dim, "target_encoder": arch.dim}
    if arch.predictor_dim is not None:
        widths["predictor"] = arch.predictor_dim
    for name in widths.keys() & networks.keys():  # a file of the first version has no tables, which were the usual ones
        if arch.relative_positions and not name.startswith("predictor"):
            continue
        networks[name].setdefault(position_key(name), sincos_2d(widths[name], arch.grid)[None])
    return Weights(arch, networks)


def today(name: str, former: Mapping[str, str]) -> str:
    """A parameter's name of an earlier version -> today's. former: prefixes then and now."""
    for old, new in former.items():
        if name.removeprefix("target_").startswith(old):
            return name.replace(old, new, 1)
    return name


def _former_names(tensors: State) -> dict[str, str]:
    """Prefixes of a file in which an encoder lies beside its head, as iBOT's did."""
    nested = any(key.startswith("encoder.backbone.") for key in tensors)
    return {"encoder.backbone.": "encoder.", "encoder.head.": "head."} if nested else {}


def _arch(values: dict[str, Any], encoder: State, former: Mapping[str, str], path: str | Path) -> Arch:
    known = {f.name for f in fields(Arch)}
    if missing := {"image_size", "patch", "dim", "depth", "heads"} - set(values):
        raise ValueError(f"weights {path}: the header's architecture lacks {sorted(missing)}")
    if "class_token" not in values:  # written before the header said so
        values |= {"class_token": "cls_token" in encoder, "mask_token": "masked_embed" in encoder}
        values |= {"learned_positions": bool(former), "readout": "class" if former else "patches"}
        values["method"] = "ibot" if former else "mae" if values["class_token"] else "ijepa"
    return Arch(**images_of({k: v for k, v in values.items() if k in known}))


def with_image_size(weights: Weights, image_size: int | Size) -> Weights:
    """The same weights for images of `image_size`, a side or height and width, their position tables resampled."""
    arch, size = weights.arch, size_of(image_size)
    if size == arch.size:
        return weights
    if min(size) < 1 or size[0] % arch.patch or size[1] % arch.patch:
        raise ValueError(f"image_size: expected a multiple of the patch, {arch.patch}, got {image_size}")
    old, arch = arch.grid, replace(arch, image_size=image_size)
    networks = {}
    for name, state in weights.networks.items():
        networks[name], key = dict(state), position_key(name)
        if key in state:
            networks[name][key] = resample_positions(
                state[key], old, arch.grid, arch.learned_positions and arch.class_token
            )
        if TABLE in state:
            networks[name][TABLE] = resample_table(state[TABLE], old, arch.grid)
    return Weights(arch, networks)


def resample_positions(
    positions: torch.Tensor, old: tuple[int, int], grid: tuple[int, int], class_token: bool = False
) -> torch.Tensor:
    """Position table (1, N, D) of the grid `old` -> (1, rows*columns, D) of another, bicubic as Hugging Face does it.

    class_token: the first row is the class token's position, and stays.
    """
    extra = int(class_token)
    if tuple(old) == tuple(grid):
        return positions
    table = positions[:, extra:].reshape(1, *old, -1).permute(0, 3, 1, 2)
    table = F.interpolate(table, size=tuple(grid), mode="bicubic", align_corners=False)
    table = table.permute(0, 2, 3, 1).reshape(1, grid[0] * grid[1], -1)
    return torch.cat([positions[:, :extra], table], dim=1)


def with_class_position(state: State, arch: Arch) -> State:
    """An encoder's state as other libraries have it: no embedding of masked patches, and with a class token a table
    (1, 1 + N, D) whose first row is the class token's position.
    """
    state = {key: tensor for key, tensor in state.items() if key != "masked_embed"}
    if arch.class_token and not arch.learned_positions:
        state["pos_embed"] = F.pad(state["pos_embed"], (0, 0, 1, 0))
    return state


def check_state(name: str, shapes: Mapping[str, tuple[int, ...]], state: State) -> None:
    """ValueError, naming the key and both shapes, unless the published `state` of network `name` has just `shapes`.

    shapes: of a model, {key: shape}.
    """
    held = {key: tuple(tensor.shape) for key, tensor in state.items()}
    for key, shape in shapes.items():
        if key not in held:
            raise ValueError(f"{name}.{key}: the model has shape {tuple(shape)}, the weights lack it")
        if held[key] != tuple(shape):
            raise ValueError(
                f"{name}.{key}: the model has shape {tuple(shape)}, the weights {held[key]}: the architectures differ"
            )
    if strange := sorted(set(held) - set(shapes)):
        raise ValueError(
            f"{name}.{strange[0]}: the weights have it, of shape {held[strange[0]]}, and the model does not "
            f"({len(strange)} such keys): the architectures differ"
        )


def load_state(module: nn.Module, state: State, name: str = "encoder") -> None:
    """Load a published state dict into an Encoder or Predictor: all of it, or ValueError and nothing.

    A fixed position table, of the module's grid, is copied into the module's.
    """
    state, fixed = dict(state), getattr(module, "positions", None)
    shapes = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
    if fixed is not None:
        shapes[position_key(name)] = (1, *fixed.shape)
    check_state(name, shapes, state)
    if fixed is not None:
        fixed.copy_(state.pop(position_key(name))[0])
    module.load_state_dict(state)


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of the run in `folder`, oldest first: step-00000500, and nothing of another name."""
    named = [path for path in (folder / "checkpoints").glob("step-*") if re.fullmatch(r"step-[0-9]{8,}", path.name)]
    return sorted((path for path in named if path.name == f"step-{step_of(path):08d}" and path.is_dir()), key=step_of)


def step_of(path: Path) -> int:
    """The step of a checkpoint, by its name."""
    return int(path.name.removeprefix("step-"))
