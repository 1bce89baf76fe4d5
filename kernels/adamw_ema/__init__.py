"""AdamW, the EMA of the parameters and their low-precision copies in one pass."""

from ijepa_fast.kernels.adamw_ema.ops import adamw_ema_, adamw_ema_groups_, adamw_ema_multi_, step_scalars

__all__ = ["adamw_ema_", "adamw_ema_groups_", "adamw_ema_multi_", "step_scalars"]
