"""Sum of the partial results that the programs of a persistent grid left in a workspace: deterministic, no atomics."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ijepa_fast.kernels.common.aot import Case

ROWS = 64
BLOCK = 32


@triton.jit(do_not_specialize=["R"])
def _column_sum_kernel(
    partial_ptr,  # (R, C) fp32
    out_ptr,  # (C,)
    R,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    rows = tl.arange(0, ROWS)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, R, ROWS):
        mask = (start + rows < R)[:, None] & (columns < C)[None, :]
        total += tl.load(partial_ptr + (start + rows)[:, None] * C + columns[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + columns, tl.sum(total, 0).to(out_ptr.dtype.element_ty), mask=columns < C)


def column_sum(partial: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Sum over the first dimension of a contiguous fp32 tensor (R, ...), rounded once to `dtype`."""
    out = torch.empty(partial.shape[1:], dtype=dtype, device=partial.device)
    grid = (triton.cdiv(out.numel(), BLOCK),)
    _column_sum_kernel[grid](partial, out, partial.shape[0], out.numel(), ROWS, BLOCK, num_warps=4)
    return out


def aot_cases(capability: int = 9) -> list[Case]:
    """dgamma and dbeta at D = 384 and 1280."""
    return [
        Case(f"column_sum C={columns}", _column_sum_kernel, {"C": columns, "ROWS": ROWS, "BLOCK": BLOCK}, warps=4)
        for columns in (2 * 384, 2 * 1280)
    ]
