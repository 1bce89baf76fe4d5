"""Encoders of BEiT's kind (gains, no key bias, positions relative or not) by Hugging Face's names: BeitModel."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from ijepa_fast.interop.weights import Arch, State, mlp_ratio

MODEL_TYPE = "beit"
_OUTSIDE = {
    "cls_token": "embeddings.cls_token",
    "masked_embed": "embeddings.mask_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
    "rel_pos_bias.relative_position_bias_table": "encoder.relative_position_bias.relative_position_bias_table",
    "norm.weight": "layernorm.weight",
    "norm.bias": "layernorm.bias",
}
_INSIDE = {
    "gamma_1": "lambda_1",
    "gamma_2": "lambda_2",
    "attn.q_bias": "attention.attention.query.bias",
    "attn.v_bias": "attention.attention.value.bias",
    **{f"norm1.{leaf}": f"layernorm_before.{leaf}" for leaf in ("weight", "bias")},
    **{f"norm2.{leaf}": f"layernorm_after.{leaf}" for leaf in ("weight", "bias")},
    **{f"attn.proj.{leaf}": f"attention.output.dense.{leaf}" for leaf in ("weight", "bias")},
    **{f"mlp.fc1.{leaf}": f"intermediate.dense.{leaf}" for leaf in ("weight", "bias")},
    **{f"mlp.fc2.{leaf}": f"output.dense.{leaf}" for leaf in ("weight", "bias")},
}
_QKV = ("query", "key", "value")


def to_beit(state: State, arch: Arch, common: dict[str, Any]) -> tuple[dict[str, Any], State]:
    """An encoder's state dict -> (config.json's content, state dict of BeitModel). common: what all kinds say."""
    config = common | {
        "architectures": ["BeitModel"],
        "model_type": MODEL_TYPE,
        "drop_path_rate": 0.0,
        "use_mask_token": arch.mask_token,
        "use_absolute_position_embeddings": "pos_embed" in state,
        "use_relative_position_bias": False,
        "use_shared_relative_position_bias": arch.relative_positions,
        "layer_scale_init_value": arch.layer_scale,
        "use_mean_pooling": False,  # the final norm on every token, as here
    }
    out: State = {}
    for key, value in state.items():
        if key in _OUTSIDE:
            if key == "pos_embed" and not arch.learned_positions:
                value = F.pad(value, (0, 0, 1, 0))
            out[_OUTSIDE[key]] = value[None] if key == "masked_embed" else value
            continue
        _, number, inner = key.split(".", 2)
        prefix = f"encoder.layer.{number}."
        if inner == "attn.qkv.weight":
            for name, part in zip(_QKV, value.chunk(3)):
                out[f"{prefix}attention.attention.{name}.weight"] = part.contiguous()
        else:
            out[prefix + _INSIDE[inner]] = value
    return config, out


def from_beit(config: dict[str, Any], tensors: State, source: Any) -> tuple[Arch, State]:
    """config.json's content and the weights of a BeitModel -> the Arch, and the state dict by published names.

    ValueError, naming `source`, for a key that has no place, and for a bias of each block's own.
    """
    outside, inside = ({hf: name for name, hf in table.items()} for table in (_OUTSIDE, _INSIDE))
    state: State = {}
    parts: dict[str, State] = {}
    for key, value in tensors.items():
        name = key.removeprefix(f"{MODEL_TYPE}.")
        if name.startswith(("pooler.", "classifier.", "lm_head.")) or name.endswith("relative_position_index"):
            continue
        if name in outside:
            state[outside[name]] = value.float()
            continue
        _, _, rest = name.partition("encoder.layer.")
        number, _, inner = rest.partition(".")
        kind = inner.removeprefix("attention.attention.").removesuffix(".weight")
        if inner in inside:
            state[f"blocks.{number}.{inside[inner]}"] = value.float()
        elif kind in _QKV:
            parts.setdefault(number, {})[kind] = value.float()
        else:
            raise ValueError(f"{source}: {key}: not a weight of a BeitModel with positions shared by all blocks")
    for number, found in parts.items():
        if missing := [name for name in _QKV if name not in found]:
            raise ValueError(f"{source}: encoder.layer.{number}.attention.attention: {missing} missing")
        state[f"blocks.{number}.attn.qkv.weight"] = torch.cat([found[name] for name in _QKV])
    for key in ("patch_embed.proj.weight", "blocks.0.mlp.fc1.weight", "cls_token", "norm.weight"):
        if key not in state:
            raise ValueError(f"{source}: expected a BeitModel with its final norm; {key!r} is missing")
    if "masked_embed" in state:
        state["masked_embed"] = state["masked_embed"][0]
    size = config["image_size"]
    dim, hidden = len(state["patch_embed.proj.weight"]), state["blocks.0.mlp.fc1.weight"].shape[0]
    arch = Arch(
        image_size=tuple(size) if isinstance(size, list) else size,
        patch=state["patch_embed.proj.weight"].shape[-1],
        dim=dim,
        depth=len(parts),
        heads=config["num_attention_heads"],
        mlp_ratio=mlp_ratio(hidden, dim),
        method=MODEL_TYPE,
        class_token=True,
        learned_positions="pos_embed" in state,
        mask_token="masked_embed" in state,
        relative_positions="rel_pos_bias.relative_position_bias_table" in state,
        layer_scale=float("blocks.0.gamma_1" in state),
        key_bias=False,
    )
    return arch, state
