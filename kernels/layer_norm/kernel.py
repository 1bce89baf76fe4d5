"""Residual add + LayerNorm in Triton.

Forward, per row: s = x + residual, y = (s - mean) * rstd * weight + bias; x and residual are read once, s and y written
once. Backward, per row, with xhat = (s - mean) * rstd and g = dy * weight:
    dx = rstd * (g - mean(g) - xhat * mean(g * xhat)) + ds
    dweight = sum over rows of dy * xhat, dbias = sum over rows of dy
The backward's programs loop over their share of the rows and keep dweight and dbias in registers; each writes one
partial row, which column_sum adds up in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ijepa_fast.kernels.common.aot import Case
from ijepa_fast.kernels.common.column_sum import column_sum
from ijepa_fast.kernels.common.launch import programs, row_tile

FWD_TILE, FWD_WARPS = 4096, 4
BWD_TILE, BWD_WARPS, BWD_STAGES = 4096, 8, 3
BWD_PROGRAMS = 2  # per multiprocessor


@triton.jit(do_not_specialize=["T"])
def _layer_norm_fwd_kernel(
    x_ptr,  # (T, D)
    residual_ptr,  # (T, D) or None
    weight_ptr,  # (D,)
    bias_ptr,  # (D,)
    y_ptr,  # (T, D)
    sum_ptr,  # (T, D) or None: x + residual
    mean_ptr,  # (T,) fp32
    rstd_ptr,  # (T,) fp32
    T,
    eps,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * ROWS
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_D)
    in_rows = rows < T - first
    in_columns = columns < D
    mask = in_rows[:, None] & in_columns[None, :]
    offsets = rows[:, None] * D + columns[None, :]

    s = tl.load(x_ptr + first * D + offsets, mask=mask, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        s += tl.load(residual_ptr + first * D + offsets, mask=mask, other=0.0).to(tl.float32)
        rounded = s.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + first * D + offsets, rounded, mask=mask)
        # The statistics are those of the sum as the backward will read it.
        s = rounded.to(tl.float32)

    mean = tl.sum(s, 1) / D
    centred = tl.where(in_columns[None, :], s - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / D + eps)
    weight = tl.load(weight_ptr + columns, mask=in_columns, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + columns, mask=in_columns, other=0.0).to(tl.float32)
    y = centred * rstd[:, None] * weight[None, :] + bias[None, :]
    tl.store(y_ptr + first * D + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(mean_ptr + first + rows, mean, mask=in_rows)
    tl.store(rstd_ptr + first + rows, rstd, mask=in_rows)


@triton.jit(do_not_specialize=["T"])
def _layer_norm_bwd_kernel(
    dy_ptr,  # (T, D)
    ds_ptr,  # (T, D) or None: upstream gradient of the sum
    s_ptr,  # (T, D)
    weight_ptr,  # (D,)
    mean_ptr,  # (T,) fp32
    rstd_ptr,  # (T,) fp32
    dx_ptr,  # (T, D)
    partial_ptr,  # (programs, 2, D) fp32: dweight and dbias of each program's rows
    T,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_D)
    in_columns = columns < D
    offsets = rows[:, None] * D + columns[None, :]
    weight = tl.load(weight_ptr + columns, mask=in_columns, other=0.0).to(tl.float32)
    dweight = tl.zeros((ROWS, BLOCK_D), tl.float32)
    dbias = tl.zeros((ROWS, BLOCK_D), tl.float32)

    for tile in tl.range(tl.program_id(0), tl.cdiv(T, ROWS), tl.num_programs(0), num_stages=STAGES):
        first = tl.cast(tile, tl.int64) * ROWS
        in_rows = rows < T - first
        mask = in_rows[:, None] & in_columns[None, :]
        s = tl.load(s_ptr + first * D + offsets, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + first * D + offsets, mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + first + rows, mask=in_rows, other=0.0)
        rstd = tl.load(rstd_ptr + first + rows, mask=in_rows, other=0.0)

        # Outside the mask dy is zero, and with it every term below.
        xhat = (s - mean[:, None]) * rstd[:, None]
        g = dy * weight[None, :]
        mean_g = tl.sum(g, 1) / D
        mean_gx = tl.sum(g * xhat, 1) / D
        dx = (g - mean_g[:, None] - xhat * mean_gx[:, None]) * rstd[:, None]
        if ds_ptr is not None:
            dx += tl.load(ds_ptr + first * D + offsets, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + first * D + offsets, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        dweight += dy * xhat
        dbias += dy

    partial = partial_ptr + tl.program_id(0).to(tl.int64) * 2 * D + columns
    tl.store(partial, tl.sum(dweight, 0), mask=in_columns)
    tl.store(partial + D, tl.sum(dbias, 0), mask=in_columns)


def add_layer_norm_fwd(x, residual, weight, bias, eps):
    """(y, s, mean, rstd) of LN(s), s = x + residual; with residual None s is None."""
    tokens, width = x.shape
    y = torch.empty_like(x)
    total = None if residual is None else torch.empty_like(x)
    mean, rstd = (torch.empty(tokens, dtype=torch.float32, device=x.device) for _ in range(2))
    tile = row_tile(width, FWD_TILE)
    grid = (triton.cdiv(tokens, tile["ROWS"]),)
    _layer_norm_fwd_kernel[grid](
        x, residual, weight, bias, y, total, mean, rstd, tokens, eps, width, **tile, num_warps=FWD_WARPS
    )
    return y, total, mean, rstd


def layer_norm_fwd(x, weight, bias, eps):
    """(y, mean, rstd) of LN(x)."""
    y, _, mean, rstd = add_layer_norm_fwd(x, None, weight, bias, eps)
    return y, mean, rstd


def layer_norm_bwd(dy, ds, s, weight, mean, rstd):
    """(dx, dparameters): dx (T, D); dparameters (2, D), the gradients of weight and bias."""
    tokens, width = s.shape
    dx = torch.empty_like(s)
    tile = row_tile(width, BWD_TILE)
    count = programs(s.device, BWD_PROGRAMS)
    partial = torch.empty((count, 2, width), dtype=torch.float32, device=s.device)
    _layer_norm_bwd_kernel[(count,)](
        dy, ds, s, weight, mean, rstd, dx, partial, tokens, width, **tile, STAGES=BWD_STAGES, num_warps=BWD_WARPS
    )
    return dx, column_sum(partial, weight.dtype)


def aot_cases(capability: int = 9) -> list[Case]:
    """The encoders' and the predictor's widths, with and without the residual."""
    cases = []
    for width in (384, 768, 1024, 1280, 1408):
        fwd = {"D": width, **row_tile(width, FWD_TILE)}
        bwd = {"D": width, **row_tile(width, BWD_TILE), "STAGES": BWD_STAGES}
        for with_residual, fwd_absent, bwd_absent in (
            ("", {"residual_ptr": None, "sum_ptr": None}, {"ds_ptr": None}),
            (" +residual", {}, {}),
        ):
            name = f"D={width}{with_residual}"
            cases.append(Case(f"layer_norm_fwd {name}", _layer_norm_fwd_kernel, fwd | fwd_absent, FWD_WARPS))
            cases.append(Case(f"layer_norm_bwd {name}", _layer_norm_bwd_kernel, bwd | bwd_absent, BWD_WARPS))
    return cases
