"""Products on the CPU: oneDNN's, with bias and GELU in their epilogue, and csrc's for the weight's gradient.

PyTorch gives fp32 products to MKL and adds a pass over the result for the bias. On AMD cores with AVX-512, MKL reaches
40 % (Zen 5) to 85-90 % (Zen 4) of the peak and oneDNN up to all of it. For the weight's gradient oneDNN wants one
operand transposed in memory, which costs much of what it gains; csrc's loops take both as they lie. In bf16 PyTorch has
oneDNN's products, too, but fills the result with the bias before: 1.0 to 2.2 times the time (Xeon with AMX, all shapes
of S/16 and of the quickstart).
"""

from __future__ import annotations

import functools
import os
import warnings
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ijepa_fast.kernels.common.native import unsupported as unsupported_by_csrc
from ijepa_fast.kernels.linear import native

DTYPES = (torch.float32, torch.bfloat16)

# oneDNN compiles a product for every number of rows, in 1 to 2 ms, and keeps the last 1,024. Token counts vary by step,
# so that small models want more: the quickstart's step took 110 ms in place of 45. Read at oneDNN's first product.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "4096")

# TorchInductor's op for a linear layer: (x, weight, bias, activation, its scalars, its algorithm). Looked up once and
# here, as torch.compile cannot trace it.
_product: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None


def unsupported(x: torch.Tensor, weight: torch.Tensor) -> str | None:
    """Why oneDNN cannot compute `linear` of these, or None if it can."""
    if x.device.type != "cpu":
        return f"needs CPU tensors, got one on {x.device}"
    if torch.compiler.is_compiling():
        return "is not for torch.compile: TorchInductor chooses, and takes this op with constant weights only"
    if _product is None:
        return "needs a PyTorch with oneDNN's linear layer"
    if x.dtype not in DTYPES or weight.dtype != x.dtype:
        return f"takes x and weight of one dtype of {DTYPES}, got {x.dtype} and {weight.dtype}"
    if x.numel() == 0:
        return "takes no empty tensors"
    if torch.is_autocast_enabled("cpu"):
        return "does not know autocast"
    if x.dtype == torch.bfloat16 and not _has_bf16():
        return "needs a oneDNN that has bfloat16 products for this processor"
    return None


@functools.cache
def _has_bf16() -> bool:
    """Whether oneDNN has a bf16 product for this processor. It has none for some; that is warned of, once."""
    x = torch.zeros(1, 16, dtype=torch.bfloat16)
    try:
        _product(x, x, None, "none", [], "")
    except RuntimeError as error:
        warnings.warn(
            f"ijepa_fast: oneDNN has no bfloat16 product for this processor ({str(error).split('. ')[0]}), so "
            "PyTorch's own runs; fp32 is likely to be faster",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True


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
        return dx, dweight, _dbias(dy) if ctx.needs_input_grad[2] else None


def _dweight(dy, x):
    """dy^T x: (T, O), (T, I) -> (O, I)."""
    x = x.contiguous()
    return native.linear_dweight(dy, x) if native.unsupported(dy, x) is None else dy.t() @ x


def _dbias(dy):
    """The sum of dy's rows: (T, O) -> (O,)."""
    csrc = unsupported_by_csrc((torch.bfloat16,), dy) is None
    return native.column_sums(dy) if csrc else dy.sum(0)
