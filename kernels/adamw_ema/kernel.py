"""AdamW, the EMA of the parameters and their low-precision copies in Triton, on one flat buffer, in place.

    m = m + (1 - beta1) (g - m)            v = beta2 v + (1 - beta2) g^2
    p = decay p - step_size m / (sqrt(v) / correction2 + eps)
    ema = momentum ema + (1 - momentum) p
Gradient, parameter, moments and EMA are read once; all but the gradient, and the copies, are written once: 38 bytes
per parameter with a bf16 gradient and two bf16 copies.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ijepa_fast.kernels.common.aot import Case

BLOCK, WARPS = 1024, 4


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
        decay = tl.load(scalars_ptr).to(tl.float32)
        gain1 = tl.load(scalars_ptr + 1).to(tl.float32)
        beta2 = tl.load(scalars_ptr + 2).to(tl.float32)
        gain2 = tl.load(scalars_ptr + 3).to(tl.float32)
        step_size = tl.load(scalars_ptr + 4).to(tl.float32)
        correction2 = tl.load(scalars_ptr + 5).to(tl.float32)
        eps = tl.load(scalars_ptr + 6).to(tl.float32)
        momentum = tl.load(scalars_ptr + 7).to(tl.float32)
        gain_ema = tl.load(scalars_ptr + 8).to(tl.float32)
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
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
    if param_out_ptr is not None:
        tl.store(param_out_ptr + i, p.to(param_out_ptr.dtype.element_ty), mask=mask)
    if ema_ptr is not None:
        ema = momentum * tl.load(ema_ptr + i, mask=mask, other=0.0) + gain_ema * p
        tl.store(ema_ptr + i, ema, mask=mask)
        if ema_out_ptr is not None:
            tl.store(ema_out_ptr + i, ema.to(ema_out_ptr.dtype.element_ty), mask=mask)


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
    """A list of tensors, one after the other; the last three lists may be empty."""
    for i, tensors in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs)):
        ema, param_out, ema_out = (rest[i] if len(rest) else None for rest in (emas, param_outs, ema_outs))
        adamw_ema_(*tensors, ema, scalars, param_out, ema_out)


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
    return [
        Case(
            f"adamw_ema {kind}",
            _adamw_ema_kernel,
            {"BLOCK": BLOCK, **dict.fromkeys(absent)},
            WARPS,
            types=fp32 if kind == "fp32" else types,
        )
        for kind, absent in kinds.items()
    ]
