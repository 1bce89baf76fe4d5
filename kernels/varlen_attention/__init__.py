"""Attention over packed sequences of different lengths."""

from ijepa_fast.kernels.varlen_attention.ops import (
    dense_attention,
    measure_dense_attention,
    varlen_attention,
    varlen_attention_qkv,
)

__all__ = ["dense_attention", "measure_dense_attention", "varlen_attention", "varlen_attention_qkv"]
