"""Residual add and LayerNorm in one pass."""

from ijepa_fast.kernels.layer_norm.ops import layer_norm

__all__ = ["layer_norm"]
