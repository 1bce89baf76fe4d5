"""Attention over packed sequences, sequence by sequence: what the op means.

out_s = softmax(scale * q_s k_s^T) v_s      for every sequence s and every head
"""

from __future__ import annotations

import math
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
        torch.einsum("hqk,khd->qhd", _scores(q[query], k[key], scale).softmax(-1), v[key])
        for query, key in _sequences(cu_seqlens_q, cu_seqlens_k)
    ]
    return torch.cat(outputs) if outputs else torch.empty_like(q)


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of the softmax denominators' logarithms for inputs of `dtype`: one that holds large ones well enough for it."""
    return torch.float64 if dtype.itemsize > 2 else torch.float32


def varlen_attention_fwd(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale):
    """What the kernel returns: the output, and log2 of each row's softmax denominator, (H, Tq), 0 without keys."""
    lse = q.new_zeros((q.shape[1], q.shape[0]), dtype=lse_dtype(q.dtype))
    for query, key in _sequences(cu_seqlens_q, cu_seqlens_k):
        if key.start < key.stop:
            lse[:, query] = _scores(q[query], k[key], scale).to(lse.dtype).logsumexp(-1) / math.log(2)
    return varlen_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, scale), lse


def varlen_attention_bwd(dout, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale):
    """The gradients of q, k and v, written out."""
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    for query, key in _sequences(cu_seqlens_q, cu_seqlens_k):
        p = _scores(q[query], k[key], scale).softmax(-1)
        dp = torch.einsum("qhd,khd->hqk", dout[query], v[key])
        ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale
        dq[query] = torch.einsum("hqk,khd->qhd", ds, k[key])
        dk[key] = torch.einsum("hqk,qhd->khd", ds, q[query])
        dv[key] = torch.einsum("hqk,qhd->khd", p, dout[query])
    return dq, dk, dv


def _scores(q, k, scale):
    return torch.einsum("qhd,khd->hqk", q, k) * scale


def _sequences(cu_seqlens_q, cu_seqlens_k):
    """The rows of each query sequence and of its key sequence, as slices."""
    bounds = (cu_seqlens_q.tolist(), cu_seqlens_k.tolist())
    queries, keys = ([slice(start, stop) for start, stop in pairwise(b)] for b in bounds)
    return list(zip(queries, keys, strict=True))
