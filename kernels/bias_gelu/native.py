"""csrc's loops for the CPU, under the names and arguments of the registered ops."""

from __future__ import annotations

import torch

from ijepa_fast.kernels.common import native

DTYPES = (torch.float32, torch.bfloat16)

_fwd = native.define("bias_gelu_cpu_(Tensor x, Tensor bias, Tensor(a!) y) -> ()")
_bwd = native.define("bias_gelu_bwd_cpu_(Tensor dy, Tensor x, Tensor bias, Tensor(a!) dx, Tensor(b!) dbias) -> ()")


def unsupported(x: torch.Tensor, bias: torch.Tensor) -> str | None:
    """Why csrc cannot take these, or None if it can."""
    return native.unsupported(DTYPES, x, bias)


def bias_gelu_fwd(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """gelu(x + bias), (T, F)."""
    y = torch.empty_like(x)
    _fwd(x, bias, y)
    return y


def bias_gelu_bwd(dy: torch.Tensor, x: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of x (T, F) and bias (F,)."""
    dx, dbias = torch.empty_like(x), torch.empty_like(bias)
    _bwd(dy, x, bias, dx, dbias)
    return dx, dbias
