"""adamw_ema on a CPU: csrc where it is built, otherwise the reference, by the registered op."""

from __future__ import annotations

import torch

from ijepa_fast.kernels.adamw_ema import reference
from ijepa_fast.kernels.adamw_ema.reference import adamw_ema_, adamw_ema_multi_

__all__ = ["adamw_ema_", "adamw_ema_groups_", "adamw_ema_multi_"]


def adamw_ema_groups_(params, grads, exp_avgs, exp_avg_sqs, emas, scalars, groups, param_outs, ema_outs) -> None:
    """See ops.adamw_ema_groups_."""
    state = (params, grads, exp_avgs, exp_avg_sqs, emas)
    reference.adamw_ema_groups_(
        *state, scalars, groups, param_outs, ema_outs, multi=torch.ops.ijepa_fast.adamw_ema_multi_
    )
