"""The meaning of bias_gelu, in PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def bias_gelu(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """gelu(x + bias), the exact form; (T, F)."""
    return F.gelu(x + bias.to(x.dtype))
