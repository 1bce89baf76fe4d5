"""Attention over packed sequences, sequence by sequence: what the op means.

out_s = softmax(scale * q_s k_s^T) v_s      for every sequence s and every head
"""

from __future__ import annotations

from itertools import pairwise

import torch


def varlen_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    scale: float | None = None,
) -> torch.Tensor:
    """q (Tq, H, d), k and v (Tk, H, d) -> (Tq, H, d); query sequence s attends to key sequence s only.

    cu_seqlens_* (S + 1,) hold the first row of each sequence and the row count. A query sequence whose key sequence is
    empty gets zeros. `scale` is 1/sqrt(d) unless given. Reads cu_seqlens on the host.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    outputs = [
        torch.einsum("hqk,khd->qhd", scores(q[query], k[key], scale).softmax(-1), v[key])
        for query, key in sequences(cu_seqlens_q, cu_seqlens_k)
    ]
    return torch.cat(outputs) if outputs else torch.empty_like(q)


def scores(q: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor:
    """scale q k^T of every head: (Q, H, d), (K, H, d) -> (H, Q, K)."""
    return torch.einsum("qhd,khd->hqk", q, k) * scale


def sequences(cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor) -> list[tuple[slice, slice]]:
    """The rows of each query sequence and of its key sequence."""
    bounds = (cu_seqlens_q.tolist(), cu_seqlens_k.tolist())
    queries, keys = ([slice(start, stop) for start, stop in pairwise(b)] for b in bounds)
    return list(zip(queries, keys, strict=True))
