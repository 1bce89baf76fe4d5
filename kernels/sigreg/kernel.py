"""SIGReg in Triton: sums of cosines and sines over the samples, and the gradient; no samples x directions x knots.

x (V, N, K) is what N samples of V views are along K directions; C = V*K columns.
    sums[0, j, c] = sum over n of cos(j step x)          sums[1, j, c] = sum over n of sin(j step x)
    dx = sum over j of factors[0, j, c] cos(j step x) + factors[1, j, c] sin(j step x)
A knot's angle is the last one's, turned by step x: one cosine and one sine a value, then four products a knot.
Each program of the sums takes a tile and writes a partial sum for every column and knot; column_sum adds them up.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ijepa_fast.kernels.common.aot import Case
from ijepa_fast.kernels.common.column_sum import column_sum

ROWS, BLOCK, WARPS = 128, 32, 8


@triton.jit
def _cos_sin(angle):
    """Cosine and sine, fp32, to a unit or two: Triton's own take a stack for the largest angles, which none here is.

    Reduced to an eighth of a turn by pi / 2 in three parts, then the minimax polynomials of Cephes.
    """
    quarters = tl.floor(angle * 0.6366197723675814 + 0.5)
    r = angle - quarters * 1.5703125
    r = r - quarters * 4.837512969970703125e-4
    r = r - quarters * 7.54978995489188216e-8
    z = r * r
    sin = r + r * z * (-1.6666654611e-1 + z * (8.3321608736e-3 + z * -1.9515295891e-4))
    cos = 1.0 - 0.5 * z + z * z * (4.166664568298827e-2 + z * (-1.388731625493765e-3 + z * 2.443315711809948e-5))
    quarter = quarters.to(tl.int32) & 3
    swapped = (quarter & 1) == 1
    of_cos, of_sin = tl.where(swapped, sin, cos), tl.where(swapped, cos, sin)
    negative = (quarter == 1) | (quarter == 2)
    return tl.where(negative, -of_cos, of_cos), tl.where(quarter >= 2, -of_sin, of_sin)


@triton.jit(do_not_specialize=["N", "K", "points"])
def _sigreg_sums_kernel(
    x_ptr,  # (V, N, K) fp32
    partial_ptr,  # (tiles of N, 2, points, V, K) fp32
    N,
    K,
    V,
    step,
    points,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    view, tile = tl.program_id(1), tl.program_id(2)
    rows = tile * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    in_rows, in_columns = rows < N, columns < K
    mask = in_rows[:, None] & in_columns[None, :]
    first = tl.cast(view, tl.int64) * N * K
    turn = tl.load(x_ptr + first + rows[:, None] * K + columns[None, :], mask=mask, other=0.0) * step
    by_cos, by_sin = _cos_sin(turn)
    cos = tl.where(mask, 1.0, 0.0)
    sin = tl.zeros((ROWS, BLOCK), tl.float32)
    out = partial_ptr + (tl.cast(tile, tl.int64) * 2 * points * V + view) * K + columns
    for _ in range(points):
        tl.store(out, tl.sum(cos, 0), mask=in_columns)
        tl.store(out + points * V * K, tl.sum(sin, 0), mask=in_columns)
        turned = cos * by_cos - sin * by_sin
        sin = sin * by_cos + cos * by_sin
        cos = turned
        out += V * K


@triton.jit(do_not_specialize=["N", "K", "points"])
def _sigreg_bwd_kernel(
    x_ptr,  # (V, N, K) fp32
    factors_ptr,  # (2, points, V, K) fp32
    gradient_ptr,  # (V, N, K) fp32
    N,
    K,
    V,
    step,
    points,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    view = tl.program_id(1)
    rows = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    in_columns = columns < K
    mask = (rows < N)[:, None] & in_columns[None, :]
    places = tl.cast(view, tl.int64) * N * K + rows[:, None] * K + columns[None, :]
    turn = tl.load(x_ptr + places, mask=mask, other=0.0) * step
    by_cos, by_sin = _cos_sin(turn)
    cos = tl.full((ROWS, BLOCK), 1.0, tl.float32)
    sin = tl.zeros((ROWS, BLOCK), tl.float32)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    factors = factors_ptr + view * K + columns
    for _ in range(points):
        of_cos = tl.load(factors, mask=in_columns, other=0.0)
        of_sin = tl.load(factors + points * V * K, mask=in_columns, other=0.0)
        total += of_cos[None, :] * cos + of_sin[None, :] * sin
        turned = cos * by_cos - sin * by_sin
        sin = sin * by_cos + cos * by_sin
        cos = turned
        factors += V * K
    tl.store(gradient_ptr + places, total, mask=mask)


def _grid(x):
    views, samples, count = x.shape
    return triton.cdiv(count, BLOCK), views, triton.cdiv(samples, ROWS)


def sigreg_sums(x, step, points):
    """(2, T, V, K) fp32, see the formula above."""
    views, samples, count = x.shape
    grid = _grid(x)
    partial = torch.empty((grid[2], 2, points, views, count), dtype=torch.float32, device=x.device)
    _sigreg_sums_kernel[grid](x, partial, samples, count, views, step, points, ROWS, BLOCK, num_warps=WARPS)
    return column_sum(partial, torch.float32)


def sigreg_bwd(x, factors, step):
    """(V, N, K) fp32, see the formula above."""
    views, samples, count = x.shape
    gradient = torch.empty_like(x)
    arguments = x, factors, gradient, samples, count, views, step, factors.shape[1]
    _sigreg_bwd_kernel[_grid(x)](*arguments, ROWS, BLOCK, num_warps=WARPS)
    return gradient


def aot_cases(capability: int = 9) -> list[Case]:
    """One case a kernel: no size is a constant."""
    constants = {"ROWS": ROWS, "BLOCK": BLOCK}
    types = {"x_ptr": "*fp32", "factors_ptr": "*fp32", "gradient_ptr": "*fp32", "step": "fp32"}
    return [
        Case("sigreg sums", _sigreg_sums_kernel, constants, WARPS, types=types),
        Case("sigreg backward", _sigreg_bwd_kernel, constants, WARPS, types=types),
    ]
