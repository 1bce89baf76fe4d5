"""From any path that holds weights to a module that maps images to features."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from ijepa_fast.data.dali import read_images
from ijepa_fast.interop.huggingface import from_hf
from ijepa_fast.interop.reference import load_reference
from ijepa_fast.interop.timm import from_timm
from ijepa_fast.interop.weights import Arch, Weights, load_state, load_weights, read_json, with_image_size
from ijepa_fast.kernels.patchify import patchify
from ijepa_fast.models.vit import Encoder

KINDS = "a run's folder, a checkpoint's, a Hugging Face or timm folder, a .safetensors file, or a published .pth.tar"


def load(
    path: str | Path,
    network: str | None = None,
    image_size: int | None = None,
    device: torch.device | str = "cpu",
    heads: int | None = None,
) -> PretrainedEncoder:
    """The encoder in `path` as a frozen module: images in, features out. `path` may hold any method's.

        encoder = ijepa_fast.load("runs/quickstart")
        images = encoder.read(["a.jpg", "b.jpg"])    # uint8 (2, 64, 64, 3); or your own, of side encoder.crop
        features = encoder(images)                   # fp32 (2, 64, 192): images, patches, width

    Args:
        path: a run's folder (its newest checkpoint), a checkpoint's folder or its weights.safetensors, an exported
            .safetensors, a published .pth.tar, a Hugging Face IJepaModel folder, a timm folder.
        network: "target_encoder" (the average, what the paper evaluates; the default where there is one) or "encoder"
            (the one that was trained).
        image_size: side of the images, pixels, where it is not the training's crop; positions are resampled.
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
    found = [p for p in (folder / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d+", p.name)]
    return max(found, key=lambda p: int(p.name.removeprefix("step-")), default=None)


def read(path: str | Path, heads: int | None = None) -> Weights:
    """The Weights of any path that `load` takes."""
    path = Path(path)
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
        encoder: models.vit.Encoder.
        arch: interop.weights.Arch: sizes, and what is known of the training.
        crop: side of its images, pixels. dim: width D of the features. patches: features per image, N: the patches,
            row-major over the grid, or 1, the class token.
        mean, std: of the training, (3,) in units of 0..1.
    """

    def __init__(self, encoder: Encoder, arch: Arch):
        super().__init__()
        self.encoder, self.arch = encoder, arch
        self.crop, self.dim = arch.image_size, arch.dim
        self.patches = 1 if encoder.readout == "class" else encoder.patches
        self.mean, self.std = arch.mean, arch.std
        self.requires_grad_(False).eval()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """`images` uint8 (B, crop, crop, 3) -> features (B, N, D) after the final LayerNorm, in the weights' dtype."""
        return self.encoder(self._patchify(images), len(images)).view(len(images), self.patches, self.dim)

    def dense(self, images: torch.Tensor) -> torch.Tensor:
        """As `forward`, but always the features of the patches (B, N, D), also of a method read by its class token."""
        return self.encoder(self._patchify(images), len(images), "patches").view(len(images), -1, self.dim)

    def layers(self, images: torch.Tensor, count: int = 4) -> list[torch.Tensor]:
        """Outputs of the last `count` blocks, a list of (B, N, D), without the final LayerNorm."""
        outputs = self.encoder.layers(self._patchify(images), len(images), count)
        return [output.view(len(images), self.patches, self.dim) for output in outputs]

    def read(self, paths: Iterable[str | Path]) -> torch.Tensor:
        """Image files -> uint8 (B, crop, crop, 3) on the module's device: the central square, decoded as in training.

        Raises ValueError naming the file that cannot be used, ImportError without DALI.
        """
        device = self.encoder.norm.weight.device
        return read_images(paths, crop=self.crop, interpolation=self.arch.interpolation, device=device)

    def _patchify(self, images: torch.Tensor) -> torch.Tensor:
        expected = (self.crop, self.crop, 3)
        if images.dtype != torch.uint8 or images.dim() != 4 or tuple(images.shape[1:]) != expected:
            raise ValueError(
                f"images: expected uint8 of shape (B, {self.crop}, {self.crop}, 3), got {images.dtype} of shape "
                f"{tuple(images.shape)}; resize them, or load with image_size="
            )
        dtype = self.encoder.norm.weight.dtype
        return patchify(images.contiguous(), self.encoder.patch, self.mean, self.std, dtype=dtype)
