"""The I-JEPA loss in Triton: affine-free LayerNorm, gather, loss and its gradient in one pass.

Per row r, with f = features[index[r]], first (f - mean[place]) * factor[place] where there is a table:
    t = (f - mean(f)) * rstd(f), or f  e = predictions[r] - t
    loss += w[r] l(e)                  gradient[r] = w[r] l'(e) / (R*D)      w[r] is 1 where there are no weights
The normalised and the gathered features never reach memory. Programs loop over their share of the rows and write one
partial sum each; column_sum adds them in a fixed order, so the result is deterministic.

The gradient is for an upstream gradient of one. The backward's kernel multiplies it in place by the upstream gradient,
which it reads on the device, and leaves at once when that is one: no pass over memory then, and no wait for the host.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ijepa_fast.kernels.common.aot import Case
from ijepa_fast.kernels.common.column_sum import column_sum
from ijepa_fast.kernels.common.launch import programs, row_tile

TILE, WARPS, STAGES = 4096, 8, 3
TABLE_WARPS, TABLE_STAGES = 16, 2  # with a table of places, whose rows are held too
PROGRAMS = 4  # per multiprocessor
SCALE_BLOCK = 8192


@triton.jit(do_not_specialize=["R"])
def _target_loss_fwd_kernel(
    predictions_ptr,  # (R, D)
    features_ptr,  # (V, D)
    index_ptr,  # (R,) int32
    gradient_ptr,  # (R, D), predictions' dtype, or fp32 for fp16 ones
    partial_ptr,  # (programs,) fp32
    table_ptr,  # (2, P, D) fp32, or None
    places_ptr,  # (V,) int32, or None: row 0
    weights_ptr,  # (R,) fp32, or None
    R,
    P,
    eps,
    inverse_count,  # 1 / (R*D)
    D: tl.constexpr,
    SMOOTH_L1: tl.constexpr,
    TOKEN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_D)
    in_columns = columns < D
    total = tl.zeros((ROWS, BLOCK_D), tl.float32)

    for tile in tl.range(tl.program_id(0), tl.cdiv(R, ROWS), tl.num_programs(0), num_stages=STAGES):
        first = tl.cast(tile, tl.int64) * ROWS
        in_rows = rows < R - first
        mask = in_rows[:, None] & in_columns[None, :]
        offsets = first * D + rows[:, None] * D + columns[None, :]
        source = tl.load(index_ptr + first + rows, mask=in_rows, other=0).to(tl.int64)
        f = tl.load(features_ptr + source[:, None] * D + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        y = tl.load(predictions_ptr + offsets, mask=mask, other=0.0).to(tl.float32)

        if table_ptr is not None:
            place = tl.zeros((ROWS,), tl.int64)
            if places_ptr is not None:
                place = tl.load(places_ptr + source, mask=in_rows, other=0).to(tl.int64)
            entries = table_ptr + place[:, None] * D + columns[None, :]
            f = f - tl.load(entries, mask=mask, other=0.0)
            f = f * tl.load(entries + tl.cast(P, tl.int64) * D, mask=mask, other=0.0)
        # Outside the mask both terms of e are zero, and with them loss and gradient.
        if TOKEN:
            mean = tl.sum(f, 1) / D
            centred = tl.where(in_columns[None, :], f - mean[:, None], 0.0)
            rstd = tl.rsqrt(tl.sum(centred * centred, 1) / D + eps)
            e = y - centred * rstd[:, None]
        else:
            e = y - f
        if SMOOTH_L1:
            size = tl.abs(e)
            loss = tl.where(size < 1.0, 0.5 * e * e, size - 0.5)
            gradient = tl.minimum(tl.maximum(e, -1.0), 1.0)
        else:
            loss = e * e
            gradient = 2.0 * e
        if weights_ptr is not None:
            weight = tl.load(weights_ptr + first + rows, mask=in_rows, other=0.0)[:, None]
            loss = loss * weight
            gradient = gradient * weight
        total += loss
        tl.store(gradient_ptr + offsets, (gradient * inverse_count).to(gradient_ptr.dtype.element_ty), mask=mask)

    tl.store(partial_ptr + tl.program_id(0), tl.sum(total) * inverse_count)


@triton.jit(do_not_specialize=["R"])
def _target_loss_scale_kernel(
    gradient_ptr,  # (R, D), changed in place
    upstream_ptr,  # (1,)
    R,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    upstream = tl.load(upstream_ptr).to(tl.float32)
    if upstream == 1.0:
        return
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < tl.cast(R, tl.int64) * D
    gradient = tl.load(gradient_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(gradient_ptr + offsets, (gradient * upstream).to(gradient_ptr.dtype.element_ty), mask=mask)


def target_loss_fwd(predictions, features, index, kind, eps, table=None, places=None, token=True, weights=None):
    """(loss () fp32, its gradient (R, D) in predictions' dtype, or in fp32, whose range fp16 lacks)."""
    rows, width = predictions.shape
    dtype = torch.float32 if predictions.dtype == torch.float16 else predictions.dtype
    gradient = torch.empty_like(predictions, dtype=dtype)
    count = programs(predictions.device, PROGRAMS)
    partial = torch.empty((count, 1), dtype=torch.float32, device=predictions.device)
    _target_loss_fwd_kernel[(count,)](
        predictions,
        features,
        index,
        gradient,
        partial,
        None if table is None else table.float(),
        places,
        weights,
        rows,
        1 if table is None else table.shape[1],
        eps,
        1.0 / (rows * width),
        width,
        kind == "smooth_l1",
        token,
        **row_tile(width, TILE),
        STAGES=STAGES if table is None else TABLE_STAGES,
        num_warps=WARPS if table is None else TABLE_WARPS,
    )
    return column_sum(partial, torch.float32).view(()), gradient


def target_loss_scale_(gradient, upstream):
    """Multiply `gradient` by the scalar tensor `upstream` in place."""
    rows, width = gradient.shape
    grid = (triton.cdiv(rows * width, SCALE_BLOCK),)
    _target_loss_scale_kernel[grid](gradient, upstream, rows, width, SCALE_BLOCK, num_warps=8)


def aot_cases(capability: int = 9) -> list[Case]:
    """The encoders' widths, both losses; other norms at one width."""
    cases, types = [], {"inverse_count": "fp32", "table_ptr": "*fp32", "places_ptr": "*i32", "weights_ptr": "*fp32"}
    without = {"table_ptr": None, "places_ptr": None, "TOKEN": True, "STAGES": STAGES}
    norms = {"": without, " places": {"TOKEN": False}, " places, then tokens": {"TOKEN": True}}
    norms |= {" batch": {"places_ptr": None, "TOKEN": False}}
    norms = {norm: {"STAGES": TABLE_STAGES} | more for norm, more in norms.items()}
    kinds = {"": {"weights_ptr": None}, " weighted": {}}
    norms = {norm + kind: more | given for kind, given in kinds.items() for norm, more in norms.items()}
    for width in (384, 768, 1024, 1280, 1408):
        for smooth in (False, True):
            sizes = {"D": width, "SMOOTH_L1": smooth, **row_tile(width, TILE)}
            name = f"target_loss {'smooth_l1' if smooth else 'l2'} D={width}"
            chosen = norms if width == 1280 else {"": norms[""]}
            cases += [
                Case(
                    name + norm,
                    _target_loss_fwd_kernel,
                    sizes | more,
                    WARPS if "table_ptr" in more else TABLE_WARPS,
                    types=types,
                )
                for norm, more in chosen.items()
            ]
    constants, types = {"D": 1280, "BLOCK": SCALE_BLOCK}, {"upstream_ptr": "*fp32"}
    cases.append(Case("target_loss scale D=1280", _target_loss_scale_kernel, constants, warps=8, types=types))
    return cases
