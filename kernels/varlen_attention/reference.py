"""Attention over packed sequences, sequence by sequence: what the op means.

out_s = softmax(scale * q_s k_s^T) v_s      for every sequence s and every head
"""

from __future__ import annotations

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
    lengths_q, lengths_k = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
    outputs = []
    for q_s, k_s, v_s in zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k), strict=True):
        scores = torch.einsum("qhd,khd->hqk", q_s, k_s) * scale
        outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v_s))
    return torch.cat(outputs) if outputs else torch.empty_like(q)
