"""The libraries that can compute varlen_attention, behind one signature, and which of them `auto` takes.

A backend that cannot be had raises RuntimeError with the reason; none stands in for another.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from functools import cache
from typing import NamedTuple

import torch

from ijepa_fast.kernels.common.dispatch import interpreted
from ijepa_fast.kernels.varlen_attention import cpu, native, reference
from ijepa_fast.kernels.varlen_attention.tiles import MAX_HEAD_DIM

NAMES = ("auto", "triton", "native", "torch", "flash2", "flash4", "xformers", "sdpa", "reference")


_HAS_TRITON = importlib.util.find_spec("triton") is not None


class Measured(NamedTuple):
    """The fastest backend on devices of `capability` for these head dims up to this length, forward or both passes."""

    capability: tuple[int, int]
    head_dims: tuple[int, ...]
    max_seqlen: int
    training: bool
    backend: str


# First match wins. Rows come from `python bench/run.py --op varlen_attention`; what no row covers was not measured.
MEASURED: tuple[Measured, ...] = (
    Measured((9, 0), (24, 32, 80), 256, True, "triton"),  # H100, bf16: 1.4 to 1.7x torch varlen, the next fastest
)
NOT_MEASURED = "triton"


def choose(q: torch.Tensor, max_seqlen_k: int, scale: float, training: bool) -> str:
    """The backend `auto` stands for: a row of MEASURED, else NOT_MEASURED. Announced once per case.

    On the CPU it is native, or sdpa where that cannot be had.
    """
    if not q.is_cuda:
        return "sdpa" if native.unsupported(q, scale) else "native"
    capability = _capability(q.device)
    for row in MEASURED:
        fits = row.capability == capability and q.shape[2] in row.head_dims and max_seqlen_k <= row.max_seqlen
        if fits and row.training == training:
            _announce(row.backend, capability, q.shape[2], training, "measured")
            return row.backend
    _announce(NOT_MEASURED, capability, q.shape[2], training, "not measured")
    return NOT_MEASURED


@torch.compiler.assume_constant_result
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)  # not cached here: torch.compile warns of functools' caches


def _announce(backend: str, capability: tuple[int, int], head_dim: int, training: bool, why: str) -> None:
    if not torch.compiler.is_compiling():
        _log_once(backend, capability, head_dim, training, why)


@cache
def _log_once(backend: str, capability: tuple[int, int], head_dim: int, training: bool, why: str) -> None:
    logging.getLogger("ijepa_fast").info(
        "varlen_attention: %s for head dim %d, %s, on compute capability %d.%d (%s)",
        backend,
        head_dim,
        "training" if training else "inference",
        *capability,
        why,
    )


def require(name: str, q: torch.Tensor, scale: float) -> None:
    """RuntimeError, with the reason, if backend `name` cannot run on queries like `q` with scores of `scale`."""
    reason = None
    if name == "triton":
        if not _HAS_TRITON:
            reason = "needs the package triton, which is not installed"
        elif not q.is_cuda and not interpreted():
            reason = f"needs a CUDA device or, with TRITON_INTERPRET=1, Triton's interpreter; q is on {q.device}"
        elif q.dtype == torch.float64:
            reason = "computes in float32; q is float64"
        elif q.shape[2] > MAX_HEAD_DIM:
            reason = f"takes head dims up to {MAX_HEAD_DIM}, got {q.shape[2]}"
    elif name == "native":
        reason = native.unsupported(q, scale)
    elif name in ("torch", "flash2", "flash4", "xformers"):
        if not q.is_cuda:
            reason = f"needs a CUDA device, q is on {q.device}"
        elif q.dtype not in (torch.float16, torch.bfloat16):
            reason = f"takes float16 or bfloat16, q is {q.dtype}"
        elif q.shape[2] % 8:
            reason = f"needs a head dim that is a multiple of 8, got {q.shape[2]}"
    if reason is not None:
        raise RuntimeError(f"varlen_attention: backend={name!r} {reason}; choose another backend")


def _import(module: str, backend: str, package: str):
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise RuntimeError(
            f"varlen_attention: backend={backend!r} needs the package {package}, which cannot be imported ({error}); "
            f"install it or choose another backend"
        ) from error


def _torch(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale):
    varlen_attn = _import("torch.nn.attention.varlen", "torch", "torch >= 2.10").varlen_attn
    # The oldest of these versions have no argument for the scale.
    q = q * (scale * q.shape[2] ** 0.5) if scale != q.shape[2] ** -0.5 else q
    return varlen_attn(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)


def _flash2(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale):
    attention = _import("flash_attn", "flash2", "flash-attn 2").flash_attn_varlen_func
    return attention(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=scale)


def _flash4(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale):
    attention = _import("flash_attn.cute", "flash4", "flash-attn-4").flash_attn_varlen_func
    out = attention(
        q,
        k,
        v,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        softmax_scale=scale,
    )
    return out[0] if isinstance(out, tuple) else out


def _xformers(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale):
    """Waits for the device: its mask is built from lengths on the host."""
    ops = _import("xformers.ops", "xformers", "xformers")
    lengths_q, lengths_k = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
    mask = ops.fmha.attn_bias.BlockDiagonalMask.from_seqlens(lengths_q, lengths_k, device=q.device)
    return ops.memory_efficient_attention(q[None], k[None], v[None], attn_bias=mask, scale=scale)[0]


def _sdpa(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale):
    sequences = cu_seqlens_q.shape[0] - 1
    uniform = q.shape[0] == sequences * max_seqlen_q and k.shape[0] == sequences * max_seqlen_k
    if q.is_cuda and not uniform:
        raise RuntimeError(
            f"varlen_attention: backend='sdpa' needs sequences of equal length on CUDA, got {q.shape[0]} query and "
            f"{k.shape[0]} key rows in {sequences} sequences of up to {max_seqlen_q} and {max_seqlen_k}"
        )
    return cpu.varlen_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale)


def _reference(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale):
    return reference.varlen_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, scale)


# (q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale) -> out; the other two are our own.
FUNCTIONS = {
    "torch": _torch,
    "flash2": _flash2,
    "flash4": _flash4,
    "xformers": _xformers,
    "sdpa": _sdpa,
    "reference": _reference,
}
