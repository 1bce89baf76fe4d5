"""AdamW, the EMA of the parameters and their low-precision copies in Triton, in place: one buffer or a list.

    m = m + (1 - beta1) (g - m)            v = beta2 v + (1 - beta2) g^2
    p = decay p - step_size m / (sqrt(v) / correction2 + eps)
    ema = momentum ema + (1 - momentum) p
Gradient, parameter, moments and EMA are read once; all but the gradient, and the copies, are written once: 38 bytes
per parameter with a bf16 gradient and two bf16 copies.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ijepa_fast.kernels.common.aot import Case

BLOCK, WARPS = 1024, 4
CHUNK = 8192  # elements of one program where all tensors are one launch
TABLES = 8  # of pointers, kept on the device: gradients that lie elsewhere in every step need a new one each time

_tables: dict[tuple, list[tuple]] = {}


@triton.jit
def _read(scalars_ptr):
    """(9,) fp64 -> the nine arguments, fp32."""
    decay = tl.load(scalars_ptr).to(tl.float32)
    gain1 = tl.load(scalars_ptr + 1).to(tl.float32)
    beta2 = tl.load(scalars_ptr + 2).to(tl.float32)
    gain2 = tl.load(scalars_ptr + 3).to(tl.float32)
    step_size = tl.load(scalars_ptr + 4).to(tl.float32)
    correction2 = tl.load(scalars_ptr + 5).to(tl.float32)
    eps = tl.load(scalars_ptr + 6).to(tl.float32)
    momentum = tl.load(scalars_ptr + 7).to(tl.float32)
    gain_ema = tl.load(scalars_ptr + 8).to(tl.float32)
    return decay, gain1, beta2, gain2, step_size, correction2, eps, momentum, gain_ema


@triton.jit
def _adamw(
    param_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, i, mask, decay, gain1, beta2, gain2, step_size, correction2, eps
):
    """The elements `i` of weights and moments, in place -> the new weights."""
    g = tl.load(grad_ptr + i, mask=mask, other=0.0).to(tl.float32)
    p = tl.load(param_ptr + i, mask=mask, other=0.0)
    m = tl.load(exp_avg_ptr + i, mask=mask, other=0.0)
    v = tl.load(exp_avg_sq_ptr + i, mask=mask, other=0.0)
    m += gain1 * (g - m)
    v = beta2 * v + gain2 * g * g
    denominator = tl.div_rn(tl.sqrt_rn(v), tl.zeros_like(v) + correction2) + eps
    p = decay * p - step_size * tl.div_rn(m, denominator)
    tl.store(param_ptr + i, p, mask=mask)
    tl.store(exp_avg_ptr + i, m, mask=mask)
    tl.store(exp_avg_sq_ptr + i, v, mask=mask)
    return p


# `n` is specialised on, unlike a token count: it is a constant of the run, and wide accesses want it divisible by 16.
@triton.jit
def _adamw_ema_kernel(
    param_ptr,  # (n,) fp32, changed in place, as the next three
    grad_ptr,  # (n,) fp32 or bf16
    exp_avg_ptr,  # (n,) fp32
    exp_avg_sq_ptr,  # (n,) fp32
    ema_ptr,  # (n,) fp32 or None
    param_out_ptr,  # (n,) fp32, bf16 or None
    ema_out_ptr,  # (n,) fp32, bf16 or None
    scalars_ptr,  # (9,) fp64 on the device in place of the nine arguments that follow, or None
    decay,
    gain1,
    beta2,
    gain2,
    step_size,
    correction2,
    eps,
    momentum,
    gain_ema,
    n,
    BLOCK: tl.constexpr,
):
    if scalars_ptr is not None:
        decay, gain1, beta2, gain2, step_size, correction2, eps, momentum, gain_ema = _read(scalars_ptr)
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    p = _adamw(
        param_ptr,
        grad_ptr,
        exp_avg_ptr,
        exp_avg_sq_ptr,
        i,
        mask,
        decay,
        gain1,
        beta2,
        gain2,
        step_size,
        correction2,
        eps,
    )
    if param_out_ptr is not None:
        tl.store(param_out_ptr + i, p.to(param_out_ptr.dtype.element_ty), mask=mask)
    if ema_ptr is not None:
        ema = momentum * tl.load(ema_ptr + i, mask=mask, other=0.0) + gain_ema * p
        tl.store(ema_ptr + i, ema, mask=mask)
        if ema_out_ptr is not None:
            tl.store(ema_out_ptr + i, ema.to(ema_out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _adamw_ema_groups_kernel(
    table_ptr,  # (n, 9) int64: see _tables_of
    chunks_ptr,  # (programs, 2) int32
    scalars_ptr,  # (groups, 9) fp64
    grad_like,  # of the gradients' dtype; nothing is read from it
    param_out_like,  # of the copies' dtype, or None
    ema_out_like,
    ALIGNED: tl.constexpr,  # pointers and sizes are multiples of 16
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    row = table_ptr + tl.load(chunks_ptr + 2 * program).to(tl.int64) * 9
    first = tl.load(chunks_ptr + 2 * program + 1).to(tl.int64) * CHUNK
    fp32 = tl.pointer_type(tl.float32)
    param_ptr = tl.load(row).to(fp32)
    grad_ptr = tl.load(row + 1).to(tl.pointer_type(grad_like.dtype.element_ty))
    exp_avg_ptr = tl.load(row + 2).to(fp32)
    exp_avg_sq_ptr = tl.load(row + 3).to(fp32)
    ema_ptr = tl.load(row + 4).to(fp32)
    has_ema = tl.load(row + 4) != 0
    n = tl.load(row + 7)
    if ALIGNED:
        n = tl.multiple_of(n, 16)
        param_ptr = tl.multiple_of(param_ptr, 16)
        grad_ptr = tl.multiple_of(grad_ptr, 16)
        exp_avg_ptr = tl.multiple_of(exp_avg_ptr, 16)
        exp_avg_sq_ptr = tl.multiple_of(exp_avg_sq_ptr, 16)
        ema_ptr = tl.multiple_of(ema_ptr, 16)
    scalars_ptr += tl.load(row + 8) * 9
    decay, gain1, beta2, gain2, step_size, correction2, eps, momentum, gain_ema = _read(scalars_ptr)
    for at in range(0, CHUNK, BLOCK):
        i = first + at + tl.arange(0, BLOCK)
        mask = i < n
        p = _adamw(
            param_ptr,
            grad_ptr,
            exp_avg_ptr,
            exp_avg_sq_ptr,
            i,
            mask,
            decay,
            gain1,
            beta2,
            gain2,
            step_size,
            correction2,
            eps,
        )
        if param_out_like is not None:
            param_out_ptr = tl.load(row + 5).to(tl.pointer_type(param_out_like.dtype.element_ty))
            if ALIGNED:
                param_out_ptr = tl.multiple_of(param_out_ptr, 16)
            tl.store(param_out_ptr + i, p.to(param_out_like.dtype.element_ty), mask=mask)
        if has_ema:
            ema = momentum * tl.load(ema_ptr + i, mask=mask, other=0.0) + gain_ema * p
            tl.store(ema_ptr + i, ema, mask=mask)
            if ema_out_like is not None:
                ema_out_ptr = tl.load(row + 6).to(tl.pointer_type(ema_out_like.dtype.element_ty))
                if ALIGNED:
                    ema_out_ptr = tl.multiple_of(ema_out_ptr, 16)
                tl.store(ema_out_ptr + i, ema.to(ema_out_like.dtype.element_ty), mask=mask)


def adamw_ema_(param, grad, exp_avg, exp_avg_sq, ema, scalars, param_out=None, ema_out=None):
    """One tensor, in place; `scalars` as made by step_scalars, on the host or on the device."""
    n = param.numel()
    if n == 0:
        return
    on_device = scalars.is_cuda
    numbers = [0.0] * scalars.numel() if on_device else scalars.tolist()
    _adamw_ema_kernel[(triton.cdiv(n, BLOCK),)](
        param,
        grad,
        exp_avg,
        exp_avg_sq,
        ema,
        param_out,
        ema_out,
        scalars if on_device else None,
        *numbers,
        n,
        BLOCK,
        num_warps=WARPS,
    )


def adamw_ema_multi_(params, grads, exp_avgs, exp_avg_sqs, emas, scalars, param_outs=(), ema_outs=()):
    """A list of tensors in one launch; the last three lists may be empty."""
    if params:
        scalars = scalars.view(1, -1).to(params[0].device, non_blocking=True)
        groups = [0] * len(params)
        adamw_ema_groups_(params, grads, exp_avgs, exp_avg_sqs, emas, scalars, groups, param_outs, ema_outs)


def adamw_ema_groups_(params, grads, exp_avgs, exp_avg_sqs, emas, scalars, groups, param_outs=(), ema_outs=()) -> None:
    """All tensors in one launch, two where some are not aligned; see ops.adamw_ema_groups_."""
    columns = [params, grads, exp_avgs, exp_avg_sqs, emas, param_outs, ema_outs]
    pointers = [[x.data_ptr() for x in column] for column in columns]
    key = (*map(tuple, pointers), tuple(groups), params[0].device)
    if key not in _tables:
        while len(_tables) >= TABLES:
            del _tables[next(iter(_tables))]
        _tables[key] = _tables_of(pointers, [p.numel() for p in params], groups, params[0].device)
    for table, chunks, aligned in _tables[key]:
        _adamw_ema_groups_kernel[(len(chunks),)](
            table,
            chunks,
            scalars,
            grads[0],
            param_outs[0] if len(param_outs) else None,
            ema_outs[0] if len(ema_outs) else None,
            ALIGNED=aligned,
            CHUNK=CHUNK,
            BLOCK=BLOCK,
            num_warps=WARPS,
        )


def _tables_of(pointers, sizes, groups, device) -> list[tuple]:
    """For aligned tensors and the others, where there are any: (table, chunks, whether they are aligned).

    table: (n, FIELDS) int64, the seven pointers of a tensor, its size and its row of the scalars; chunks: (programs, 2)
    int32, tensor and number of its chunk.
    """
    rows = []
    for i, (size, group) in enumerate(zip(sizes, groups)):
        rows.append([column[i] if i < len(column) else 0 for column in pointers] + [size, group])
    tables = []
    for aligned in (True, False):
        chosen = [row for row in rows if row[7] and all(value % 16 == 0 for value in row[:8]) is aligned]
        if chosen:
            count = [-(-row[7] // CHUNK) for row in chosen]
            chunks = [torch.stack([torch.full((n,), i), torch.arange(n)], dim=1) for i, n in enumerate(count)]
            table = torch.tensor(chosen, dtype=torch.int64).to(device)
            tables.append((table, torch.cat(chunks).to(device, torch.int32), aligned))
    return tables


def aot_cases(capability: int = 9) -> list[Case]:
    """A ZeRO partition with bf16 gradients and both copies, one in fp32, one without an EMA."""
    numbers = ("decay", "gain1", "beta2", "gain2", "step_size", "correction2", "momentum", "gain_ema")
    state = ("param_ptr", "exp_avg_ptr", "exp_avg_sq_ptr", "ema_ptr")
    types = {**dict.fromkeys(numbers, "fp32"), **dict.fromkeys(state, "*fp32"), "n": "i32:16", "scalars_ptr": "*fp64"}
    kinds = {
        "bf16 +copies": ("scalars_ptr",),
        "bf16 +copies, scalars on the device": (),
        "fp32": ("scalars_ptr", "param_out_ptr", "ema_out_ptr"),
        "bf16, no EMA": ("scalars_ptr", "ema_ptr", "ema_out_ptr"),
    }
    fp32 = types | {"grad_ptr": "*fp32"}
    listed = {"table_ptr": "*i64", "chunks_ptr": "*i32", "scalars_ptr": "*fp64"}
    listed |= dict.fromkeys(("grad_like", "param_out_like", "ema_out_like"), "*bf16")
    constants = {"CHUNK": CHUNK, "BLOCK": BLOCK}
    several = [
        Case(f"adamw_ema of a list, {kind}", _adamw_ema_groups_kernel, constants | others, WARPS, types=listed)
        for kind, others in {
            "bf16 +copies": {"ALIGNED": True},
            "bf16 +copies, not aligned": {"ALIGNED": False},
            "bf16, no copies": {"ALIGNED": True, "param_out_like": None, "ema_out_like": None},
        }.items()
    ]
    return several + [
        Case(
            f"adamw_ema {kind}",
            _adamw_ema_kernel,
            {"BLOCK": BLOCK, **dict.fromkeys(absent)},
            WARPS,
            types=fp32 if kind == "fp32" else types,
        )
        for kind, absent in kinds.items()
    ]
