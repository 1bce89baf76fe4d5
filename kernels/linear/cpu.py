"""Products on the CPU: oneDNN's, with bias and GELU in their epilogue, and csrc's for the weight's gradient.

PyTorch gives fp32 products to MKL and adds a pass over the result for the bias. On AMD cores with AVX-512, MKL reaches
40 % (Zen 5) to 85-90 % (Zen 4) of the peak and oneDNN up to all of it. For the weight's gradient oneDNN wants one
operand transposed in memory, which costs much of what it gains; csrc's loops take both as they lie.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from ijepa_fast.kernels.linear import native

DTYPES = (torch.float32,)

# TorchInductor's op for a linear layer: (x, weight, bias, activation, its scalars, its algorithm). Looked up once and
# here, as torch.compile cannot trace it.
_product = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None


def unsupported(x: torch.Tensor, weight: torch.Tensor) -> str | None:
    """Why oneDNN cannot compute `linear` of these, or None if it can."""
    if x.device.type != "cpu":
        return f"needs CPU tensors, got one on {x.device}"
    if torch.compiler.is_compiling():
        return "is not for torch.compile: TorchInductor chooses, and takes this op with constant weights only"
    if _product is None:
        return "needs a PyTorch with oneDNN's linear layer"
    if x.dtype not in DTYPES or weight.dtype != x.dtype:
        return f"takes x and weight of one dtype, {DTYPES}, got {x.dtype} and {weight.dtype}"
    if x.numel() == 0:
        return "takes no empty tensors"
    if torch.is_autocast_enabled("cpu"):
        return "does not know autocast"
    return None


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """As `reference.linear`."""
    return _Linear.apply(x, weight, bias)


def linear_gelu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """As `reference.linear_gelu`, GELU being part of the product; it has no gradient."""
    return _product(x, weight, bias, "gelu", [], "none")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias, "none", [], "")

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        dy = dy.contiguous()
        dx = _product(dy, weight.t(), None, "none", [], "") if ctx.needs_input_grad[0] else None
        dweight = _dweight(dy, x) if ctx.needs_input_grad[1] else None
        return dx, dweight, dy.sum(0) if ctx.needs_input_grad[2] else None


def _dweight(dy, x):
    """dy^T x: (T, O), (T, I) -> (O, I)."""
    x = x.contiguous()
    return native.linear_dweight(dy, x) if native.unsupported(dy, x) is None else dy.t() @ x
