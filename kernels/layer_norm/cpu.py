"""The registered ops in PyTorch on a CPU."""

from __future__ import annotations

import torch


def layer_norm_fwd(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> y (T, D), mean and rstd (T,) fp32."""
    y, mean, rstd = torch.native_layer_norm(x, weight.shape, weight.to(x.dtype), bias.to(x.dtype), eps)
    return y, mean.flatten().float(), rstd.flatten().float()


def add_layer_norm_fwd(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> y and s = x + residual (T, D), mean and rstd (T,) fp32."""
    total = x + residual
    y, mean, rstd = layer_norm_fwd(total, weight, bias, eps)
    return y, total, mean, rstd


def layer_norm_bwd(
    dy: torch.Tensor,
    ds: torch.Tensor | None,
    s: torch.Tensor,
    weight: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """-> the gradient of x and of the residual (T, D), those of weight and bias (2, D)."""
    xhat = (s.float() - mean[:, None]) * rstd[:, None]
    g = dy.float() * weight.float()
    dx = rstd[:, None] * (g - g.mean(1, keepdim=True) - xhat * (g * xhat).mean(1, keepdim=True))
    dparameters = torch.stack([(dy.float() * xhat).sum(0), dy.float().sum(0)])
    return (dx if ds is None else dx + ds.float()).to(s.dtype), dparameters.to(weight.dtype)
