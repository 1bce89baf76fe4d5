"""linear and linear_gelu: checks and dispatch. Products are cuBLAS's on a GPU; cpu.py has what a CPU takes."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ijepa_fast.kernels.common.checks import check_tensor
from ijepa_fast.kernels.common.dispatch import choice, runs_triton
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
    return (cpu if _runs_cpu(x, weight) else reference).linear(x, weight, bias)


def linear_gelu(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    bias_gelu: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """gelu(x weight^T + bias), the exact (erf) form.

    Args:
        x: (T, I) floating point.
        weight: (O, I) in x's dtype.
        bias: (O,).
        bias_gelu: the op of that name. It adds the bias and takes GELU of a product where it is a Triton kernel, and on
            a CPU where a gradient is wanted; else both are part of the product.

    Returns:
        (T, O) in x's dtype.

    Raises:
        ValueError: for a wrong shape, device or layout.
    """
    _check("linear_gelu", x, weight, bias)
    if runs_triton("bias_gelu", x):
        return bias_gelu(linear(x, weight), bias)
    if not _runs_cpu(x, weight):
        return reference.linear_gelu(x, weight, bias)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad or bias.requires_grad):
        return bias_gelu(cpu.linear(x, weight, None), bias)
    return cpu.linear_gelu(x, weight, bias)


def _runs_cpu(x: torch.Tensor, weight: torch.Tensor) -> bool:
    return choice("linear") == "auto" and cpu.unsupported(x, weight) is None


def _check(op: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    check_tensor(op, "x", x, (None, None))
    check_tensor(op, "weight", weight, (None, x.shape[1]), device=x.device)
    if bias is not None:
        check_tensor(op, "bias", bias, (weight.shape[0],), device=x.device)
