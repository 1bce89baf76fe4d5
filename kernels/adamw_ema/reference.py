"""The meaning of adamw_ema: torch.optim.AdamW's update, then the EMA of the parameter, in place."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch


def step_scalars(
    *, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, step: int, momentum: float
) -> torch.Tensor:
    """The nine numbers that a step needs, (9,) float64 on the CPU.

    decay = 1 - lr weight_decay, 1 - beta1, beta2, 1 - beta2, step size = lr / (1 - beta1^step),
    sqrt(1 - beta2^step), eps, momentum, 1 - momentum. The differences are taken in fp64: 1 - momentum goes to zero.
    """
    step_size = lr / (1 - beta1**step)
    correction2 = math.sqrt(1 - beta2**step)
    return torch.tensor(
        [1 - lr * weight_decay, 1 - beta1, beta2, 1 - beta2, step_size, correction2, eps, momentum, 1 - momentum],
        dtype=torch.float64,
    )


def adamw_ema_(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    ema: torch.Tensor | None,
    scalars: torch.Tensor,
    param_out: torch.Tensor | None = None,
    ema_out: torch.Tensor | None = None,
) -> None:
    """One tensor; see ops.adamw_ema_ for the arguments and `step_scalars` for `scalars`."""
    decay, gain1, beta2, gain2, step_size, correction2, eps, momentum, gain_ema = scalars.tolist()
    grad = grad.to(param.dtype)
    param.mul_(decay)
    exp_avg.lerp_(grad, gain1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=gain2)
    param.addcdiv_(exp_avg, (exp_avg_sq.sqrt() / correction2).add_(eps), value=-step_size)
    if ema is not None:
        ema.mul_(momentum).add_(param, alpha=gain_ema)
    if param_out is not None:
        param_out.copy_(param)
    if ema is not None and ema_out is not None:
        ema_out.copy_(ema)


def adamw_ema_multi_(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    exp_avgs: Sequence[torch.Tensor],
    exp_avg_sqs: Sequence[torch.Tensor],
    emas: Sequence[torch.Tensor],
    scalars: torch.Tensor,
    param_outs: Sequence[torch.Tensor] = (),
    ema_outs: Sequence[torch.Tensor] = (),
) -> None:
    """A list of tensors; the last three lists and `emas` may be empty."""
    scalars = scalars.cpu()
    for i, (param, grad, exp_avg, exp_avg_sq) in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs, strict=True)):
        rest = [tensors[i] if len(tensors) else None for tensors in (emas, param_outs, ema_outs)]
        adamw_ema_(param, grad, exp_avg, exp_avg_sq, rest[0], scalars, *rest[1:])


def adamw_ema_groups_(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    exp_avgs: Sequence[torch.Tensor],
    exp_avg_sqs: Sequence[torch.Tensor],
    emas: Sequence[torch.Tensor],
    scalars: torch.Tensor,
    groups: Sequence[int],
    param_outs: Sequence[torch.Tensor] = (),
    ema_outs: Sequence[torch.Tensor] = (),
    multi: Callable = adamw_ema_multi_,
) -> None:
    """A list of tensors, each with the row of `scalars` that `groups` says; the first len(emas) have an average."""
    for i, group in enumerate(groups):
        rest = [list(tensors[i : i + 1]) for tensors in (emas, param_outs, ema_outs)]
        multi([params[i]], [grads[i]], [exp_avgs[i]], [exp_avg_sqs[i]], rest[0], scalars[group], *rest[1:])
