"""csrc's gradients of a linear layer's weight and bias on the CPU."""

from __future__ import annotations

import torch

from ijepa_fast.kernels.common import native

DTYPES = (torch.float32, torch.bfloat16)

_dweight = native.define("linear_dweight_cpu_(Tensor dy, Tensor x, Tensor(a!) dweight) -> ()")
_column_sums = native.define("column_sums_cpu_(Tensor x, Tensor(a!) sums) -> ()")


def unsupported(dy: torch.Tensor, x: torch.Tensor) -> str | None:
    """Why csrc cannot take these, or would be slower than PyTorch's product; None if it can and is not."""
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return "needs AVX2, without which PyTorch's product is faster"
    if x.dtype == torch.bfloat16:
        if native.loops() != "amx":
            return "needs AMX for bfloat16, without which PyTorch's product is faster"
        if dy.shape[1] % native.WIDTH:
            return f"takes outputs that are a multiple of {native.WIDTH} in bfloat16, got {dy.shape[1]}"
    return native.unsupported(DTYPES, x, dy)


def linear_dweight(dy: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """dy^T x: (T, O), (T, I) -> (O, I)."""
    out = x.new_empty(dy.shape[1], x.shape[1])
    _dweight(dy, x, out)
    return out


def column_sums(dy: torch.Tensor) -> torch.Tensor:
    """The sum of dy's rows: (T, O) -> (O,) in its dtype, added up in fp32."""
    sums = dy.new_empty(dy.shape[1])
    _column_sums(dy, sums)
    return sums
