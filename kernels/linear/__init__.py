"""Matrix products with bias, and exact GELU behind them."""

from ijepa_fast.kernels.linear.ops import linear, linear_gelu

__all__ = ["linear", "linear_gelu"]
