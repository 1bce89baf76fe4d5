"""Weights in one form, whatever file they came from: the published code's key names, fp32, and the architecture.

Every state dict of `Weights` carries its position table (`pos_embed` (1, N, D); `predictor_pos_embed` (1, N, Dp)),
which the models keep in a buffer of another name because it is not trained. One file of all networks is a safetensors
file with keys `<network>.<published name>` and the Arch as JSON in its header: the form that checkpoints have.
"""

import json
from dataclasses import asdict, dataclass, fields, replace

import torch
import torch.nn.functional as F

from ijepa_fast.data import IMAGENET_MEAN, IMAGENET_STD
from ijepa_fast.models.positions import sincos_2d

NETWORKS = ("encoder", "predictor", "target_encoder")
HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 16}  # the published width -> heads
POSITIONS = {"encoder": "pos_embed", "target_encoder": "pos_embed", "predictor": "predictor_pos_embed"}
HEADER = "ijepa_fast"  # key of the header's metadata


@dataclass(frozen=True)
class Arch:
    """What a state dict alone does not say. image_size, patch: pixels; mean, std: the training's, in units of 0..1.

    interpolation: of the training's resizing, bilinear or bicubic. step: of the training, where it is known.
    """

    image_size: int
    patch: int
    dim: int
    depth: int
    heads: int
    mlp_ratio: float = 4.0
    predictor_dim: int | None = None
    predictor_depth: int | None = None
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    interpolation: str = "bilinear"
    step: int | None = None

    @property
    def grid(self):
        """(rows, columns) of patches."""
        return (self.image_size // self.patch, self.image_size // self.patch)

    def encoder_options(self):
        """Arguments of models.vit.Encoder."""
        return {k: getattr(self, k) for k in ("image_size", "patch", "dim", "depth", "heads", "mlp_ratio")}


@dataclass
class Weights:
    """The three networks' state dicts, published names, fp32, on the CPU; {} for one that the file does not have."""

    arch: Arch
    encoder: dict
    predictor: dict
    target_encoder: dict

    def network(self, name):
        """The state dict of `name`, ValueError where the file does not have it."""
        if name not in NETWORKS:
            raise ValueError(f"network: expected one of {', '.join(NETWORKS)}, got {name!r}")
        if not getattr(self, name):
            held = [n for n in NETWORKS if getattr(self, n)]
            raise ValueError(f"network: the file has no {name}; choose of {', '.join(held)}")
        return getattr(self, name)


def infer_arch(encoder, predictor=None, *, heads=None, source="checkpoint", **known):
    """The Arch of a published encoder state dict.

    heads: not to be read off weights; by the published sizes unless given. known: further fields of Arch.
    """
    for key in ("patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc1.weight"):
        if key not in encoder:
            raise ValueError(f"{source}: expected an I-JEPA encoder with key {key!r}, which is missing")
    if encoder["patch_embed.proj.weight"].dim() != 4:
        found = tuple(encoder["patch_embed.proj.weight"].shape)
        raise ValueError(f"{source}: patch_embed.proj.weight: expected shape (D, 3, P, P), got {found}")
    dim, _, patch, _ = encoder["patch_embed.proj.weight"].shape
    side = _side(encoder["pos_embed"], f"{source}: pos_embed")
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
    return Arch(side * patch, patch, dim, _depth(encoder, "blocks."), heads or HEADS[dim], ratio, **known)


def mlp_ratio(hidden, dim):
    """The ratio for which int(dim * ratio) is `hidden` again, also for the giant's 48/11."""
    return hidden / dim if int(dim * (hidden / dim)) == hidden else (hidden + 0.5) / dim


def _depth(state, prefix):
    numbers = {int(key[len(prefix) :].split(".")[0]) for key in state if key.startswith(prefix)}
    return max(numbers, default=-1) + 1


def _side(positions, name):
    side = round(positions.shape[1] ** 0.5) if positions.dim() == 3 else 0
    if positions.dim() != 3 or side**2 != positions.shape[1]:
        raise ValueError(
            f"{name}: expected a square grid without class token, (1, n*n, D), got {tuple(positions.shape)}"
        )
    return side


def read_json(path):
    """The content of a JSON file; ValueError that names it where it is none."""
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: expected a readable JSON file, got: {error}") from None


def read_safetensors(path):
    """(tensors by key, metadata of the header) of a safetensors file, on the CPU; ValueError where it is none."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: expected a safetensors file, got: {error}") from None


def header(arch):
    """The metadata of a weights file's header."""
    return {"format": "pt", HEADER: json.dumps(asdict(arch))}


def save_weights(path, weights):
    """Write all networks that `weights` has as one safetensors file, fp32, with the Arch in its header."""
    from safetensors.torch import save_file

    tensors = {
        f"{network}.{key}": value.detach().to("cpu", torch.float32).contiguous().clone()
        for network in NETWORKS
        for key, value in getattr(weights, network).items()
    }
    save_file(tensors, path, metadata=header(weights.arch))


def load_weights(path):
    """Weights of a checkpoint's weights.safetensors, or of a file written by save_weights."""
    tensors, metadata = read_safetensors(path)
    states = {name: {} for name in NETWORKS}
    for key, tensor in tensors.items():
        network, _, name = key.partition(".")
        if network not in states:
            raise ValueError(f"weights {path}: expected keys that begin with one of {', '.join(NETWORKS)}, got {key!r}")
        states[network][name] = tensor.float()
    if HEADER not in metadata:
        raise ValueError(
            f"weights {path}: expected the architecture under {HEADER!r} in the header, got {sorted(metadata)}"
        )
    arch = _arch(json.loads(metadata[HEADER]), path)
    for name, state in states.items():
        if state and POSITIONS[name] not in state:
            width = arch.predictor_dim if name == "predictor" else arch.dim
            state[POSITIONS[name]] = sincos_2d(width, arch.grid)[None]
    return Weights(arch, **states)


def _arch(values, path):
    known = {f.name for f in fields(Arch)}
    if missing := {"image_size", "patch", "dim", "depth", "heads"} - set(values):
        raise ValueError(f"weights {path}: the header's architecture lacks {sorted(missing)}")
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in known}
    return Arch(**values)


def with_image_size(weights, image_size):
    """The same weights for square images of `image_size` pixels, their position tables resampled to the other grid."""
    arch = weights.arch
    if image_size == arch.image_size:
        return weights
    if image_size < 1 or image_size % arch.patch:
        raise ValueError(f"image_size: expected a multiple of the patch, {arch.patch}, got {image_size}")
    arch = replace(arch, image_size=image_size)
    states = {}
    for name in NETWORKS:
        states[name] = dict(getattr(weights, name))
        if states[name]:
            states[name][POSITIONS[name]] = resample_positions(states[name][POSITIONS[name]], arch.grid)
    return Weights(arch, **states)


def resample_positions(positions, grid):
    """Position table (1, N, D) of a square grid -> (1, rows*columns, D) of another, bicubic as Hugging Face does it."""
    side = _side(positions, "positions")
    if (side, side) == tuple(grid):
        return positions
    table = positions.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    table = F.interpolate(table, size=tuple(grid), mode="bicubic", align_corners=False)
    return table.permute(0, 2, 3, 1).reshape(1, grid[0] * grid[1], -1)


def check_state(name, shapes, state):
    """ValueError, naming the key and both shapes, unless the published `state` of network `name` has just `shapes`.

    shapes: of a model, {key: shape}. The position table is left out of the comparison.
    """
    state = {key: tuple(tensor.shape) for key, tensor in state.items() if key != POSITIONS[name]}
    for key, shape in shapes.items():
        if key not in state:
            raise ValueError(f"{name}.{key}: the model has shape {tuple(shape)}, the weights lack it")
        if state[key] != tuple(shape):
            raise ValueError(
                f"{name}.{key}: the model has shape {tuple(shape)}, the weights {state[key]}: the architectures differ"
            )
    if strange := sorted(set(state) - set(shapes)):
        raise ValueError(
            f"{name}.{strange[0]}: the weights have it, of shape {state[strange[0]]}, and the model does not "
            f"({len(strange)} such keys): the architectures differ"
        )


def load_state(module, state, name="encoder"):
    """Load a published state dict into an Encoder or Predictor: all of it, or ValueError and nothing.

    The position table, of the module's grid, is copied into the module's.
    """
    check_state(name, {key: tensor.shape for key, tensor in module.state_dict().items()}, state)
    state = dict(state)
    positions = state.pop(POSITIONS[name])
    if positions.shape != (1, *module.positions.shape):
        raise ValueError(
            f"{name}.{POSITIONS[name]}: the model has shape {(1, *module.positions.shape)}, "
            f"the weights {tuple(positions.shape)}"
        )
    module.load_state_dict(state)
    module.positions.copy_(positions[0])
