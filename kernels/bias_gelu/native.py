"""csrc's loops for fp32 on the CPU, under the signatures of the registered ops."""

from __future__ import annotations

import torch

from ijepa_fast.kernels.common import native

_fwd = native.define("bias_gelu_cpu_(Tensor x, Tensor bias, Tensor(a!) y) -> ()")
_bwd = native.define("bias_gelu_bwd_cpu_(Tensor dy, Tensor x, Tensor bias, Tensor(a!) dx, Tensor(b!) dbias) -> ()")


def bias_gelu_fwd(x, bias):
    """gelu(x + bias), (T, F)."""
    y = torch.empty_like(x)
    _fwd(x, bias, y)
    return y


def bias_gelu_bwd(dy, x, bias):
    """The gradients of x (T, F) and bias (F,)."""
    dx, dbias = torch.empty_like(x), torch.empty_like(bias)
    _bwd(dy, x, bias, dx, dbias)
    return dx, dbias
