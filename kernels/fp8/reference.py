"""The meaning of the fp8 ops, in PyTorch: e4m3 values with one fp32 scale per row, products of them in fp32."""

from __future__ import annotations

import torch
import torch.nn.functional as F

LARGEST = 448.0  # of e4m3
FP8 = torch.float8_e4m3fn


def quantise(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x (T, D) -> (values (T, D) e4m3, scale (T,) fp32) with x = scale * values; the largest of a row becomes 448."""
    x = x.float()
    largest = x.abs().amax(1)
    scale = torch.where(largest > 0, largest / LARGEST, 1.0)
    return (x / scale[:, None]).clamp(-LARGEST, LARGEST).to(FP8), scale


def layer_norm_quantise(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(values, scale, s): the quantised LN(s) of s = x + residual, which is rounded to x's dtype first."""
    total = x if residual is None else x + residual
    y = F.layer_norm(total.float(), weight.shape, weight.float(), bias.float(), eps)
    return *quantise(y), total


def bias_gelu_quantise(x: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(values, scale) of gelu(x + bias), the exact form."""
    return quantise(F.gelu(x.float() + bias.float()))


def scaled_linear(
    values: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """(values scale) (weight weight_scale)^T + bias in fp32, rounded once to `dtype`: (T, I), (O, I) -> (T, O)."""
    product = values.float() @ weight.float().t()
    product = product * scale[:, None] * weight_scale[None, :]
    return (product if bias is None else product + bias.float()).to(dtype)
