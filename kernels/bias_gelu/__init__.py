"""Bias and exact GELU in one pass."""

from ijepa_fast.kernels.bias_gelu.ops import bias_gelu

__all__ = ["bias_gelu"]
