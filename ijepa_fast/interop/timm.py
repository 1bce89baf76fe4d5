"""timm's names: a VisionTransformer, with or without class token, whose keys are the published encoder's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

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

# The one registered architecture that is overridden in every size; timm needs a name that it knows.
_IMAGES = "ijepa_fast_images"  # what is not said elsewhere of images that are not RGB of eight bits
_ARCHITECTURE = "vit_base_patch16_gap_224"


def timm_config(arch: Arch) -> dict[str, Any]:
    """config.json's content for `timm.create_model("local-dir:FOLDER", pretrained=True)`."""
    pool = "token" if arch.readout == "class" else "avg"
    return {
        "architecture": _ARCHITECTURE,
        "num_classes": 0,
        "num_features": arch.dim,
        "global_pool": pool,
        "model_args": {
            "img_size": arch.image_size,
            "patch_size": arch.patch,
            "embed_dim": arch.dim,
            "depth": arch.depth,
            "num_heads": arch.heads,
            "mlp_ratio": arch.mlp_ratio,
            "in_chans": len(arch.mean),
            "class_token": arch.class_token,
            "global_pool": pool,
            "fc_norm": False,
        },
        "pretrained_cfg": {
            "input_size": [len(arch.mean), *arch.size],
            "fixed_input_size": True,
            "interpolation": arch.interpolation,
            "crop_pct": 0.875,
            "crop_mode": "center",
            "mean": list(arch.mean),
            "std": list(arch.std),
            "num_classes": 0,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    } | ({_IMAGES: images} if (images := arch.images()) else {})


def save_timm(folder: str | Path, state: State, arch: Arch) -> None:
    """Write a folder that timm's create_model("local-dir:...") reads. What only training needs is left out."""
    from safetensors.torch import save_file

    if not arch.key_bias:
        raise ValueError(f"--format: timm cannot hold the encoder of {arch.method} as it is; take hf or safetensors")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = with_class_position(state, arch)
    save_file({k: v.contiguous().clone() for k, v in state.items()}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(timm_config(arch), indent=2) + "\n")


def from_timm(folder: str | Path) -> Weights:
    """Weights of a folder written by save_timm, as its target encoder and its encoder."""
    folder = Path(folder)
    config = read_json(folder / "config.json")
    arguments, cfg = config.get("model_args", {}), config["pretrained_cfg"]
    tensors, _ = read_safetensors(folder / "model.safetensors")
    state = {key: value.float() for key, value in tensors.items()}
    if arguments.get("class_token", True) != ("cls_token" in state):
        raise ValueError(
            f"{folder}/config.json: model_args has class_token {arguments.get('class_token', True)}, and the weights "
            f"have {'one' if 'cls_token' in state else 'none'}"
        )
    known: dict[str, Any] = images_of(config.get(_IMAGES, {})) | {"image_size": tuple(cfg["input_size"][1:])}
    known |= {"learned_positions": True, "method": "vit"} if "cls_token" in state else {}
    arch = infer_arch(
        state,
        heads=arguments["num_heads"],
        source=folder,
        mean=tuple(cfg["mean"]),
        std=tuple(cfg["std"]),
        interpolation=cfg["interpolation"],
        readout="class" if arguments.get("global_pool") == "token" else "patches",
        **known,
    )
    return Weights(arch, {"encoder": state, "target_encoder": state})
