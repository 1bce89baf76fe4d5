"""Attention over packed sequences in Triton, forward and backward; not causal.

Forward, per (sequence, head, query tile), with s = scale q k^T in base 2 and a running maximum over key tiles:
    p = 2^(s - lse)        out = p v        lse = log2 sum 2^s
Backward, with delta = rowsum(dout * out) and ds = p * (dout v^T - delta):
    dv = p^T dout        dk = scale ds^T q        dq = scale ds k
The scores never reach memory, nothing is padded, and no atomics are used, so results are deterministic.

A program takes one tile of one sequence and head; tiles behind a sequence's end leave at once, so nothing about the
lengths but their maximum is needed on the host. Head dims are split as 80 = 64 + 16 and 88 = 64 + 24, each part masked
up to a power of two only, so that a head dim of 80 costs neither the traffic nor the multiplications of 128.

Where one tile holds all keys of a sequence (tiles.WHOLE), a single program per sequence and head makes dq, dk and dv in
one pass over q, k, v and dout, with delta = rowsum(p * dout v^T). Longer sequences of the same batch take two kernels:
a program per query tile (delta, dq), then a program per key tile (dk, dv). Each leaves alone the sequences of the other
kind.

A score of several hundred has an error of 2^-16 in fp32, and so has p = 2^(s - lse), which matters unless p is 16-bit.
For fp32 inputs s and lse are fp64, and scores in the backward are products of the same tiles, so rounded likewise.

Shapes: Tq, Tk packed rows; H heads; HD head dim.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ijepa_fast.kernels.common.aot import Case
from ijepa_fast.kernels.varlen_attention.cpu import lse_dtype
from ijepa_fast.kernels.varlen_attention.tiles import Tile, bwd_tiles, fwd_tile, split, whole_tiles


@triton.jit
def _load(ptr, rows, valid, STRIDE: tl.constexpr, HD: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr):
    """The first HEAD columns of `rows` and the remaining HD - HEAD, zero where not `valid`. No tail: the head twice."""
    columns = tl.arange(0, HEAD)
    pointers = ptr + rows[:, None] * STRIDE
    head = tl.load(pointers + columns[None, :], mask=valid[:, None] & (columns < HD)[None, :], other=0.0)
    tail = head
    if TAIL > 0:
        columns = HEAD + tl.arange(0, TAIL)
        tail = tl.load(pointers + columns[None, :], mask=valid[:, None] & (columns < HD)[None, :], other=0.0)
    return head, tail


@triton.jit
def _store(
    ptr, rows, valid, head, tail, STRIDE: tl.constexpr, HD: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr
):
    columns = tl.arange(0, HEAD)
    pointers = ptr + rows[:, None] * STRIDE
    dtype = ptr.dtype.element_ty
    tl.store(pointers + columns[None, :], head.to(dtype), mask=valid[:, None] & (columns < HD)[None, :])
    if TAIL > 0:
        columns = HEAD + tl.arange(0, TAIL)
        tl.store(pointers + columns[None, :], tail.to(dtype), mask=valid[:, None] & (columns < HD)[None, :])


@triton.jit
def _dot_transposed(a0, a1, b0, b1, TAIL: tl.constexpr):
    """a b^T over both parts of the head dim, in fp32."""
    product = tl.dot(a0, tl.trans(b0), input_precision="ieee")
    if TAIL > 0:
        product = tl.dot(a1, tl.trans(b1), product, input_precision="ieee")
    return product


@triton.jit
def _scores(q0, q1, k0, k1, in_k, scale, dtype: tl.constexpr, TAIL: tl.constexpr):
    """scale q k^T, minus infinity for absent keys."""
    return _dot_transposed(q0, q1, k0, k1, TAIL).to(dtype) * scale + tl.where(in_k, 0.0, float("-inf"))[None, :]


@triton.jit
def _zeros(ROWS: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr):
    head = tl.zeros((ROWS, HEAD), tl.float32)
    tail = head
    if TAIL > 0:
        tail = tl.zeros((ROWS, TAIL), tl.float32)
    return head, tail


@triton.jit
def _bounds(cu_seqlens_ptr, sequence):
    """First row of a sequence, int64, and its length."""
    start = tl.load(cu_seqlens_ptr + sequence)
    return start.to(tl.int64), tl.load(cu_seqlens_ptr + sequence + 1) - start


@triton.jit(do_not_specialize=["Tq", "tiles"])
def _varlen_attention_fwd_kernel(
    q_ptr,  # (Tq, H, HD), rows Q_STRIDE apart
    k_ptr,  # (Tk, H, HD), rows K_STRIDE apart
    v_ptr,  # (Tk, H, HD), rows V_STRIDE apart
    out_ptr,  # (Tq, H, HD)
    lse_ptr,  # (H, Tq), base 2; fp64 for fp32 inputs, else fp32
    cu_q_ptr,  # (S + 1,) int32
    cu_k_ptr,  # (S + 1,) int32
    scale,
    Tq,
    tiles,  # query tiles of the longest sequence
    H: tl.constexpr,
    HD: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    Q_STRIDE: tl.constexpr,
    K_STRIDE: tl.constexpr,
    V_STRIDE: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    program = tl.program_id(0)
    tile = program % tiles
    head = (program // tiles) % H
    sequence = program // (tiles * H)
    q_start, q_len = _bounds(cu_q_ptr, sequence)
    first = tile * BLOCK_Q
    if first >= q_len:
        return
    k_start, k_len = _bounds(cu_k_ptr, sequence)
    k_ptr += k_start * K_STRIDE + head * HD
    v_ptr += k_start * V_STRIDE + head * HD

    rows = first + tl.arange(0, BLOCK_Q)
    in_q = rows < q_len
    q0, q1 = _load(q_ptr + q_start * Q_STRIDE + head * HD, rows, in_q, Q_STRIDE, HD, HEAD, TAIL)
    scale_2 = scale * 1.4426950408889634
    maximum = tl.full((BLOCK_Q,), float("-inf"), lse_ptr.dtype.element_ty)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    out0, out1 = _zeros(BLOCK_Q, HEAD, TAIL)
    for start in range(0, k_len, BLOCK_K):
        keys = start + tl.arange(0, BLOCK_K)
        in_k = keys < k_len
        k0, k1 = _load(k_ptr, keys, in_k, K_STRIDE, HD, HEAD, TAIL)
        s = _scores(q0, q1, k0, k1, in_k, scale_2, lse_ptr.dtype.element_ty, TAIL)
        new_maximum = tl.maximum(maximum, tl.max(s, 1))
        correction = tl.exp2((maximum - new_maximum).to(tl.float32))
        p = tl.exp2((s - new_maximum[:, None]).to(tl.float32))
        total = total * correction + tl.sum(p, 1)
        maximum = new_maximum
        v0, v1 = _load(v_ptr, keys, in_k, V_STRIDE, HD, HEAD, TAIL)
        p = p.to(v0.dtype)
        out0 = tl.dot(p, v0, out0 * correction[:, None], input_precision="ieee")
        if TAIL > 0:
            out1 = tl.dot(p, v1, out1 * correction[:, None], input_precision="ieee")

    # A sequence without keys: zeros, and an lse that keeps the backward finite.
    some = total > 0
    inverse = (1.0 / tl.where(some, total, 1.0))[:, None]
    lse = tl.where(some, maximum, 0.0) + tl.log2(tl.where(some, total, 1.0))
    tl.store(lse_ptr + head.to(tl.int64) * Tq + q_start + rows, lse, mask=in_q)
    out0 *= inverse
    if TAIL > 0:
        out1 *= inverse
    _store(out_ptr + (q_start * H + head) * HD, rows, in_q, out0, out1, H * HD, HD, HEAD, TAIL)


@triton.jit(do_not_specialize=["Tq", "tiles"])
def _varlen_attention_bwd_queries_kernel(
    dout_ptr,  # (Tq, H, HD)
    q_ptr,  # (Tq, H, HD), rows Q_STRIDE apart
    k_ptr,  # (Tk, H, HD), rows K_STRIDE apart
    v_ptr,  # (Tk, H, HD), rows V_STRIDE apart
    out_ptr,  # (Tq, H, HD)
    lse_ptr,  # (H, Tq), base 2; fp64 for fp32 inputs, else fp32
    delta_ptr,  # (H, Tq) fp32: written, for the key tiles
    dq_ptr,  # (Tq, H, HD), rows DQ_STRIDE apart
    cu_q_ptr,  # (S + 1,) int32
    cu_k_ptr,  # (S + 1,) int32
    scale,
    Tq,
    tiles,  # query tiles of the longest sequence
    H: tl.constexpr,
    HD: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    Q_STRIDE: tl.constexpr,
    K_STRIDE: tl.constexpr,
    V_STRIDE: tl.constexpr,
    DQ_STRIDE: tl.constexpr,
    SKIP: tl.constexpr,  # key sequences of at most this length are left to another launch
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    program = tl.program_id(0)
    tile = program % tiles
    head = (program // tiles) % H
    sequence = program // (tiles * H)
    q_start, q_len = _bounds(cu_q_ptr, sequence)
    first = tile * BLOCK_Q
    k_start, k_len = _bounds(cu_k_ptr, sequence)
    if first >= q_len or k_len <= SKIP:
        return
    k_ptr += k_start * K_STRIDE + head * HD
    v_ptr += k_start * V_STRIDE + head * HD
    out_offset = (q_start * H + head) * HD
    statistics = head.to(tl.int64) * Tq + q_start

    rows = first + tl.arange(0, BLOCK_Q)
    in_q = rows < q_len
    q0, q1 = _load(q_ptr + q_start * Q_STRIDE + head * HD, rows, in_q, Q_STRIDE, HD, HEAD, TAIL)
    g0, g1 = _load(dout_ptr + out_offset, rows, in_q, H * HD, HD, HEAD, TAIL)
    o0, o1 = _load(out_ptr + out_offset, rows, in_q, H * HD, HD, HEAD, TAIL)
    delta = tl.sum(g0.to(tl.float32) * o0.to(tl.float32), 1)
    if TAIL > 0:
        delta += tl.sum(g1.to(tl.float32) * o1.to(tl.float32), 1)
    tl.store(delta_ptr + statistics + rows, delta, mask=in_q)
    lse = tl.load(lse_ptr + statistics + rows, mask=in_q, other=0.0)
    scale_2 = scale * 1.4426950408889634

    dq0, dq1 = _zeros(BLOCK_Q, HEAD, TAIL)
    for start in range(0, k_len, BLOCK_K):
        keys = start + tl.arange(0, BLOCK_K)
        in_k = keys < k_len
        k0, k1 = _load(k_ptr, keys, in_k, K_STRIDE, HD, HEAD, TAIL)
        v0, v1 = _load(v_ptr, keys, in_k, V_STRIDE, HD, HEAD, TAIL)
        s = _scores(q0, q1, k0, k1, in_k, scale_2, lse_ptr.dtype.element_ty, TAIL)
        p = tl.exp2((s - lse[:, None]).to(tl.float32))
        ds = (p * (_dot_transposed(g0, g1, v0, v1, TAIL) - delta[:, None])).to(k0.dtype)
        dq0 = tl.dot(ds, k0, dq0, input_precision="ieee")
        if TAIL > 0:
            dq1 = tl.dot(ds, k1, dq1, input_precision="ieee")
    dq0 *= scale
    if TAIL > 0:
        dq1 *= scale
    _store(dq_ptr + q_start * DQ_STRIDE + head * HD, rows, in_q, dq0, dq1, DQ_STRIDE, HD, HEAD, TAIL)


@triton.jit(do_not_specialize=["Tq", "tiles"])
def _varlen_attention_bwd_keys_kernel(
    dout_ptr,  # (Tq, H, HD)
    q_ptr,  # (Tq, H, HD), rows Q_STRIDE apart
    k_ptr,  # (Tk, H, HD), rows K_STRIDE apart
    v_ptr,  # (Tk, H, HD), rows V_STRIDE apart
    lse_ptr,  # (H, Tq), base 2; fp64 for fp32 inputs, else fp32
    delta_ptr,  # (H, Tq) fp32; None where one tile holds all keys
    dq_ptr,  # (Tq, H, HD), rows DQ_STRIDE apart; written only where one tile holds all keys
    dk_ptr,  # (Tk, H, HD), rows DKV_STRIDE apart
    dv_ptr,  # (Tk, H, HD), rows DKV_STRIDE apart
    cu_q_ptr,  # (S + 1,) int32
    cu_k_ptr,  # (S + 1,) int32
    scale,
    Tq,
    tiles,  # key tiles of the longest sequence; 1 where one tile holds all keys
    H: tl.constexpr,
    HD: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    Q_STRIDE: tl.constexpr,
    K_STRIDE: tl.constexpr,
    V_STRIDE: tl.constexpr,
    DQ_STRIDE: tl.constexpr,
    DKV_STRIDE: tl.constexpr,
    SKIP: tl.constexpr,  # key sequences of at most this length are left to another launch
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    whole: tl.constexpr = delta_ptr is None
    program = tl.program_id(0)
    tile = program % tiles
    head = (program // tiles) % H
    sequence = program // (tiles * H)
    k_start, k_len = _bounds(cu_k_ptr, sequence)
    first = tile * BLOCK_K
    if whole:
        if k_len > BLOCK_K:
            return
    elif first >= k_len or k_len <= SKIP:
        return
    q_start, q_len = _bounds(cu_q_ptr, sequence)
    q_ptr += q_start * Q_STRIDE + head * HD
    dq_ptr += q_start * DQ_STRIDE + head * HD
    dout_ptr += (q_start * H + head) * HD
    statistics = head.to(tl.int64) * Tq + q_start

    keys = first + tl.arange(0, BLOCK_K)
    in_k = keys < k_len
    k0, k1 = _load(k_ptr + k_start * K_STRIDE + head * HD, keys, in_k, K_STRIDE, HD, HEAD, TAIL)
    v0, v1 = _load(v_ptr + k_start * V_STRIDE + head * HD, keys, in_k, V_STRIDE, HD, HEAD, TAIL)
    absent = tl.where(in_k, 0.0, float("-inf"))[:, None]
    scale_2 = scale * 1.4426950408889634

    dk0, dk1 = _zeros(BLOCK_K, HEAD, TAIL)
    dv0, dv1 = _zeros(BLOCK_K, HEAD, TAIL)
    for start in range(0, q_len, BLOCK_Q):
        rows = start + tl.arange(0, BLOCK_Q)
        in_q = rows < q_len
        q0, q1 = _load(q_ptr, rows, in_q, Q_STRIDE, HD, HEAD, TAIL)
        g0, g1 = _load(dout_ptr, rows, in_q, H * HD, HD, HEAD, TAIL)
        lse = tl.load(lse_ptr + statistics + rows, mask=in_q, other=0.0)
        # Transposed, (keys, queries): p and ds are then left operands as they are. Absent queries have zero q and dout.
        if q_ptr.dtype.element_ty == tl.float32:
            s = _scores(q0, q1, k0, k1, in_k, scale_2, lse_ptr.dtype.element_ty, TAIL)
            p = tl.trans(tl.exp2((s - lse[:, None]).to(tl.float32)))
        else:
            p = tl.exp2(_dot_transposed(k0, k1, q0, q1, TAIL) * scale_2 + (absent - lse[None, :]))
        p_low = p.to(g0.dtype)
        dv0 = tl.dot(p_low, g0, dv0, input_precision="ieee")
        if TAIL > 0:
            dv1 = tl.dot(p_low, g1, dv1, input_precision="ieee")
        dp = _dot_transposed(v0, v1, g0, g1, TAIL)
        if whole:
            delta = tl.sum(p * dp, 0)
        else:
            delta = tl.load(delta_ptr + statistics + rows, mask=in_q, other=0.0)
        ds = (p * (dp - delta[None, :])).to(q0.dtype)
        dk0 = tl.dot(ds, q0, dk0, input_precision="ieee")
        if TAIL > 0:
            dk1 = tl.dot(ds, q1, dk1, input_precision="ieee")
        if whole:
            ds = tl.trans(ds)
            dq0 = tl.dot(ds, k0, input_precision="ieee") * scale
            dq1 = dq0
            if TAIL > 0:
                dq1 = tl.dot(ds, k1, input_precision="ieee") * scale
            _store(dq_ptr, rows, in_q, dq0, dq1, DQ_STRIDE, HD, HEAD, TAIL)

    dk0 *= scale
    if TAIL > 0:
        dk1 *= scale
    _store(dk_ptr + k_start * DKV_STRIDE + head * HD, keys, in_k, dk0, dk1, DKV_STRIDE, HD, HEAD, TAIL)
    _store(dv_ptr + k_start * DKV_STRIDE + head * HD, keys, in_k, dv0, dv1, DKV_STRIDE, HD, HEAD, TAIL)


def _capability(x: torch.Tensor) -> int:
    return torch.cuda.get_device_capability(x.device)[0] if x.is_cuda else 9


def _constants(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> dict[str, int]:
    heads, head_dim = q.shape[1:]
    strides = {"Q_STRIDE": q.stride(0), "K_STRIDE": k.stride(0), "V_STRIDE": v.stride(0)}
    return {"H": heads, "HD": head_dim, **split(head_dim), **strides}


def _launch(kernel, sequences: int, tiles: int, tile: Tile, constants: dict[str, int], *args) -> None:
    programs = sequences * constants["H"] * tiles
    if programs:
        blocks = {"BLOCK_Q": tile.queries, "BLOCK_K": tile.keys}
        kernel[(programs,)](*args, tiles, **constants, **blocks, num_warps=tile.warps, num_stages=tile.stages)


def varlen_attention_fwd(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale):
    """(out (Tq, H, HD), lse (H, Tq) in base 2, of `cpu.lse_dtype`)."""
    tokens, heads, head_dim = q.shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty((heads, tokens), dtype=lse_dtype(q.dtype), device=q.device)
    tile = fwd_tile(head_dim, q.element_size())
    sequences, tiles = cu_seqlens_q.shape[0] - 1, triton.cdiv(max_seqlen_q, tile.queries)
    args = (q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, scale, tokens)
    _launch(_varlen_attention_fwd_kernel, sequences, tiles, tile, _constants(q, k, v), *args)
    return out, lse


def varlen_attention_bwd(
    dout, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, gradients=None
):
    """(dq, dk, dv), contiguous unless `gradients` gives tensors to write into (those of dk and dv of equal strides)."""
    if gradients is None:
        gradients = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
    dq, dk, dv = gradients
    tokens, _, head_dim = q.shape
    device = _capability(q), head_dim, q.element_size()
    sequences = cu_seqlens_q.shape[0] - 1
    constants = {**_constants(q, k, v), "DQ_STRIDE": dq.stride(0)}
    sides = (cu_seqlens_q, cu_seqlens_k, scale, tokens)

    wholes = whole_tiles(*device)
    whole = next((tile for tile in wholes if tile.keys >= max_seqlen_k), wholes[-1] if wholes else None)
    skip = whole.keys if whole else -1
    uniform = k.shape[0] == sequences * max_seqlen_k
    if whole and (max_seqlen_k <= skip or not uniform):
        args = (dout, q, k, v, lse, None, dq, dk, dv, *sides)
        key_constants = {**constants, "DKV_STRIDE": dk.stride(0), "SKIP": -1}
        _launch(_varlen_attention_bwd_keys_kernel, sequences, 1, whole, key_constants, *args)
    if max_seqlen_k > skip:
        query_tile, key_tile = bwd_tiles(*device)
        delta = torch.empty_like(lse, dtype=torch.float32)
        tiles = triton.cdiv(max_seqlen_q, query_tile.queries)
        args = (dout, q, k, v, out, lse, delta, dq, *sides)
        query_constants = {**constants, "SKIP": skip}
        _launch(_varlen_attention_bwd_queries_kernel, sequences, tiles, query_tile, query_constants, *args)
        tiles = triton.cdiv(max_seqlen_k, key_tile.keys)
        args = (dout, q, k, v, lse, delta, dq, dk, dv, *sides)
        key_constants = {**constants, "DKV_STRIDE": dk.stride(0), "SKIP": skip}
        _launch(_varlen_attention_bwd_keys_kernel, sequences, tiles, key_tile, key_constants, *args)
    return dq, dk, dv


def varlen_attention_qkv_bwd(dout, qkv, out, lse, cu_seqlens, max_seqlen, scale):
    """dqkv (T, 3, H, HD), each part written in place."""
    dqkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    lengths = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    varlen_attention_bwd(dout, *qkv.unbind(1), out, lse, *lengths, scale, gradients=dqkv.unbind(1))
    return dqkv


def aot_cases(capability: int = 9) -> list[Case]:
    """The head dims of the published encoders and predictors (384 wide, the encoder's heads)."""
    types = {"lse_ptr": "*fp32", "delta_ptr": "*fp32", "cu_q_ptr": "*i32", "cu_k_ptr": "*i32", "scale": "fp32"}
    models = {64: "S/16 B/16 L/16", 80: "H/14 H/16-448", 88: "g/16", 32: "predictor B/16", 24: "predictor L H g"}
    cases = []
    for head_dim, model in models.items():
        heads = 12 if head_dim == 32 else 16
        strides = dict.fromkeys(("Q_STRIDE", "K_STRIDE", "V_STRIDE", "DQ_STRIDE", "DKV_STRIDE"), 3 * heads * head_dim)
        common = {"H": heads, "HD": head_dim, **split(head_dim), **strides}
        query_tile, key_tile = bwd_tiles(capability, head_dim, 2)
        kernels = [
            ("fwd", _varlen_attention_fwd_kernel, {}, fwd_tile(head_dim, 2)),
            ("bwd queries", _varlen_attention_bwd_queries_kernel, {"SKIP": 0}, query_tile),
            ("bwd keys", _varlen_attention_bwd_keys_kernel, {"SKIP": 0}, key_tile),
        ]
        for tile in whole_tiles(capability, head_dim, 2):
            extra = {"SKIP": -1, "delta_ptr": None}
            kernels.append((f"bwd whole {tile.keys}", _varlen_attention_bwd_keys_kernel, extra, tile))
        for part, kernel, extra, tile in kernels:
            constants = {**common, **extra, "BLOCK_Q": tile.queries, "BLOCK_K": tile.keys}
            constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
            name = f"varlen_attention {part} hd={head_dim} ({model})"
            cases.append(Case(name, kernel, constants, tile.warps, tile.stages, types))
    return cases
