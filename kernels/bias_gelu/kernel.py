"""Bias + exact GELU in Triton.

Forward: y = u * Phi(u), u = x + bias. Backward: dx = dy * (Phi(u) + u * phi(u)), dbias = sum over rows of dx, in one
pass over x and dy; u is computed again, so nothing but x is kept. The backward's programs hold a block of columns, loop
over their share of the rows and keep dbias in registers; each writes one partial row, which column_sum adds up.

Phi is exact to fp32 but cheap: for u >= 0, Phi(-u) = exp(-u^2/2) * p(t), t = 1 / (1 + 0.278 u), with p the minimax
polynomial of degree 6 for max |u| |error of Phi| (5e-9). The exponential is phi's, too, so the pair costs one
exponential and one reciprocal; libdevice's erf alone would bind these kernels by arithmetic.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ijepa_fast.kernels.common.aot import Case
from ijepa_fast.kernels.common.column_sum import column_sum
from ijepa_fast.kernels.common.launch import programs

FWD_ROWS, BWD_ROWS, COLUMNS, WARPS = 16, 8, 256, 4
BWD_STAGES = 3
BWD_PROGRAMS = 4  # per multiprocessor


@triton.jit
def _normal(u):
    """(Phi(u), phi(u)) of the standard normal distribution, fp32."""
    exponential = tl.exp(-0.5 * u * u)
    t = 1.0 / (1.0 + 0.278 * tl.abs(u))
    polynomial = 0.29669784748 + t * (-0.27688142763 + t * (0.41636395152 - t * 0.10995696076))
    polynomial = 0.11715561388 + t * (0.05662099037 + t * polynomial)
    tail = t * polynomial * exponential
    return tl.where(u >= 0, 1.0 - tail, tail), 0.3989422804 * exponential


@triton.jit(do_not_specialize=["T"])
def _bias_gelu_fwd_kernel(
    x_ptr,  # (T, F)
    bias_ptr,  # (F,)
    y_ptr,  # (T, F)
    T,
    F: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * ROWS
    rows = tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    in_columns = columns < F
    mask = (rows < T - first)[:, None] & in_columns[None, :]
    offsets = rows[:, None] * F + columns[None, :]
    bias = tl.load(bias_ptr + columns, mask=in_columns, other=0.0).to(tl.float32)
    u = tl.load(x_ptr + first * F + offsets, mask=mask, other=0.0).to(tl.float32) + bias[None, :]
    below, _density = _normal(u)
    tl.store(y_ptr + first * F + offsets, (u * below).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["T"])
def _bias_gelu_bwd_kernel(
    dy_ptr,  # (T, F)
    x_ptr,  # (T, F)
    bias_ptr,  # (F,)
    dx_ptr,  # (T, F)
    partial_ptr,  # (programs, F) fp32: dbias of each program's rows
    T,
    F: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    rows = tl.arange(0, ROWS)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    in_columns = columns < F
    offsets = rows[:, None] * F + columns[None, :]
    bias = tl.load(bias_ptr + columns, mask=in_columns, other=0.0).to(tl.float32)
    dbias = tl.zeros((ROWS, COLUMNS), tl.float32)
    for tile in tl.range(tl.program_id(1), tl.cdiv(T, ROWS), tl.num_programs(1), num_stages=STAGES):
        first = tl.cast(tile, tl.int64) * ROWS
        mask = (rows < T - first)[:, None] & in_columns[None, :]
        u = tl.load(x_ptr + first * F + offsets, mask=mask, other=0.0).to(tl.float32) + bias[None, :]
        dy = tl.load(dy_ptr + first * F + offsets, mask=mask, other=0.0).to(tl.float32)
        below, density = _normal(u)
        dx = dy * (below + u * density)
        tl.store(dx_ptr + first * F + offsets, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        dbias += dx
    partial = partial_ptr + tl.program_id(1).to(tl.int64) * F + columns
    tl.store(partial, tl.sum(dbias, 0), mask=in_columns)


def bias_gelu_fwd(x, bias):
    """gelu(x + bias): (T, F)."""
    tokens, width = x.shape
    y = torch.empty_like(x)
    # Row tiles are the grid's first axis: only that one may exceed 65,535.
    grid = (triton.cdiv(tokens, FWD_ROWS), triton.cdiv(width, COLUMNS))
    _bias_gelu_fwd_kernel[grid](x, bias, y, tokens, width, FWD_ROWS, COLUMNS, num_warps=WARPS)
    return y


def bias_gelu_bwd(dy, x, bias):
    """(dx (T, F), dbias (F,))."""
    tokens, width = x.shape
    dx = torch.empty_like(x)
    blocks = triton.cdiv(width, COLUMNS)
    count = triton.cdiv(programs(x.device, BWD_PROGRAMS), blocks)
    partial = torch.empty((count, width), dtype=torch.float32, device=x.device)
    _bias_gelu_bwd_kernel[(blocks, count)](
        dy, x, bias, dx, partial, tokens, width, BWD_ROWS, COLUMNS, BWD_STAGES, num_warps=WARPS
    )
    return dx, column_sum(partial, bias.dtype)


def aot_cases(capability: int = 9) -> list[Case]:
    """The MLPs of the predictor, S/16, H/14 and g/16."""
    cases = []
    for width in (1536, 5120, 6144):
        fwd = {"F": width, "COLUMNS": COLUMNS, "ROWS": FWD_ROWS}
        bwd = {"F": width, "COLUMNS": COLUMNS, "ROWS": BWD_ROWS, "STAGES": BWD_STAGES}
        cases.append(Case(f"bias_gelu_fwd F={width}", _bias_gelu_fwd_kernel, fwd, WARPS))
        cases.append(Case(f"bias_gelu_bwd F={width}", _bias_gelu_bwd_kernel, bwd, WARPS))
    return cases
