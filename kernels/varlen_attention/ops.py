"""varlen_attention: checks, choice of the backend, autograd and registration."""

from __future__ import annotations

import torch

from ijepa_fast.kernels.common.checks import check_sequences, check_tensor
from ijepa_fast.kernels.common.dispatch import choice
from ijepa_fast.kernels.common.library import register
from ijepa_fast.kernels.varlen_attention import backends, cpu, dense, native


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
    """Attention of packed query sequences to the packed key sequences of the same number, not causal.

    Args:
        q: (Tq, H, d) floating point. q, k and v may be views of a wider tensor: rows any distance apart, heads side by
            side.
        k: (Tk, H, d) in q's dtype.
        v: (Tk, H, d) in q's dtype.
        cu_seqlens_q: (S + 1,) int32, the first row of each query sequence, then Tq.
        cu_seqlens_k: (S + 1,) int32, likewise for keys; lengths may differ from the queries'.
        max_seqlen_q: no query sequence is longer.
        max_seqlen_k: no key sequence is longer.
        scale: factor of the scores; default 1/sqrt(d).
        backend: "triton" (this project's kernel), "native" (its loops for a CPU), "torch"
            (torch.nn.attention.varlen), "flash2", "flash4", "xformers", "sdpa" (on CUDA for equal lengths only),
            "reference", or "auto": what the op is set to with `ijepa_fast.kernels.use`, else the fastest measured one
            for the device and shape (see backends.py). "native" wants a positive scale.

    Returns:
        (Tq, H, d) in q's dtype; zeros for queries whose key sequence is empty.

    Raises:
        ValueError: for a wrong dtype, shape, device or layout; for cu_seqlens that are not in order, do not end
            at the row count or exceed max_seqlen (checked on the CPU, and in debug mode).
        RuntimeError: for a backend that cannot be had, with the reason.
    """
    check_tensor("varlen_attention", "q", q, (None, None, None), contiguous=False)
    check_tensor("varlen_attention", "k", k, (None, q.shape[1], q.shape[2]), q.dtype, q.device, contiguous=False)
    check_tensor("varlen_attention", "v", v, tuple(k.shape), q.dtype, q.device, contiguous=False)
    for name, x in (("q", q), ("k", k), ("v", v)):
        _check_heads_adjacent(name, x)
    _check_sequences("cu_seqlens_q", cu_seqlens_q, q, "max_seqlen_q", max_seqlen_q)
    _check_sequences("cu_seqlens_k", cu_seqlens_k, k, "max_seqlen_k", max_seqlen_k)
    if cu_seqlens_k.shape[0] != cu_seqlens_q.shape[0]:
        raise ValueError(
            f"varlen_attention: cu_seqlens_k: expected as many values as cu_seqlens_q has, {cu_seqlens_q.shape[0]}, "
            f"got {cu_seqlens_k.shape[0]}"
        )
    scale = q.shape[2] ** -0.5 if scale is None else scale
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    training = q.requires_grad or k.requires_grad or v.requires_grad
    name = _resolve(backend, q, max_seqlen_k, scale, training)
    if name in IMPLEMENTATIONS:
        return _Attention.apply(q, k, v, *lengths, scale, name)
    return backends.FUNCTIONS[name](q, k, v, *lengths, scale)


def varlen_attention_qkv(
    qkv: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int, scale: float | None = None, backend: str = "auto"
) -> torch.Tensor:
    """Self-attention inside every packed sequence; the backward writes one gradient, of qkv.

    Args:
        qkv: (T, 3, H, d) floating point: queries, keys, values.
        cu_seqlens: (S + 1,) int32, the first row of each sequence, then T.
        max_seqlen: no sequence is longer.
        scale: factor of the scores; default 1/sqrt(d).
        backend: as for `varlen_attention`.

    Returns:
        (T, H, d) in qkv's dtype.

    Raises:
        ValueError, RuntimeError: as `varlen_attention`.
    """
    check_tensor("varlen_attention", "qkv", qkv, (None, 3, None, None))
    _check_sequences("cu_seqlens", cu_seqlens, qkv, "max_seqlen", max_seqlen)
    scale = qkv.shape[3] ** -0.5 if scale is None else scale
    q, k, v = qkv.unbind(1)
    name = _resolve(backend, q, max_seqlen, scale, qkv.requires_grad)
    if name in IMPLEMENTATIONS:
        return _AttentionQKV.apply(qkv, cu_seqlens, max_seqlen, scale, name)
    return backends.FUNCTIONS[name](q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, scale)


def dense_attention(qkv: torch.Tensor, backend: str = "auto") -> torch.Tensor:
    """Self-attention inside every image.

    Args:
        qkv: (B, N, 3, H, d) floating point.
        backend: as for `varlen_attention`; "auto" is "native" where that can be had, without a gradient what
            `measure_dense_attention` found fastest, else "sdpa", PyTorch's scaled_dot_product_attention.

    Returns:
        (B, N, H, d) in qkv's dtype.

    Raises:
        ValueError, RuntimeError: as `varlen_attention`.
    """
    check_tensor("dense_attention", "qkv", qkv, (None, None, 3, None, None))
    if backend == "auto" and choice("varlen_attention") == "auto" and native.unsupported(qkv, 1.0) is None:
        backend = "native"
    if backend == "auto" and not (qkv.requires_grad and torch.is_grad_enabled()):
        backend = dense.FASTEST.get((int(qkv.shape[3]), int(qkv.shape[4])), "auto")
    if backend in ("auto", "sdpa", "default", *dense.SDPA):
        return dense.attend(qkv, backend if backend in dense.SDPA else "default")
    images, tokens = qkv.shape[:2]
    cu_seqlens = torch.arange(images + 1, dtype=torch.int32, device=qkv.device) * tokens
    return varlen_attention_qkv(qkv.flatten(0, 1), cu_seqlens, tokens, backend=backend).unflatten(0, (images, tokens))


def measure_dense_attention(
    images: int, tokens: int, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> dict[str, float]:
    """Seconds of `dense_attention` without a gradient by backend, the fastest first, which "auto" is from now on.

    Measured on random values, for all shapes with these heads. Waits for the device.
    """
    generator = torch.Generator(device).manual_seed(0)  # the run's own numbers stay as they are
    qkv = torch.randn(images, tokens, 3, heads, head_dim, device=device, generator=generator).to(dtype)
    return dense.measure(qkv, lambda qkv: dense_attention(qkv, "triton"))


def _resolve(backend: str, q: torch.Tensor, max_seqlen_k: int, scale: float, training: bool) -> str:
    """The name of the backend that runs, `auto` resolved."""
    if backend not in backends.NAMES:
        raise ValueError(f"varlen_attention: backend: expected one of {', '.join(backends.NAMES)}, got {backend!r}")
    if backend == "auto":
        setting = choice("varlen_attention")
        backend = backends.choose(q, max_seqlen_k, scale, training) if setting == "auto" else setting
    backends.require(backend, q, scale)
    return backend


def _check_heads_adjacent(name: str, x: torch.Tensor) -> None:
    if x.shape[0] and (x.stride(2) != 1 or (x.shape[1] > 1 and x.stride(1) != x.shape[2])):
        raise ValueError(
            f"varlen_attention: {name}: expected the {x.shape[1]} heads of a row side by side (strides (any, "
            f"{x.shape[2]}, 1)), got strides {x.stride()}; call .contiguous() on it"
        )


def _check_sequences(name: str, cu_seqlens: torch.Tensor, x: torch.Tensor, max_name: str, max_seqlen: int) -> None:
    check_tensor("varlen_attention", name, cu_seqlens, (None,), torch.int32, x.device)
    check_sequences("varlen_attention", name, cu_seqlens, x.shape[0], max_name, max_seqlen)


# Of each of this project's implementations, where its functions are, named as the registered ops.
IMPLEMENTATIONS = {"triton": torch.ops.ijepa_fast, "native": native}


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, implementation):
        ctx.implementation, ctx.rest = implementation, (max_seqlen_q, max_seqlen_k, scale)
        fwd = IMPLEMENTATIONS[implementation].varlen_attention_fwd
        out, lse = fwd(q, k, v, cu_seqlens_q, cu_seqlens_k, *ctx.rest)
        ctx.save_for_backward(q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k)
        return out

    @staticmethod
    def backward(ctx, dout):
        bwd = IMPLEMENTATIONS[ctx.implementation].varlen_attention_bwd
        return *bwd(dout.contiguous(), *ctx.saved_tensors, *ctx.rest), None, None, None, None, None, None


class _AttentionQKV(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, cu_seqlens, max_seqlen, scale, implementation):
        ctx.implementation, ctx.rest = implementation, (max_seqlen, scale)
        fwd = IMPLEMENTATIONS[implementation].varlen_attention_fwd
        out, lse = fwd(*qkv.unbind(1), cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, scale)
        ctx.save_for_backward(qkv, out, lse, cu_seqlens)
        return out

    @staticmethod
    def backward(ctx, dout):
        bwd = IMPLEMENTATIONS[ctx.implementation].varlen_attention_qkv_bwd
        return bwd(dout.contiguous(), *ctx.saved_tensors, *ctx.rest), None, None, None, None


def _fwd_fake(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale):
    return _packed(q), q.new_empty((q.shape[1], q.shape[0]), dtype=cpu.lse_dtype(q.dtype))


def _packed(x):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_LENGTHS = "Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k"
register(
    f"varlen_attention_fwd(Tensor q, Tensor k, Tensor v, {_LENGTHS}, float scale) -> (Tensor out, Tensor lse)",
    cpu,
    fake=_fwd_fake,
)
register(
    f"varlen_attention_bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_LENGTHS}, float scale)"
    " -> (Tensor dq, Tensor dk, Tensor dv)",
    cpu,
    fake=lambda dout, q, k, v, *_: (_packed(q), _packed(k), _packed(v)),
)
register(
    "varlen_attention_qkv_bwd(Tensor dout, Tensor qkv, Tensor out, Tensor lse, Tensor cu_seqlens, SymInt max_seqlen, "
    "float scale) -> Tensor dqkv",
    cpu,
    fake=lambda dout, qkv, *_: _packed(qkv),
)
