"""Attention over packed sequences: public functions."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ijepa_fast.kernels.varlen_attention import cpu


def varlen_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """q (Tq, H, d), k and v (Tk, H, d) -> (Tq, H, d): every query sequence attends to the key sequence of its number."""
    return cpu.varlen_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale)


def varlen_attention_qkv(
    qkv: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int, scale: float | None = None, backend: str = "auto"
) -> torch.Tensor:
    """qkv (T, 3, H, d) -> (T, H, d): self-attention inside every sequence."""
    q, k, v = qkv.unbind(1)
    return cpu.varlen_attention(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, scale)


def dense_attention(qkv: torch.Tensor, backend: str = "auto") -> torch.Tensor:
    """qkv (B, N, 3, H, d) -> (B, N, H, d): self-attention inside every image."""
    q, k, v = qkv.transpose(1, 3).unbind(2)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
