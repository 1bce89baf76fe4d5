"""csrc's loops for fp32 on the CPU, under the signatures of the registered ops."""

from __future__ import annotations

import torch

from ijepa_fast.kernels.common import native

_fwd = native.define(
    "layer_norm_cpu_(Tensor x, Tensor? residual, Tensor weight, Tensor bias, float eps, "
    "Tensor(a!) y, Tensor(b!)? s, Tensor(c!) mean, Tensor(d!) rstd) -> ()"
)
_bwd = native.define(
    "layer_norm_bwd_cpu_(Tensor dy, Tensor? ds, Tensor s, Tensor weight, Tensor mean, Tensor rstd, "
    "Tensor(a!) dx, Tensor(b!) dparameters) -> ()"
)


def layer_norm_fwd(x, weight, bias, eps):
    """-> y (T, D), mean and rstd (T,)."""
    y, (mean, rstd) = torch.empty_like(x), x.new_empty((2, len(x)), dtype=torch.float32)
    _fwd(x, None, weight, bias, eps, y, None, mean, rstd)
    return y, mean, rstd


def add_layer_norm_fwd(x, residual, weight, bias, eps):
    """-> y and s = x + residual (T, D), mean and rstd (T,)."""
    y, s, (mean, rstd) = torch.empty_like(x), torch.empty_like(x), x.new_empty((2, len(x)), dtype=torch.float32)
    _fwd(x, residual, weight, bias, eps, y, s, mean, rstd)
    return y, s, mean, rstd


def layer_norm_bwd(dy, ds, s, weight, mean, rstd):
    """-> the gradient of x and of the residual (T, D), those of weight and bias (2, D)."""
    dx, dparameters = torch.empty_like(s), s.new_empty(2, s.shape[1])
    _bwd(dy, ds, s, weight, mean, rstd, dx, dparameters)
    return dx, dparameters
