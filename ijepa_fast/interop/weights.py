"""Weights in one form, whatever file they came from: the published code's key names, fp32, and the architecture.

Every state dict of `Weights` carries its position table (`pos_embed` (1, N, D); `predictor_pos_embed` (1, N, Dp)),
which the models here do not store because it is fixed.
"""

import json
import pickle
from dataclasses import asdict, dataclass, fields, replace

import torch
import torch.nn.functional as F

from ijepa_fast.models.positions import sincos_2d

NETWORKS = ("encoder", "predictor", "target_encoder")
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# What a published checkpoint holds beside the networks.
REFERENCE_KEYS = (*NETWORKS, "opt", "scaler", "epoch", "loss", "batch_size", "world_size", "lr")
HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 16}
POSITIONS = {"encoder": "pos_embed", "target_encoder": "pos_embed", "predictor": "predictor_pos_embed"}


@dataclass(frozen=True)
class Arch:
    """What a state dict alone does not say. image_size, patch: pixels; mean, std: the training's, in units of 0..1."""

    image_size: int
    patch: int
    dim: int
    depth: int
    heads: int
    mlp_ratio: float = 4.0
    predictor_dim: int | None = None
    predictor_depth: int | None = None
    predictor_heads: int | None = None
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
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
            raise ValueError(f"network: expected one of {NETWORKS}, got {name!r}")
        if not getattr(self, name):
            held = [n for n in NETWORKS if getattr(self, n)]
            raise ValueError(f"network: the file has no {name}, only {held}; choose one of these")
        return getattr(self, name)


def infer_arch(encoder, predictor=None, *, heads=None, source="checkpoint", **known):
    """The Arch of a published encoder state dict.

    heads: not to be read off weights; by the published sizes unless given. known: further fields of Arch.
    """
    for key in ("patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc1.weight"):
        if key not in encoder:
            raise ValueError(f"{source}: expected an I-JEPA encoder with key {key!r}, which is missing")
    dim, _, patch, _ = encoder["patch_embed.proj.weight"].shape
    side = round(encoder["pos_embed"].shape[1] ** 0.5)
    if side**2 != encoder["pos_embed"].shape[1]:
        raise ValueError(
            f"{source}: pos_embed: expected a square grid without class token, (1, n*n, {dim}), "
            f"got {tuple(encoder['pos_embed'].shape)}"
        )
    if heads is None and dim not in HEADS:
        raise ValueError(f"{source}: heads: not to be read off weights of width {dim}; give heads=")
    heads = heads or HEADS[dim]
    if predictor:
        known |= {
            "predictor_dim": predictor["predictor_embed.weight"].shape[0],
            "predictor_depth": _depth(predictor, "predictor_blocks."),
            "predictor_heads": heads,
        }
    hidden = encoder["blocks.0.mlp.fc1.weight"].shape[0]
    # Rounded up in the last digit: int(dim * ratio) must give `hidden` again, also for the giant's 48/11.
    ratio = hidden / dim if int(dim * (hidden / dim)) == hidden else (hidden + 0.5) / dim
    return Arch(side * patch, patch, dim, _depth(encoder, "blocks."), heads, ratio, **known)


def _depth(state, prefix):
    numbers = {int(key[len(prefix) :].split(".")[0]) for key in state if key.startswith(prefix)}
    return max(numbers, default=-1) + 1


def load_tensors(path):
    """torch.load of a file that holds nothing but tensors, numbers, strings and containers of them; else ValueError."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except pickle.UnpicklingError as error:
        found = str(error).split("Unsupported global: GLOBAL ")[-1].split()[0].rstrip(".,")
        raise ValueError(
            f"checkpoint {path}: holds something other than tensors and numbers ({found}), which is not loaded because "
            "unpickling it could run code; save its state dicts alone"
        ) from None
    except (RuntimeError, EOFError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"checkpoint {path}: expected a file written by torch.save, got: {reason}") from None


def _is_zip(path):
    with open(path, "rb") as file:
        return file.read(2) == b"PK"


def load_reference(path, heads=None):
    """Weights of a checkpoint in the published layout (.pth.tar: encoder, predictor, target_encoder, opt, ...).

    heads: of the encoder, where its width is none of the published ones. The optimiser's state is not read. mean and
    std are ImageNet's, which the published training used. ValueError for a file with anything else in it.
    """
    content = load_tensors(path)
    if not isinstance(content, dict) or "encoder" not in content:
        held = sorted(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"checkpoint {path}: expected a dict with key 'encoder', got {held}")
    if strange := sorted(set(map(str, content)) - set(REFERENCE_KEYS)):
        raise ValueError(f"checkpoint {path}: expected only keys of {REFERENCE_KEYS}, got also {strange}")
    states = {name: _plain(content.get(name) or {}, name, path) for name in NETWORKS}
    arch = infer_arch(states["encoder"], states["predictor"], heads=heads, source=f"checkpoint {path}")
    return Weights(arch, **states)


def _plain(state, name, path):
    """fp32 tensors under names without the `module.` that DistributedDataParallel puts before each."""
    plain = {}
    for key, value in state.items():
        if not isinstance(value, torch.Tensor):
            raise ValueError(f"checkpoint {path}: {name}[{key!r}]: expected a tensor, got {type(value).__name__}")
        plain[key.removeprefix("module.")] = value.float()
    return plain


def save_weights(path, arch, **states):
    """Write networks (encoder=, predictor=, target_encoder=: state dicts) as one safetensors file, fp32.

    Keys are `<network>.<published name>`; the header's metadata has Arch as JSON under "arch".
    """
    from safetensors.torch import save_file

    tensors = {
        f"{network}.{key}": value.detach().to("cpu", torch.float32).contiguous().clone()
        for network, state in states.items()
        for key, value in state.items()
    }
    save_file(tensors, path, metadata={"format": "pt", "arch": json.dumps(asdict(arch))})


def load_weights_file(path):
    """Weights of a file written by save_weights."""
    from safetensors import SafetensorError, safe_open

    states = {name: {} for name in NETWORKS}
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            for key in file.keys():  # noqa: SIM118
                network, _, name = key.partition(".")
                if network not in states:
                    raise ValueError(f"weights {path}: expected keys of {NETWORKS}, got {key!r}")
                states[network][name] = file.get_tensor(key).float()
    except SafetensorError as error:
        raise ValueError(f"weights {path}: expected a safetensors file, got: {error}") from None
    if "arch" not in metadata:
        raise ValueError(
            f"weights {path}: expected the architecture under 'arch' in the header, got {sorted(metadata)}"
        )
    arch = _arch(json.loads(metadata["arch"]), path)
    for name, state in states.items():
        if state and POSITIONS[name] not in state:
            width = arch.predictor_dim if name == "predictor" else arch.dim
            state[POSITIONS[name]] = sincos_2d(width, arch.grid)[None]
    return Weights(arch, **states)


def _arch(values, path):
    known = {f.name for f in fields(Arch)}
    if missing := {"image_size", "patch", "dim", "depth", "heads"} - set(values):
        raise ValueError(f"weights {path}: the header's arch lacks {sorted(missing)}")
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in known}
    return Arch(**values)


def resample_positions(positions, grid):
    """Position table (1, N, D) of a square grid -> (1, rows*columns, D) of another, bicubic as Hugging Face does it."""
    side = round(positions.shape[1] ** 0.5)
    if side**2 != positions.shape[1]:
        raise ValueError(f"positions: expected a square grid, (1, n*n, D), got {tuple(positions.shape)}")
    if (side, side) == tuple(grid):
        return positions
    table = positions.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    table = F.interpolate(table, size=tuple(grid), mode="bicubic", align_corners=False)
    return table.permute(0, 2, 3, 1).reshape(1, grid[0] * grid[1], -1)


def load_state(module, state, grid, name="encoder", resample=True):
    """Load a published state dict into an Encoder or Predictor; a key that does not fit: ValueError, nothing loaded.

    grid: the module's (rows, columns) of patches. resample: a position table of another grid is resampled to this one;
    else the module keeps its own table, and one of the same grid with other values is an error (to train on, since
    checkpoints do not store tables).
    """
    state = dict(state)
    positions = state.pop(POSITIONS[name], None)
    own = module.state_dict()
    for key, tensor in own.items():
        if key not in state:
            raise ValueError(f"{name}.{key}: missing in the weights, expected shape {tuple(tensor.shape)}")
        if state[key].shape != tensor.shape:
            raise ValueError(
                f"{name}.{key}: the model has shape {tuple(tensor.shape)}, the weights {tuple(state[key].shape)}; "
                "the architectures differ"
            )
    if strange := sorted(set(state) - set(own)):
        raise ValueError(
            f"{name}.{strange[0]}: the weights have it, of shape {tuple(state[strange[0]].shape)}, and the model does "
            f"not ({len(strange)} such keys); the architectures differ"
        )
    if positions is not None:
        _load_positions(module, positions, grid, name, resample)
    module.load_state_dict(state)


def _load_positions(module, positions, grid, name, resample):
    table = module.positions
    if positions.shape[2] != table.shape[1]:
        raise ValueError(
            f"{name}.{POSITIONS[name]}: the model's positions have shape {(1, *table.shape)}, "
            f"the weights' {tuple(positions.shape)}"
        )
    if resample:
        table.copy_(resample_positions(positions, grid)[0])
    elif positions.shape[1] == table.shape[0] and not torch.allclose(positions[0].to(table), table, atol=1e-4):
        raise ValueError(
            f"{name}.{POSITIONS[name]}: expected the fixed sine-cosine table of a {grid[0]}x{grid[1]} grid, got other "
            "values; such weights can be evaluated, not trained on"
        )


def with_image_size(weights, image_size):
    """The same weights with their position tables resampled for square images of `image_size` pixels."""
    arch = weights.arch
    if image_size % arch.patch:
        raise ValueError(f"image_size: expected a multiple of the patch, {arch.patch}, got {image_size}")
    arch = replace(arch, image_size=image_size)
    states = {}
    for name in NETWORKS:
        states[name] = dict(getattr(weights, name))
        if states[name]:
            states[name][POSITIONS[name]] = resample_positions(states[name][POSITIONS[name]], arch.grid)
    return Weights(arch, **states)
