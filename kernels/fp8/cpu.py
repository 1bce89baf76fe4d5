"""The registered ops in PyTorch on a CPU."""

from __future__ import annotations

import torch

from ijepa_fast.kernels.fp8 import reference
from ijepa_fast.kernels.fp8.reference import bias_gelu_quantise as fp8_bias_gelu
from ijepa_fast.kernels.fp8.reference import layer_norm_quantise as fp8_add_layer_norm

__all__ = ["fp8_add_layer_norm", "fp8_bias_gelu", "fp8_layer_norm", "fp8_quantise"]


def fp8_quantise(x: torch.Tensor, values: torch.Tensor, scale: torch.Tensor) -> None:
    """Write `values` (T, D) and `scale` (T,) of x."""
    for destination, found in zip((values, scale), reference.quantise(x), strict=True):
        destination.copy_(found)


def fp8_layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(values, scale) of LN(x)."""
    return reference.layer_norm_quantise(x, None, weight, bias, eps)[:2]
