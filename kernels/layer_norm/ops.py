"""layer_norm: checks, dispatch and registration."""

from __future__ import annotations

import torch

from ijepa_fast.kernels.common.checks import check_tensor
from ijepa_fast.kernels.layer_norm import reference


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float = 1e-6, residual: torch.Tensor | None = None
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """LayerNorm over the last dimension, the residual added before it in the same pass.

    Args:
        x: (T, D) floating point.
        weight: (D,) gain.
        bias: (D,) shift.
        eps: added to the variance.
        residual: (T, D) in x's dtype, or None.

    Returns:
        y = (s - mean(s)) / sqrt(var(s) + eps) * weight + bias in x's dtype, with statistics in fp32. Without a residual
        s is x and y is returned; with one the result is (y, s), s = x + residual.

    Raises:
        ValueError: for a wrong dtype, shape, device or layout.
    """
    check_tensor("layer_norm", "x", x, (None, None))
    check_tensor("layer_norm", "weight", weight, (x.shape[1],), device=x.device)
    check_tensor("layer_norm", "bias", bias, (x.shape[1],), device=x.device)
    if residual is not None:
        check_tensor("layer_norm", "residual", residual, (x.shape[0], x.shape[1]), x.dtype, x.device)
    return reference.layer_norm(x, weight, bias, eps, residual)
