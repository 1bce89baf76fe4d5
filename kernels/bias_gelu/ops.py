"""bias_gelu: checks, dispatch, autograd and registration."""

from __future__ import annotations

import torch

from ijepa_fast.kernels.bias_gelu import cpu, native, reference
from ijepa_fast.kernels.common.checks import check_tensor
from ijepa_fast.kernels.common.dispatch import choice, runs_triton
from ijepa_fast.kernels.common.library import register


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
    if runs_triton("bias_gelu", x):
        return _BiasGelu.apply(x, bias, "triton")
    if choice("bias_gelu") == "auto" and native.unsupported(x, bias) is None:
        return _BiasGelu.apply(x, bias, "native")
    return reference.bias_gelu(x, bias)


# Of each of this project's implementations, where its functions are, named as the registered ops.
IMPLEMENTATIONS = {"triton": torch.ops.ijepa_fast, "native": native}


class _BiasGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, implementation):
        ctx.implementation = implementation
        ctx.save_for_backward(x, bias)
        return IMPLEMENTATIONS[implementation].bias_gelu_fwd(x, bias)

    @staticmethod
    def backward(ctx, dy):
        bwd = IMPLEMENTATIONS[ctx.implementation].bias_gelu_bwd
        return *bwd(dy.contiguous(), *ctx.saved_tensors), None


register(
    "bias_gelu_fwd(Tensor x, Tensor bias) -> Tensor",
    cpu,
    fake=lambda x, bias: torch.empty_like(x),
)
register(
    "bias_gelu_bwd(Tensor dy, Tensor x, Tensor bias) -> (Tensor dx, Tensor dbias)",
    cpu,
    fake=lambda dy, x, bias: (torch.empty_like(x), torch.empty_like(bias)),
)
