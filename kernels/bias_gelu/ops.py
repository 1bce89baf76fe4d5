"""bias_gelu: checks, dispatch and registration."""

from __future__ import annotations

import torch

from ijepa_fast.kernels.bias_gelu import reference
from ijepa_fast.kernels.common.checks import check_tensor


def bias_gelu(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """u * Phi(u) with u = x + bias and Phi the normal distribution function: the exact (erf) GELU.

    Args:
        x: (T, F) floating point, the GEMM's product without its bias.
        bias: (F,) floating point.

    Returns:
        (T, F) in x's dtype; the arithmetic of the kernel is fp32.

    Raises:
        ValueError: for a wrong dtype, shape, device or layout.
    """
    check_tensor("bias_gelu", "x", x, (None, None))
    check_tensor("bias_gelu", "bias", bias, (x.shape[1],), device=x.device)
    return reference.bias_gelu(x, bias)
