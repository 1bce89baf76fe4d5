"""Row gather with positions, and its two backward passes, in Triton.

Forward: out[t] = x[index[t]] (+ positions[index[t] % period]). Backward when no row is asked for twice: a store into
zeros. Backward with repeated rows: the index is sorted once, then each row of dx adds up its own copies in the order of
t, in fp32, and is written once; rows that nobody asked for get their zero in the same pass. No atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ijepa_fast.kernels.common.aot import Case

ROWS, COLUMNS, WARPS = 16, 256, 4


@triton.jit(do_not_specialize=["T", "R"])
def _gather_kernel(
    x_ptr,  # (R, D)
    index_ptr,  # (T,) int32
    positions_ptr,  # (N, D) or None
    out_ptr,  # (T, D)
    T,
    R,
    period,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    tokens = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    in_columns = (columns < D)[None, :]
    index = tl.load(index_ptr + tokens, mask=tokens < T, other=-1)
    valid = ((index >= 0) & (index < R))[:, None] & in_columns
    values = tl.load(x_ptr + index.to(tl.int64)[:, None] * D + columns[None, :], mask=valid, other=0.0)
    if positions_ptr is not None:
        offsets = (index % period)[:, None] * D + columns[None, :]
        values = values.to(tl.float32) + tl.load(positions_ptr + offsets, mask=valid, other=0.0).to(tl.float32)
    mask = (tokens < T)[:, None] & in_columns
    tl.store(out_ptr + tokens[:, None] * D + columns[None, :], values.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["T", "R"])
def _scatter_kernel(
    dy_ptr,  # (T, D)
    index_ptr,  # (T,) int32, no value twice
    dx_ptr,  # (R, D), zeros
    T,
    R,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    tokens = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    index = tl.load(index_ptr + tokens, mask=tokens < T, other=-1)
    valid = ((index >= 0) & (index < R))[:, None] & (columns < D)[None, :]
    values = tl.load(dy_ptr + tokens[:, None] * D + columns[None, :], mask=valid, other=0.0)
    offsets = index.to(tl.int64)[:, None] * D + columns[None, :]
    tl.store(dx_ptr + offsets, values.to(dx_ptr.dtype.element_ty), mask=valid)


@triton.jit
def _segment_sum_kernel(
    dy_ptr,  # (T, D)
    order_ptr,  # (T,) int64: the tokens, those of row 0 first
    start_ptr,  # (R + 1,) int32: where a row's tokens start in order
    dx_ptr,  # (R, D)
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    in_columns = columns < D
    total = tl.zeros((COLUMNS,), tl.float32)
    for i in range(tl.load(start_ptr + row), tl.load(start_ptr + row + 1)):
        token = tl.load(order_ptr + i)
        total += tl.load(dy_ptr + token * D + columns, mask=in_columns, other=0.0).to(tl.float32)
    tl.store(dx_ptr + row * D + columns, total.to(dx_ptr.dtype.element_ty), mask=in_columns)


def _columns(width: int) -> int:
    return min(COLUMNS, triton.next_power_of_2(width))


def masked_gather_fwd(x, index, positions, period):
    """x[index] (+ positions[index % period]): (T, D)."""
    tokens, width = index.shape[0], x.shape[1]
    out = x.new_empty(tokens, width)
    columns = _columns(width)
    grid = (triton.cdiv(tokens, ROWS), triton.cdiv(width, columns))
    _gather_kernel[grid](x, index, positions, out, tokens, x.shape[0], period, width, ROWS, columns, num_warps=WARPS)
    return out


def masked_gather_bwd(dy, index, rows, unique, dtype):
    """Sum of dy's rows by index: (rows, D) of `dtype`; `unique`: there is at most one of each."""
    tokens, width = dy.shape
    columns = _columns(width)
    blocks = triton.cdiv(width, columns)
    if unique:
        dx = torch.zeros((rows, width), dtype=dtype, device=dy.device)
        grid = (triton.cdiv(tokens, ROWS), blocks)
        _scatter_kernel[grid](dy, index, dx, tokens, rows, width, ROWS, columns, num_warps=WARPS)
        return dx
    dx = torch.empty((rows, width), dtype=dtype, device=dy.device)
    by_row, order = torch.sort(index, stable=True)
    start = torch.searchsorted(by_row, torch.arange(rows + 1, dtype=torch.int32, device=dy.device), out_int32=True)
    _segment_sum_kernel[(rows, blocks)](dy, order, start, dx, width, columns, num_warps=1)
    return dx


def aot_cases(capability: int = 9) -> list[Case]:
    """Tokens of the encoders, patches of /14, the predictor's width with positions."""
    types = {"order_ptr": "*i64", "start_ptr": "*i32", "period": "i32:16"}
    cases = []
    for width, positions in ((592, False), (384, True), (1280, False), (1408, True)):
        whole = {"D": width, "COLUMNS": _columns(width)}
        tile = {**whole, "ROWS": ROWS}
        absent = {} if positions else {"positions_ptr": None, "period": 1}
        name = f"masked_gather_fwd D={width}{' +positions' if positions else ''}"
        cases.append(Case(name, _gather_kernel, tile | absent, WARPS, types=types))
        cases.append(Case(f"masked_gather_bwd unique D={width}", _scatter_kernel, tile, WARPS))
        cases.append(Case(f"masked_gather_bwd repeated D={width}", _segment_sum_kernel, whole, warps=1, types=types))
    return cases
