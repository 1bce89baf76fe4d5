"""What a CPU runs in PyTorch: its attention, batched for uniform or short sequences and else one by one; and the
registered ops written out, sequence by sequence."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from ijepa_fast.kernels.varlen_attention import reference
from ijepa_fast.kernels.varlen_attention.reference import scores, sequences

# Up to this many keys a padded batch of plain attention beats one flash call per sequence (two cores, fp32, forward and
# backward: 512 sequences of 30-55 tokens 36 against 86 ms; 64 of 80-140 72 against 49 ms).
SHORT = 64


def varlen_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float | None = None,
) -> torch.Tensor:
    """As `reference.varlen_attention`."""
    count = cu_seqlens_q.shape[0] - 1
    uniform_q = q.shape[0] == count * max_seqlen_q
    uniform_k = k.shape[0] == count * max_seqlen_k
    if uniform_q and uniform_k:
        q, k, v = (x.unflatten(0, (count, -1)).transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).flatten(0, 1)
    if uniform_k or max_seqlen_k <= SHORT:
        return _padded(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale)
    return _one_by_one(q, k, v, cu_seqlens_q, cu_seqlens_k, scale)


def _padded(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale):
    kept_q, kept_k = _kept(cu_seqlens_q, max_seqlen_q), _kept(cu_seqlens_k, max_seqlen_k)
    rows_q, rows_k = kept_q.view(-1).nonzero()[:, 0], kept_k.view(-1).nonzero()[:, 0]
    q = _pad(q, kept_q, rows_q)
    k, v = _pad(k, kept_k, rows_k), _pad(v, kept_k, rows_k)
    if kept_k.all():
        out = F.scaled_dot_product_attention(q, k, v, scale=scale)
    else:
        # An empty sequence attends to its padding, which is finite and dropped below.
        hidden = torch.zeros(kept_k.shape, dtype=q.dtype).masked_fill_(~kept_k, torch.finfo(q.dtype).min)
        scores = (q * (q.shape[-1] ** -0.5 if scale is None else scale)) @ k.transpose(-1, -2) + hidden[:, None, None]
        out = scores.softmax(-1) @ v
    return out.transpose(1, 2).flatten(0, 1).index_select(0, rows_q)


def _kept(cu_seqlens, length):
    """(n, length) bool: which places of a padded batch hold a token."""
    return torch.arange(length) < cu_seqlens.diff()[:, None]


def _pad(x, kept, rows):
    """Packed (T, H, d) -> (n, H, length, d), zeros behind each sequence."""
    if rows.numel() < kept.numel():
        x = x.new_zeros(kept.numel(), *x.shape[1:]).index_copy(0, rows, x)
    return x.unflatten(0, kept.shape).transpose(1, 2)


def _one_by_one(q, k, v, cu_seqlens_q, cu_seqlens_k, scale):
    lengths_q, lengths_k = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
    outputs = []
    for q_s, k_s, v_s in zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k), strict=True):
        q_s, k_s, v_s = (x.transpose(0, 1)[None] for x in (q_s, k_s, v_s))
        outputs.append(F.scaled_dot_product_attention(q_s, k_s, v_s, scale=scale)[0].transpose(0, 1))
    return torch.cat(outputs) if outputs else torch.empty_like(q)


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of the softmax denominators' logarithms for inputs of `dtype`: one that holds large ones well enough for it."""
    return torch.float64 if dtype.itemsize > 2 else torch.float32


def varlen_attention_fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """-> out (Tq, H, d), and log2 of each row's softmax denominator, (H, Tq) of `lse_dtype`, 0 without keys."""
    lse = q.new_zeros((q.shape[1], q.shape[0]), dtype=lse_dtype(q.dtype))
    for query, key in sequences(cu_seqlens_q, cu_seqlens_k):
        if key.start < key.stop:
            lse[:, query] = scores(q[query], k[key], scale).to(lse.dtype).logsumexp(-1) / math.log(2)
    return reference.varlen_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, scale), lse


def varlen_attention_bwd(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of q, k and v; out and lse are not needed."""
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    for query, key in sequences(cu_seqlens_q, cu_seqlens_k):
        p = scores(q[query], k[key], scale).softmax(-1)
        dp = torch.einsum("qhd,khd->hqk", dout[query], v[key])
        ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale
        dq[query] = torch.einsum("hqk,khd->qhd", ds, k[key])
        dk[key] = torch.einsum("hqk,qhd->khd", ds, q[query])
        dv[key] = torch.einsum("hqk,qhd->khd", p, dout[query])
    return dq, dk, dv


def varlen_attention_qkv_bwd(
    dout: torch.Tensor,
    qkv: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    scale: float,
) -> torch.Tensor:
    """The gradient of qkv (T, 3, H, d)."""
    q, k, v = qkv.unbind(1)
    lengths = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    return torch.stack(varlen_attention_bwd(dout, q, k, v, out, lse, *lengths, scale), 1)
