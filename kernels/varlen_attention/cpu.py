"""The CPU implementation: PyTorch's flash attention for CPUs, one call for uniform lengths, else one a sequence."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def varlen_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale=None):
    """As `reference.varlen_attention`."""
    sequences = cu_seqlens_q.shape[0] - 1
    if q.shape[0] == sequences * max_seqlen_q and k.shape[0] == sequences * max_seqlen_k:
        q, k, v = (x.unflatten(0, (sequences, -1)).transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).flatten(0, 1)
    lengths_q, lengths_k = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
    outputs = []
    for q_s, k_s, v_s in zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k), strict=True):
        q_s, k_s, v_s = (x.transpose(0, 1)[None] for x in (q_s, k_s, v_s))
        outputs.append(F.scaled_dot_product_attention(q_s, k_s, v_s, scale=scale)[0].transpose(0, 1))
    return torch.cat(outputs) if outputs else torch.empty_like(q)
