"""timm's names: a VisionTransformer without class token, average-pooled, whose keys are the published encoder's."""

import json
from pathlib import Path

from ijepa_fast.interop.weights import Weights, infer_arch, read_json, read_safetensors

# The one registered architecture that is overridden in every size; timm needs a name that it knows.
_ARCHITECTURE = "vit_base_patch16_gap_224"


def timm_config(arch):
    """config.json's content for `timm.create_model("local-dir:FOLDER", pretrained=True)`."""
    return {
        "architecture": _ARCHITECTURE,
        "num_classes": 0,
        "num_features": arch.dim,
        "global_pool": "avg",
        "model_args": {
            "img_size": arch.image_size,
            "patch_size": arch.patch,
            "embed_dim": arch.dim,
            "depth": arch.depth,
            "num_heads": arch.heads,
            "mlp_ratio": arch.mlp_ratio,
            "class_token": False,
            "global_pool": "avg",
            "fc_norm": False,
        },
        "pretrained_cfg": {
            "input_size": [3, arch.image_size, arch.image_size],
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
    }


def save_timm(folder, state, arch):
    """Write a folder that timm's create_model("local-dir:...") reads."""
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous().clone() for k, v in state.items()}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(timm_config(arch), indent=2) + "\n")


def from_timm(folder):
    """Weights of a folder written by save_timm, as its target encoder and its encoder."""
    folder = Path(folder)
    config = read_json(folder / "config.json")
    if config.get("model_args", {}).get("class_token", True):
        raise ValueError(f"{folder}/config.json: expected model_args with class_token false, as I-JEPA's, got another")
    cfg = config["pretrained_cfg"]
    tensors, _ = read_safetensors(folder / "model.safetensors")
    state = {key: value.float() for key, value in tensors.items()}
    arch = infer_arch(
        state,
        heads=config["model_args"]["num_heads"],
        source=folder,
        mean=tuple(cfg["mean"]),
        std=tuple(cfg["std"]),
        interpolation=cfg["interpolation"],
    )
    return Weights(arch, encoder=state, predictor={}, target_encoder=state)
