"""csrc's loops for fp32 on the CPU, under the signatures of the registered ops."""

from __future__ import annotations

from ijepa_fast.kernels.common import native

_INPUT = "Tensor q, Tensor k, Tensor v"
_LENGTHS = "Tensor cu_seqlens_q, Tensor cu_seqlens_k, float scale"
_fwd = native.define(f"varlen_attention_cpu_({_INPUT}, {_LENGTHS}, Tensor(a!) out, Tensor(b!) statistics) -> ()")
_bwd = native.define(
    f"varlen_attention_bwd_cpu_(Tensor dout, {_INPUT}, Tensor statistics, {_LENGTHS}, "
    "Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv) -> ()"
)


def varlen_attention_fwd(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale):
    """-> out (Tq, H, d), and two statistics of every row for the backward pass (2, H, Tq)."""
    out, statistics = q.new_empty(q.shape), q.new_empty(2, q.shape[1], q.shape[0])
    _fwd(q, k, v, cu_seqlens_q, cu_seqlens_k, scale, out, statistics)
    return out, statistics


def varlen_attention_bwd(dout, q, k, v, out, statistics, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale):
    """The gradients of q, k and v."""
    gradients = tuple(x.new_empty(x.shape) for x in (q, k, v))
    _bwd(dout, q, k, v, statistics, cu_seqlens_q, cu_seqlens_k, scale, *gradients)
    return gradients


def varlen_attention_qkv_bwd(dout, qkv, out, statistics, cu_seqlens, max_seqlen, scale):
    """The gradient of qkv (T, 3, H, d)."""
    dqkv = qkv.new_empty(qkv.shape)
    _bwd(dout, *qkv.unbind(1), statistics, cu_seqlens, cu_seqlens, scale, *dqkv.unbind(1))
    return dqkv
