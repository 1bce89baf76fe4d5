"""The CPU implementation: batched attention for uniform or short sequences, else flash attention one by one."""

from __future__ import annotations

import torch
import torch.nn.functional as F

# Up to this many keys a padded batch of plain attention beats one flash call a sequence (two cores, fp32, forward and
# backward: 512 sequences of 30-55 tokens 36 against 86 ms; 64 of 80-140 72 against 49 ms).
SHORT = 64


def varlen_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale=None):
    """As `reference.varlen_attention`."""
    sequences = cu_seqlens_q.shape[0] - 1
    uniform_q = q.shape[0] == sequences * max_seqlen_q
    uniform_k = k.shape[0] == sequences * max_seqlen_k
    if uniform_q and uniform_k:
        q, k, v = (x.unflatten(0, (sequences, -1)).transpose(1, 2) for x in (q, k, v))
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
