"""csrc's loops for the CPU, under the names and arguments of the registered ops."""

from __future__ import annotations

import torch

from ijepa_fast.kernels.common import native

DTYPES = (torch.float32, torch.bfloat16)

_INPUT = "Tensor q, Tensor k, Tensor v"
_LENGTHS = "Tensor cu_seqlens_q, Tensor cu_seqlens_k, float scale"
_fwd = native.define(f"varlen_attention_cpu_({_INPUT}, {_LENGTHS}, Tensor(a!) out, Tensor(b!) statistics) -> ()")
_bwd = native.define(
    f"varlen_attention_bwd_cpu_(Tensor dout, {_INPUT}, Tensor statistics, {_LENGTHS}, "
    "Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv) -> ()"
)


def unsupported(q: torch.Tensor, scale: float) -> str | None:
    """Why csrc cannot take queries (..., d) like these, and keys and values like them; None if it can."""
    width = 1 if q.dtype == torch.bfloat16 else native.WIDTH
    return native.unsupported(DTYPES, q, width=width) or (None if scale > 0 else f"needs a positive scale, got {scale}")


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
    """-> out (Tq, H, d), and two statistics of every row for the backward pass (2, H, Tq) fp32."""
    out = q.new_empty(q.shape)
    statistics = q.new_empty((2, q.shape[1], q.shape[0]), dtype=torch.float32)
    _fwd(q, k, v, cu_seqlens_q, cu_seqlens_k, scale, out, statistics)
    return out, statistics


def varlen_attention_bwd(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    statistics: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of q, k and v."""
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    _bwd(dout, q, k, v, statistics, cu_seqlens_q, cu_seqlens_k, scale, dq, dk, dv)
    return dq, dk, dv


def varlen_attention_qkv_bwd(
    dout: torch.Tensor,
    qkv: torch.Tensor,
    out: torch.Tensor,
    statistics: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    scale: float,
) -> torch.Tensor:
    """The gradient of qkv (T, 3, H, d)."""
    dqkv = qkv.new_empty(qkv.shape)
    _bwd(dout, *qkv.unbind(1), statistics, cu_seqlens, cu_seqlens, scale, *dqkv.unbind(1))
    return dqkv
