"""From any path that holds weights to a module that maps images to features."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ijepa_fast.data import DEPTHS, Size
from ijepa_fast.data.arrays import centre
from ijepa_fast.data.central import read_images
from ijepa_fast.data.reading import Raster, depth_of, fit
from ijepa_fast.interop.huggingface import from_hf
from ijepa_fast.interop.reference import load_reference
from ijepa_fast.interop.timm import from_timm
from ijepa_fast.interop.weights import Arch, Weights, checkpoints, load_state, load_weights, read_json, with_image_size
from ijepa_fast.models.vit import Encoder

KINDS = "a run's folder, a checkpoint's, a Hugging Face or timm folder, a .safetensors file, or a published .pth.tar"


def load(
    path: str | Path,
    network: str | None = None,
    image_size: int | Size | None = None,
    device: torch.device | str = "cpu",
    heads: int | None = None,
) -> PretrainedEncoder:
    """The encoder in `path` as a frozen module: images in, features out. `path` may hold any method's.

        encoder = ijepa_fast.load("runs/quickstart")
        images = encoder.read(["a.jpg", "b.jpg"])    # uint8 (2, 64, 64, 3); or your own, of side encoder.crop
        features = encoder(images)                   # fp32 (2, 64, 128): images, patches, width

    Args:
        path: a run's folder (its newest checkpoint), a checkpoint's folder or its weights.safetensors, an exported
            .safetensors, a published .pth.tar, a Hugging Face IJepaModel folder, a timm folder.
        network: "target_encoder" (the average, what the paper evaluates; the default where there is one) or "encoder"
            (the one that was trained).
        image_size: of the images, a side or height and width, where it is not the training's; positions are resampled.
        device: where the weights go.
        heads: attention heads, for a .pth.tar whose width is none of the published ones.

    Returns:
        A PretrainedEncoder. Average over patches, `features.mean(1)` (B, D), for one vector per image; of a method
        that is read by its class token (iBOT) there is but one feature per image, and the same line does.

    Raises:
        ValueError: for a path with none of these, another architecture, a missing key (naming it and both shapes), or
            an image size that the patch does not divide.
    """
    if network not in (None, "encoder", "target_encoder"):
        raise ValueError(f"network: expected 'target_encoder' or 'encoder', got {network!r}")
    weights = read(path, heads)
    if image_size is not None:
        weights = with_image_size(weights, image_size)
    encoder = Encoder(**weights.arch.encoder_options())
    load_state(encoder, weights.network(network), network or weights.best)
    return PretrainedEncoder(encoder, weights.arch).to(device)


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint under the run's `folder`, or None where there is none."""
    found = checkpoints(folder)
    return found[-1] if found else None


def read(path: str | Path, heads: int | None = None) -> Weights:
    """The Weights of any path that `load` takes."""
    path = Path(path).expanduser()
    if not path.exists():
        raise ValueError(f"{path} does not exist; expected {KINDS}")
    if path.is_file():
        return load_weights(path) if path.suffix == ".safetensors" else load_reference(path, heads)
    if (path / "config.json").exists():
        return from_timm(path) if "architecture" in read_json(path / "config.json") else from_hf(path)
    if (path / "checkpoints").is_dir():
        newest = latest(path)
        if newest is None:
            raise ValueError(f"{path}: the run has no complete checkpoint yet; wait for its first")
        path = newest
    if not (path / "weights.safetensors").exists():
        raise ValueError(f"{path}: found no weights; expected {KINDS}")
    return load_weights(path / "weights.safetensors")


class PretrainedEncoder(nn.Module):
    """An encoder with its normalisation inside. Frozen and in evaluation mode; `requires_grad_(True)` to fine-tune.

    Attributes:
        encoder: models.vit.Encoder. arch: interop.weights.Arch: sizes, and what is known of the training. crop: side of
        its images, or height and width, pixels. dim: width D of the features. patches: features per image, N: the
        patches,
            row-major over the grid, or 1, the class token.
        mean, std: of the training, for each channel, in units of 0..1; of floats as they are stored.
    """

    def __init__(self, encoder: Encoder, arch: Arch):
        super().__init__()
        self.encoder, self.arch = encoder, arch
        self.crop, self.dim = arch.image_size, arch.dim
        self.patches = 1 if encoder.readout == "class" else encoder.patches
        self.mean, self.std = arch.mean, arch.std
        self.requires_grad_(False).eval()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images -> features (B, N, D) after the final LayerNorm, in the weights' dtype.

        images: (B, H, W, C) of the training's crop and depth; or float (B, C, H, W), integers as shares of their range,
        as `transform` and other libraries make them.
        """
        return self.encoder(self._patchify(images), len(images)).view(len(images), self.patches, self.dim)

    def dense(self, images: torch.Tensor) -> torch.Tensor:
        """As `forward`, but always the features of the patches (B, N, D), also of a method read by its class token."""
        return self.encoder(self._patchify(images), len(images), "patches").view(len(images), -1, self.dim)

    def layers(self, images: torch.Tensor, count: int = 4) -> list[torch.Tensor]:
        """Outputs of the last `count` blocks, a list of (B, N, D), without the final LayerNorm."""
        outputs = self.encoder.layers(self._patchify(images), len(images), count)
        return [output.view(len(images), self.patches, self.dim) for output in outputs]

    def read(self, paths: Iterable[str | Path]) -> torch.Tensor:
        """Image files -> (B, H, W, C) on the module's device: their centres, decoded as in training; where that read
        large files by windows, all windows of each, row by row.

        Raises ValueError naming the file that cannot be used, ImportError without DALI.
        """
        device = self.encoder.norm.weight.device
        options: dict[str, Any] = {"interpolation": self.arch.interpolation, "reading": self.arch.reading}
        return read_images(paths, crop=self.crop, device=device, **options)

    def transform(self, image: Any) -> torch.Tensor:
        """A PIL image, or an array (H, W, C) or (H, W), as float (C, H, W) in units of 0..1, as `forward` takes
        batches.

        The centre, resized as in training: a transform of a torchvision data set. Raises ValueError for other channels.
        """
        array = np.array(image.convert("RGB") if hasattr(image, "convert") and len(self.mean) == 3 else image)
        reading = replace(self.arch.reading, depth=depth_of(array.dtype))
        raster = fit(Raster.of(array if array.ndim == 3 else array[..., None]), reading)
        pixels = centre(raster, self.arch.size, self.arch.interpolation)
        return torch.from_numpy(pixels.astype(np.float32) / DEPTHS[reading.depth]).permute(2, 0, 1).contiguous()

    def _patchify(self, images: torch.Tensor) -> torch.Tensor:
        (height, width), channels, depth = self.arch.size, len(self.mean), self.arch.reading.depth
        right = images.dtype == getattr(torch, depth)
        if images.is_floating_point() and images.dim() == 4 and images.shape[1] == channels != images.shape[3]:
            images, right = images.permute(0, 2, 3, 1).float(), True
        if not right or images.dim() != 4 or tuple(images.shape[1:]) != (height, width, channels):
            raise ValueError(
                f"images: expected {depth} of shape (B, {height}, {width}, {channels}), or float of shape (B, "
                f"{channels}, {height}, {width}), got {images.dtype} of shape {tuple(images.shape)}; resize them, or "
                "load with image_size="
            )
        return self.arch.pixels.patches(images, self.encoder.patch, self.encoder.norm.weight.dtype)
