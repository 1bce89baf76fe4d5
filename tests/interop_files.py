"""A published checkpoint to try the ways in and out on: golden weights after three steps, in the published layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from ijepa_fast.interop.reference import load_reference

DATA = Path(__file__).parent / "data" / "ijepa_step.npz"
HEADS = 4
NETWORKS = ("encoder", "predictor", "target_encoder")


def published() -> dict:
    """The content of a .pth.tar as the published code writes it: three networks of which no two are alike."""
    with np.load(DATA) as archive:
        content = {name: {} for name in NETWORKS}
        for key in (key for key in archive.files if key.startswith("init/")):
            _, network, name = key.split("/")
            learned = key.replace("init/", "final/")
            content[network][f"module.{name}"] = torch.from_numpy(archive[learned if learned in archive.files else key])
    moments = {"state": {0: {"exp_avg": torch.zeros(3), "step": 3}}, "param_groups": [{"lr": 1e-3, "params": [0]}]}
    return content | {
        "opt": moments,
        "scaler": {"scale": 65536.0, "growth_factor": 2.0},
        "epoch": 3,
        "loss": 0.25,
        "batch_size": 4,
        "world_size": 1,
        "lr": 1e-3,
    }


def write_published(path: Path) -> Path:
    """Write `published()`."""
    torch.save(published(), path)
    return path


def golden_weights(path: Path):
    """The Weights of `published()`, by way of a file at `path`."""
    return load_reference(write_published(path), HEADS)


def images(count: int = 3, side: int = 64) -> torch.Tensor:
    """Random uint8 images (count, side, side, 3)."""
    return torch.randint(0, 256, (count, side, side, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))


def normalised(images: torch.Tensor, mean, std) -> torch.Tensor:
    """uint8 (B, H, W, 3) -> fp32 (B, 3, H, W), as every other library wants them."""
    pixels = images.permute(0, 3, 1, 2).float() / 255
    return (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
