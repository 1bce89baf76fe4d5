"""Checkpoints in the published code's layout (.pth.tar), in and out."""

from __future__ import annotations

import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ijepa_fast.data.kinds import kind_of_file
from ijepa_fast.interop.weights import State, Weights, infer_arch

NETWORKS = ("encoder", "predictor", "target_encoder")
WRAPPERS = ("state_dict", "model")
_FIRST = "patch_embed.proj.weight"  # of an encoder
# What a published checkpoint holds beside the networks.
KEYS = (*NETWORKS, "opt", "scaler", "epoch", "loss", "batch_size", "world_size", "lr")


def load_tensors(path: str | Path) -> Any:
    """torch.load of a file that holds nothing but tensors, numbers, strings and containers of them; else ValueError."""
    try:
        with torch.serialization.safe_globals(_numpy_scalars()):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except pickle.UnpicklingError as error:
        found = re.search(r"unsupported global:? (?:GLOBAL )?(\S+?)[.,]?(?=\s|$)", str(error), re.IGNORECASE)
        if not found:
            _say_kind(path)
        reason = f"something other than tensors and numbers ({found[1]})" if found else "no tensors"
        raise ValueError(
            f"checkpoint {path}: holds {reason}, which is not loaded because unpickling it could run code; save its "
            "state dicts alone"
        ) from None
    except Exception as error:  # bytes that are no checkpoint make the unpickler raise anything
        _say_kind(path)
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise ValueError(f"checkpoint {path}: expected a file written by torch.save, got: {reason}") from None


def _numpy_scalars() -> list[Any]:
    """What NumPy's numbers are made of in a file, such as a loss that was logged: they hold bytes and run no code."""
    dtypes = [type(np.dtype(name)) for name in ("float64", "float32", "float16", "int64", "int32", "uint8", "bool")]
    return [
        (np.float64(0).__reduce__()[0], "numpy.core.multiarray.scalar"),
        np.float64(0).__reduce__()[0],
        np.dtype,
        *dtypes,
    ]


def _say_kind(path: str | Path) -> None:
    """ValueError where the file's first bytes say what else it is."""
    what = kind_of_file(path)
    if what is not None and not _is_zip(path):  # which torch.save writes
        raise ValueError(f"checkpoint {path}: expected a file written by torch.save, got {what}") from None


def _is_zip(path: str | Path) -> bool:
    with open(path, "rb") as file:
        return file.read(2) == b"PK"


def load_reference(path: str | Path, heads: int | None = None) -> Weights:
    """Weights of a checkpoint in the published layout: encoder, predictor, target_encoder, opt, ...

    Also read are: the same below "state_dict" or "model", all networks in one dict with their names before the keys, an
    encoder alone, and names that DistributedDataParallel (`module.`) and torch.compile (`_orig_mod.`) have changed.

    heads: of the encoder, where its width is none of the published ones. The optimiser's state is not read. mean and
    std are ImageNet's, which the published training used. ValueError for a file with anything else in it.
    """
    content = _networks(load_tensors(path))
    if not isinstance(content, dict) or "encoder" not in content:
        held = sorted(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"checkpoint {path}: expected a dict with key 'encoder', got {held}")
    if strange := sorted(set(map(str, content)) - set(KEYS)):
        raise ValueError(f"checkpoint {path}: expected only keys of {KEYS}, got also {strange}")
    states = {name: _plain(content.get(name) or {}, name, path) for name in NETWORKS}
    arch = infer_arch(states["encoder"], states["predictor"], heads=heads, source=f"checkpoint {path}")
    if not states["target_encoder"]:
        warnings.warn(f"checkpoint {path} has no target_encoder; its encoder is the default", stacklevel=3)
    return Weights(arch, states)


def _networks(content: Any) -> Any:
    """A checkpoint's content with the networks under their names, where they are found; else as it is."""
    if not isinstance(content, dict) or "encoder" in content:
        return content
    for key in WRAPPERS:
        if isinstance(content.get(key), dict):
            return _networks(content[key])
    if not content or not all(isinstance(value, torch.Tensor) for value in content.values()):
        return content
    names = {_bare(str(key)): value for key, value in content.items()}
    if _FIRST in names:
        return {"encoder": names}
    found: dict[str, State] = {}
    for key, value in names.items():
        network, _, rest = key.partition(".")
        if network not in NETWORKS:
            return content
        found.setdefault(network, {})[rest] = value
    return {"encoder": found.get("target_encoder", {})} | found


def _bare(key: str) -> str:
    """A parameter's name without what wrappers of modules put before it, or before a network's part of it."""
    return ".".join(part for part in key.split(".") if part not in ("module", "_orig_mod"))


def _plain(state: dict, name: str, path: str | Path) -> State:
    """fp32 tensors under names without what wrappers of modules put before them."""
    plain = {}
    for key, value in state.items():
        if not isinstance(value, torch.Tensor):
            raise ValueError(f"checkpoint {path}: {name}[{key!r}]: expected a tensor, got {type(value).__name__}")
        plain[_bare(key)] = value.float()
    return plain


def save_reference(path: str | Path, weights: Weights) -> None:
    """Write I-JEPA's networks under the published keys; there is no optimiser's state to go with them."""
    if weights.arch.method != "ijepa":
        raise ValueError(
            f"--format: reference is the layout of the published I-JEPA code, and these weights are "
            f"{weights.arch.method}'s; take hf, timm or safetensors"
        )
    content = {
        name: {f"module.{key}": value.clone() for key, value in weights.networks[name].items()}
        for name in NETWORKS
        if name in weights.networks
    }
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    torch.save(content | {"opt": None, "scaler": None, "epoch": 0}, path)
