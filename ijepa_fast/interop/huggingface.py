"""Hugging Face folders, in and out: config.json, model.safetensors, preprocessor_config.json.

An encoder without class token is an `IJepaModel`, one with a class token a `ViTModel`, one without a key bias a
`BeitModel`.

Written with the names of the checkpoints on the Hub (`encoder.layer.0.attention.attention.query...`), which
transformers 4 and 5 both read; read with these or the names of transformers 5's modules.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ijepa_fast.data import DEPTHS, IMAGENET_MEAN, IMAGENET_STD
from ijepa_fast.interop.beit import MODEL_TYPE, from_beit, to_beit
from ijepa_fast.interop.reference import load_tensors
from ijepa_fast.interop.weights import (
    Arch,
    State,
    Weights,
    images_of,
    infer_arch,
    read_json,
    read_safetensors,
    with_class_position,
)
from ijepa_fast.models.blocks import EPS

# published name -> Hugging Face's, inside a block; qkv is cut into three.
_BLOCK = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
_QKV = ("query", "key", "value")
_OUTSIDE = {
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
}
_TOKENS = {"pos_embed": "embeddings.position_embeddings", "cls_token": "embeddings.cls_token"}
_READOUT = "ijepa_fast_readout"  # of config.json: how the method's features are read, "patches" or "class"
_IMAGES = "ijepa_fast_images"  # of config.json: what is not said elsewhere of images that are not RGB of eight bits
_WRITER = "ijepa_fast"  # of image processors whose mean and std are the training's, whatever they are
_RESAMPLE = {"bilinear": 2, "bicubic": 3}  # Pillow's numbers
_V5 = {  # transformers 5's module names -> the Hub's
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}


def to_hf(state: State, arch: Arch) -> tuple[dict[str, Any], State]:
    """Published encoder state dict -> (config.json's content, state dict of IJepaModel, ViTModel or BeitModel)."""
    common = {
        "hidden_size": arch.dim,
        "num_hidden_layers": arch.depth,
        "num_attention_heads": arch.heads,
        "intermediate_size": state["blocks.0.mlp.fc1.weight"].shape[0],
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": EPS,
        "image_size": arch.image_size,
        "patch_size": arch.patch,
        "num_channels": len(arch.mean),
        "dtype": "float32",
    }
    if not arch.key_bias:
        config, out = to_beit(state, arch, common)
        return config | ({_IMAGES: images} if (images := arch.images()) else {}), out
    config = common | {
        "architectures": ["ViTModel" if arch.class_token else "IJepaModel"],
        "model_type": "vit" if arch.class_token else "ijepa",
        "qkv_bias": True,
    }
    state = with_class_position(state, arch)
    if images := arch.images():
        config[_IMAGES] = images
    if arch.class_token:
        config[_READOUT] = arch.readout
    out = {hf: state[name] for name, hf in _TOKENS.items() if name in state}
    for key, value in state.items():
        if key in _TOKENS:
            continue
        module, _, leaf = key.rpartition(".")
        if not module.startswith("blocks."):
            out[f"{_OUTSIDE[module]}.{leaf}"] = value
            continue
        _, number, inner = module.split(".", 2)
        if inner == "attn.qkv":
            for name, part in zip(_QKV, value.chunk(3)):
                out[f"encoder.layer.{number}.attention.attention.{name}.{leaf}"] = part.contiguous()
        else:
            out[f"encoder.layer.{number}.{_BLOCK[inner]}.{leaf}"] = value
    return config, out


def image_processor(arch: Arch) -> dict[str, Any]:
    """preprocessor_config.json's content: the centre at the training's crop, its mean and std.

    What it cannot do, a stretch and the choice of bands, is in config.json's ijepa_fast_images.
    """
    height, width = arch.size
    return {
        "image_processor_type": "BitImageProcessor",  # the plain one that crops; ViT's squashes
        "do_convert_rgb": len(arch.mean) == 3,
        "do_resize": True,
        "size": {"shortest_edge": max(height, width)},
        "resample": _RESAMPLE[arch.interpolation],
        "do_center_crop": True,
        "crop_size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / DEPTHS[arch.reading.depth],
        "do_normalize": True,
        "image_mean": list(arch.mean),
        "image_std": list(arch.std),
        "written_by": _WRITER,
    }


def save_hf(folder: str | Path, state: State, arch: Arch) -> None:
    """Write a folder that AutoModel.from_pretrained and AutoImageProcessor.from_pretrained read."""
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config, tensors = to_hf(state, arch)
    save_file({k: v.contiguous().clone() for k, v in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "preprocessor_config.json").write_text(json.dumps(image_processor(arch), indent=2) + "\n")


def from_hf(folder: str | Path) -> Weights:
    """Weights of an IJepaModel or ViTModel folder (or one for classification), as its target encoder and its encoder.

    Mean and std are what the folder's image processor says. Folders converted from the published checkpoints say .5,
    with which nobody trained: for these ImageNet's are taken, with a warning.
    """
    folder = Path(folder)
    config = read_json(folder / "config.json")
    kind = config.get("model_type")
    if kind not in ("ijepa", "vit", MODEL_TYPE):
        raise ValueError(f"{folder}/config.json: expected model_type 'ijepa', 'vit' or '{MODEL_TYPE}', got {kind!r}")
    if kind == MODEL_TYPE:
        arch, state = from_beit(config, _hf_tensors(folder), folder)
        arch = replace(arch, **_processor(folder), **images_of(config.get(_IMAGES, {})))
        _check_config(config, arch, state, folder)
        return Weights(arch, {"encoder": state, "target_encoder": state})
    state = _published(_hf_tensors(folder), folder)
    if (kind == "vit") != ("cls_token" in state):
        held = "a class token" if "cls_token" in state else "no class token"
        raise ValueError(f"{folder}/config.json: model_type is {kind!r}, and the weights have {held}")
    known = _processor(folder) | images_of(config.get(_IMAGES, {}))
    if isinstance(config.get("image_size"), list):
        known["image_size"] = tuple(config["image_size"])
    if kind == "vit":
        known |= {"learned_positions": True, "readout": config.get(_READOUT, "class"), "method": "vit"}
    arch = infer_arch(state, heads=config["num_attention_heads"], source=folder, **known)
    _check_config(config, arch, state, folder)
    return Weights(arch, {"encoder": state, "target_encoder": state})


def _check_config(config: dict[str, Any], arch: Arch, state: State, folder: Path) -> None:
    """ValueError where config.json and the weights do not describe one model, or not one that can be built here."""
    hidden = state["blocks.0.mlp.fc1.weight"].shape[0]
    held: dict[str, Any] = {"hidden_size": arch.dim, "num_hidden_layers": arch.depth, "intermediate_size": hidden}
    size = arch.image_size if isinstance(arch.image_size, int) else list(arch.image_size)
    held |= {"patch_size": arch.patch, "image_size": size, "hidden_act": "gelu", "num_channels": len(arch.mean)}
    for key, value in held.items():
        if config.get(key, value) != value:
            raise ValueError(f"{folder}/config.json: {key} is {config[key]!r}, the model of the weights has {value!r}")


def _hf_tensors(folder: Path) -> State:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        held = read_json(index)
        parts = list(held.get("weight_map", {}).values()) if isinstance(held, dict) else []
        strange = [part for part in parts if not isinstance(part, str) or "/" in part or part[:1] in ("", ".")]
        if strange or not parts:
            raise ValueError(f"{index}: expected a weight_map to names of files beside it, got {strange[:1]}")
        return {key: value for part in sorted(set(parts)) for key, value in read_safetensors(folder / part)[0].items()}
    if (folder / "model.safetensors").exists():
        return read_safetensors(folder / "model.safetensors")[0]
    if (folder / "pytorch_model.bin").exists():
        return load_tensors(folder / "pytorch_model.bin")
    raise ValueError(f"{folder}: expected model.safetensors or pytorch_model.bin beside config.json, found neither")


def _processor(folder: Path) -> dict[str, Any]:
    """What the folder's image processor says of mean, std and interpolation, as fields of Arch."""
    path = folder / "preprocessor_config.json"
    values = read_json(path) if path.exists() else {}
    mean, std = tuple(values.get("image_mean", IMAGENET_MEAN)), tuple(values.get("image_std", IMAGENET_STD))
    if mean == std == (0.5, 0.5, 0.5) and values.get("written_by") != _WRITER:
        warnings.warn(
            f"{path} says mean and std .5, which the published training did not use; taking ImageNet's "
            f'(add "written_by": "{_WRITER}" there to keep them)',
            stacklevel=4,
        )
        mean, std = IMAGENET_MEAN, IMAGENET_STD
    interpolation = "bicubic" if values.get("resample") == _RESAMPLE["bicubic"] else "bilinear"
    return {"mean": mean, "std": std, "interpolation": interpolation}


def _published(tensors: State, folder: Path) -> State:
    """Hugging Face's names -> published ones; ValueError for a key that has no place."""
    inside = {hf: name for name, hf in _BLOCK.items()}
    outside = {hf: name for name, hf in _OUTSIDE.items()}
    tokens = {hf: name for name, hf in _TOKENS.items()}
    out: State = {}
    qkv: dict[tuple[str, str], State] = {}
    for key, value in tensors.items():
        name = key.removeprefix("ijepa.").removeprefix("vit.")
        if name.startswith(("classifier.", "pooler.")) or name == "embeddings.mask_token":
            continue
        if name in tokens:
            out[tokens[name]] = value.float()
            continue
        module, _, leaf = name.rpartition(".")
        if module in outside:
            out[f"{outside[module]}.{leaf}"] = value.float()
            continue
        number, inner = _split_layer(module)
        last = inner.rpartition(".")[2]
        if inner.startswith("attention.attention.") and last in _QKV:
            qkv.setdefault((number, leaf), {})[last] = value.float()
        elif inner in inside:
            out[f"blocks.{number}.{inside[inner]}.{leaf}"] = value.float()
        else:
            raise ValueError(f"{folder}: {key}: not a weight of IJepaModel or ViTModel")
    for (number, leaf), parts in qkv.items():
        if missing := set(_QKV) - set(parts):
            raise ValueError(f"{folder}: encoder.layer.{number}.attention.attention: {sorted(missing)} missing")
        out[f"blocks.{number}.attn.qkv.{leaf}"] = torch.cat([parts[name] for name in _QKV])
    return out


def _split_layer(module: str) -> tuple[str, str]:
    """`encoder.layer.3.x.y` or `layers.3.x.y` -> (3, x.y in the Hub's names)."""
    number, _, inner = module.removeprefix("encoder.layer.").removeprefix("layers.").partition(".")
    return number, _V5.get(inner, inner)
