"""bias_gelu: checks, dispatch, autograd and registration."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ijepa_fast.kernels.bias_gelu import native, reference
from ijepa_fast.kernels.common.checks import check_tensor
from ijepa_fast.kernels.common.dispatch import runs_triton
from ijepa_fast.kernels.common.library import register
from ijepa_fast.kernels.common.native import runs_loops


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
    if bias.dtype == x.dtype and runs_loops("bias_gelu", x):
        return _BiasGelu.apply(x, bias, "native")
    return reference.bias_gelu(x, bias)


class _BiasGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, kernels):
        ctx.kernels = kernels
        ctx.save_for_backward(x, bias)
        return _KERNELS[kernels][0](x, bias)

    @staticmethod
    def backward(ctx, dy):
        return *_KERNELS[ctx.kernels][1](dy.contiguous(), *ctx.saved_tensors), None


def _bwd_cpu(dy, x, bias):
    dx = torch.ops.aten.gelu_backward(dy.float(), x.float() + bias.float())
    return dx.to(x.dtype), dx.sum(0).to(bias.dtype)


_fwd = register(
    "bias_gelu_fwd(Tensor x, Tensor bias) -> Tensor",
    folder="bias_gelu",
    cpu=lambda x, bias: F.gelu(x.float() + bias.float()).to(x.dtype),
    fake=lambda x, bias: torch.empty_like(x),
)
_bwd = register(
    "bias_gelu_bwd(Tensor dy, Tensor x, Tensor bias) -> (Tensor dx, Tensor dbias)",
    folder="bias_gelu",
    cpu=_bwd_cpu,
    fake=lambda dy, x, bias: (torch.empty_like(x), torch.empty_like(bias)),
)
_KERNELS = {"triton": (_fwd, _bwd), "native": (native.bias_gelu_fwd, native.bias_gelu_bwd)}
