"""csrc's gradient of the weight for fp32 on the CPU."""

from __future__ import annotations

import torch

from ijepa_fast.kernels.common import native

_dweight = native.define("linear_dweight_cpu_(Tensor dy, Tensor x, Tensor(a!) dweight) -> ()")


def dweight(dy: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """dy^T x: (T, O), (T, I) -> (O, I), for I a multiple of native.WIDTH."""
    out = x.new_empty(dy.shape[1], x.shape[1])
    _dweight(dy, x, out)
    return out
