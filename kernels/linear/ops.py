"""linear and linear_gelu: checks and dispatch. Products are cuBLAS's on a GPU; cpu.py has what a CPU takes."""

from __future__ import annotations

import torch

from ijepa_fast.kernels.common.checks import check_tensor
from ijepa_fast.kernels.linear import cpu, reference


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x weight^T + bias.

    Args:
        x: (T, I) floating point.
        weight: (O, I) in x's dtype.
        bias: (O,), or None.

    Returns:
        (T, O) in x's dtype.

    Raises:
        ValueError: for a wrong shape, device or layout.
    """
    _check("linear", x, weight, bias)
    return (cpu if cpu.unsupported(x, weight) is None else reference).linear(x, weight, bias)


def linear_gelu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """gelu(x weight^T + bias), the exact (erf) form; arguments, result and errors as `linear`."""
    _check("linear_gelu", x, weight, bias)
    return (cpu if cpu.unsupported(x, weight) is None else reference).linear_gelu(x, weight, bias)


def _check(op: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    check_tensor(op, "x", x, (None, None))
    check_tensor(op, "weight", weight, (None, x.shape[1]), device=x.device)
    if bias is not None:
        check_tensor(op, "bias", bias, (weight.shape[0],), device=x.device)
