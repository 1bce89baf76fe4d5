"""Frozen features: average-pooled patch features of every image, computed once and shared by all probes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, cast

import torch

# images uint8 (b, H, W, 3) -> features (b, N, D); N is 1 where a class token is read
Encode = Callable[[torch.Tensor], torch.Tensor]


class Network(Protocol):
    """An encoder whose layers can be read and whose weights can be trained: what ijepa_fast.load gives.

    encoder: the transformer, with `blocks` and a final `norm`. arch: its sizes. crop: side of its images, pixels.
    dim: width of its features.
    """

    encoder: Any
    arch: Any
    crop: int
    dim: int

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Images uint8 (b, H, W, 3) -> features (b, N, D)."""

    def dense(self, images: torch.Tensor) -> torch.Tensor:
        """As a call, but always the features of patches, also where a class token is read."""

    def layers(self, images: torch.Tensor, count: int) -> list[torch.Tensor]:
        """Outputs of the last `count` blocks, without the final LayerNorm, each (b, N, D)."""

    def parameters(self) -> Iterator[torch.Tensor]:
        """Its weights."""


def network(encode: Encode, wanted: str) -> Network:
    """`encode`, which must be more than a function. Raises ValueError naming what is wanted of it."""
    if not hasattr(encode, "layers"):
        raise ValueError(f"{wanted}: expected an encoder as ijepa_fast.load gives, got a {type(encode).__name__}")
    return cast(Network, encode)


def pool(dense: torch.Tensor | list[torch.Tensor]) -> torch.Tensor:
    """Average over patches: (b, N, D) -> (b, D) fp32; a list of layers gives them side by side: (b, layers*D)."""
    if isinstance(dense, list | tuple):
        return torch.cat([pool(layer) for layer in dense], dim=1)
    if dense.dim() != 3:
        raise ValueError(f"encode: expected features of shape (images, patches, width), got {tuple(dense.shape)}")
    return dense.float().mean(1)


@torch.no_grad()
def pooled_features(
    encode: Callable, batches: Iterable[tuple[torch.Tensor, torch.Tensor]], device: torch.device | str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Average-pooled features of every image (I-JEPA, appendix A.2).

    encode: images uint8 (b, H, W, 3) on `device` -> features (b, N, D), or a list of them, one per layer, which are
        pooled and concatenated.
    batches: (images, labels), labels any tensor with one row per image.
    Returns (features (n, D) fp32, labels (n, ...)), both on the CPU. Raises ValueError where there is no batch.
    """
    features, labels = [], []
    for images, target in batches:
        features.append(pool(encode(images.to(device, non_blocking=True))).cpu())
        labels.append(torch.as_tensor(target).cpu())
        if len(features[-1]) != len(labels[-1]):
            raise ValueError(f"batches: {len(features[-1])} images with {len(labels[-1])} labels")
    if not features:
        raise ValueError("batches: expected at least one batch, got none; is the folder empty?")
    return torch.cat(features), torch.cat(labels)


class Standardiser:
    """Zero mean and unit variance by the statistics of the training features (n, D).

    It is batch normalisation without an affine map, whose batch is the whole training set. per_feature=False divides by
    one number for all features instead.
    """

    def __init__(self, features: torch.Tensor, per_feature: bool = True, eps: float = 1e-5):
        self.mean = features.mean(0)
        variance = features.var(0, correction=0)
        self.scale = (variance if per_feature else variance.mean()).add(eps).rsqrt()

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        """(n, D) -> (n, D)."""
        return (features - self.mean) * self.scale
