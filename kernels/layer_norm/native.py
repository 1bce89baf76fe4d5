"""csrc's loops for the CPU, under the names and arguments of the registered ops."""

from __future__ import annotations

import torch

from ijepa_fast.kernels.common import native

DTYPES = (torch.float32, torch.bfloat16)

_fwd = native.define(
    "layer_norm_cpu_(Tensor x, Tensor? residual, Tensor weight, Tensor bias, float eps, "
    "Tensor(a!) y, Tensor(b!)? s, Tensor(c!) mean, Tensor(d!) rstd) -> ()"
)
_bwd = native.define(
    "layer_norm_bwd_cpu_(Tensor dy, Tensor? ds, Tensor s, Tensor weight, Tensor mean, Tensor rstd, "
    "Tensor(a!) dx, Tensor(b!) dparameters) -> ()"
)


def unsupported(x: torch.Tensor, weight: torch.Tensor) -> str | None:
    """Why csrc cannot take these, and a residual and a bias like them, or None if it can."""
    return native.unsupported(DTYPES, x, weight)


def layer_norm_fwd(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> y (T, D), mean and rstd (T,)."""
    y, (mean, rstd) = torch.empty_like(x), x.new_empty((2, len(x)), dtype=torch.float32)
    _fwd(x, None, weight, bias, eps, y, None, mean, rstd)
    return y, mean, rstd


def add_layer_norm_fwd(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> y and s = x + residual (T, D), mean and rstd (T,)."""
    y, s, (mean, rstd) = torch.empty_like(x), torch.empty_like(x), x.new_empty((2, len(x)), dtype=torch.float32)
    _fwd(x, residual, weight, bias, eps, y, s, mean, rstd)
    return y, s, mean, rstd


def layer_norm_bwd(
    dy: torch.Tensor,
    ds: torch.Tensor | None,
    s: torch.Tensor,
    weight: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """-> the gradient of x and of the residual (T, D), those of weight and bias (2, D)."""
    dx, dparameters = torch.empty_like(s), s.new_empty(2, s.shape[1])
    _bwd(dy, ds, s, weight, mean, rstd, dx, dparameters)
    return dx, dparameters
