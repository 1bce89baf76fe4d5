"""The registered ops in PyTorch on a CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def bias_gelu_fwd(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """gelu(x + bias), (T, F)."""
    return F.gelu(x.float() + bias.float()).to(x.dtype)


def bias_gelu_bwd(dy: torch.Tensor, x: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of x (T, F) and bias (F,)."""
    dx = torch.ops.aten.gelu_backward(dy.float(), x.float() + bias.float())
    return dx.to(x.dtype), dx.sum(0).to(bias.dtype)
