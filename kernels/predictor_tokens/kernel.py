"""The predictor's input in Triton, its backward, the read-out of the mask rows and its backward.

With t a context token of sequence s = c*B + b, at patch i, and k a mask token of target block m at patch j:
    tokens[m, t + s*K]               = context[t] + positions[i]
    tokens[m, end of s + s*K + k]    = mask_token + positions[j]
    dcontext[t] = sum_m dtokens[m, t + s*K]        dmask_token = sum of dtokens over all mask rows
Every context row is read once and written M times; the backward reads the M copies and writes their sum once. The mask
token's gradient is made of one partial sum per program, which column_sum adds in a fixed order. Nothing is atomic.

Further context sequences, s >= C*B, are padding: they have no mask tokens, so t + C*B*K stands for t + s*K there.

A program takes a tile of rows of one sequence, for all M target blocks, and a block of columns. Tiles are of context
rows or of mask rows, never of both: the first `context_tiles` are the context's.

T context tokens; M targets, C contexts, B images, K patches per target; L = T + C*B*K rows per target block; D width;
E sequences of padding.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ijepa_fast.kernels.common.aot import Case
from ijepa_fast.kernels.common.column_sum import column_sum

ROWS, BLOCK_D, WARPS = 16, 128, 8


@triton.jit
def _program(cu_seqlens_ptr, sequences, K, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Of this program: sequence, its first context token, its first row, its length; tile; columns, which exist."""
    sequence = tl.program_id(0)
    start = tl.load(cu_seqlens_ptr + sequence)
    length = tl.load(cu_seqlens_ptr + sequence + 1) - start
    row = start.to(tl.int64) + tl.cast(tl.minimum(sequence, sequences), tl.int64) * K
    columns = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    return sequence, start.to(tl.int64), row, length, tl.program_id(1), columns, columns < D


@triton.jit(do_not_specialize=["L", "K", "B", "N", "sequences", "context_tiles"])
def _predictor_tokens_fwd_kernel(
    context_ptr,  # (T, D)
    mask_token_ptr,  # (D,)
    positions_ptr,  # (N, D)
    context_index_ptr,  # (T,) int32
    cu_seqlens_ptr,  # (C*B + 1,) int32, of the context
    target_index_ptr,  # (M, B, K) int32
    tokens_ptr,  # (M, L, D)
    L,
    K,
    B,
    N,
    sequences,  # C*B
    context_tiles,
    M: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    sequence, start, row, length, tile, columns, in_columns = _program(cu_seqlens_ptr, sequences, K, D, BLOCK_D)
    rows = tl.arange(0, ROWS)
    block = tl.cast(L, tl.int64) * D
    tokens_ptr += row * D + columns[None, :]
    dtype = tokens_ptr.dtype.element_ty
    if tile < context_tiles:
        rows += tile * ROWS
        if tile * ROWS >= length:
            return
        in_rows = rows < length
        mask = in_rows[:, None] & in_columns[None, :]
        patch = tl.load(context_index_ptr + start + rows, mask=in_rows, other=0) % N
        x = tl.load(context_ptr + start * D + rows[:, None] * D + columns[None, :], mask=mask, other=0.0)
        p = tl.load(positions_ptr + patch[:, None] * D + columns[None, :], mask=mask, other=0.0)
        x = (x.to(tl.float32) + p.to(tl.float32)).to(dtype)
        for m in tl.static_range(M):
            tl.store(tokens_ptr + m * block + rows[:, None] * D, x, mask=mask)
    elif sequence < sequences:
        rows += (tile - context_tiles) * ROWS
        in_rows = rows < K
        mask = in_rows[:, None] & in_columns[None, :]
        token = tl.load(mask_token_ptr + columns, mask=in_columns, other=0.0).to(tl.float32)
        for m in tl.static_range(M):
            target = (tl.cast(m, tl.int64) * B + sequence % B) * K
            patch = tl.load(target_index_ptr + target + rows, mask=in_rows, other=0) % N
            p = tl.load(positions_ptr + patch[:, None] * D + columns[None, :], mask=mask, other=0.0)
            x = (token[None, :] + p.to(tl.float32)).to(dtype)
            tl.store(tokens_ptr + m * block + (length + rows)[:, None] * D, x, mask=mask)


@triton.jit(do_not_specialize=["L", "K", "sequences", "context_tiles"])
def _predictor_tokens_bwd_kernel(
    dtokens_ptr,  # (M, L, D)
    cu_seqlens_ptr,  # (C*B + 1,) int32, of the context
    dcontext_ptr,  # (T, D)
    partial_ptr,  # (C*B, mask tiles, D) fp32: dmask_token of each program's rows
    L,
    K,
    sequences,  # C*B
    context_tiles,
    M: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    sequence, start, row, length, tile, columns, in_columns = _program(cu_seqlens_ptr, sequences, K, D, BLOCK_D)
    rows = tl.arange(0, ROWS)
    block = tl.cast(L, tl.int64) * D
    dtokens_ptr += row * D + columns[None, :]
    total = tl.zeros((ROWS, BLOCK_D), tl.float32)
    if tile < context_tiles:
        rows += tile * ROWS
        if tile * ROWS >= length:
            return
        mask = (rows < length)[:, None] & in_columns[None, :]
        for m in tl.static_range(M):
            total += tl.load(dtokens_ptr + m * block + rows[:, None] * D, mask=mask, other=0.0).to(tl.float32)
        dcontext = dcontext_ptr + start * D + rows[:, None] * D + columns[None, :]
        tl.store(dcontext, total.to(dcontext_ptr.dtype.element_ty), mask=mask)
    elif sequence < sequences:
        tile -= context_tiles
        rows += tile * ROWS
        mask = (rows < K)[:, None] & in_columns[None, :]
        for m in tl.static_range(M):
            x = tl.load(dtokens_ptr + m * block + (length + rows)[:, None] * D, mask=mask, other=0.0)
            total += x.to(tl.float32)
        part = tl.cast(sequence, tl.int64) * (tl.num_programs(1) - context_tiles) + tile
        tl.store(partial_ptr + part * D + columns, tl.sum(total, 0), mask=in_columns)


@triton.jit(do_not_specialize=["L", "K", "sequences"])
def _predictor_readout_fwd_kernel(
    tokens_ptr,  # (M, L, D)
    cu_seqlens_ptr,  # (C*B + 1,) int32, of the context
    out_ptr,  # (M, C*B, K, D)
    L,
    K,
    sequences,  # C*B
    M: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    sequence, _, row, length, tile, columns, in_columns = _program(cu_seqlens_ptr, sequences, K, D, BLOCK_D)
    rows = tile * ROWS + tl.arange(0, ROWS)
    mask = (rows < K)[:, None] & in_columns[None, :]
    sequence = tl.cast(sequence, tl.int64)
    tokens_ptr += (row + length) * D + rows[:, None] * D + columns[None, :]
    out_ptr += sequence * K * D + rows[:, None] * D + columns[None, :]
    for m in tl.static_range(M):
        x = tl.load(tokens_ptr + m * tl.cast(L, tl.int64) * D, mask=mask)
        tl.store(out_ptr + m * tl.cast(sequences, tl.int64) * K * D, x, mask=mask)


@triton.jit(do_not_specialize=["L", "K", "sequences", "context_tiles"])
def _predictor_readout_bwd_kernel(
    dout_ptr,  # (M, C*B, K, D)
    cu_seqlens_ptr,  # (C*B + 1,) int32, of the context
    dtokens_ptr,  # (M, L, D): mask rows from dout, zeros elsewhere
    L,
    K,
    sequences,  # C*B
    context_tiles,
    M: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    sequence, _, row, length, tile, columns, in_columns = _program(cu_seqlens_ptr, sequences, K, D, BLOCK_D)
    rows = tl.arange(0, ROWS)
    sequence = tl.cast(sequence, tl.int64)
    block = tl.cast(L, tl.int64) * D
    dtokens_ptr += row * D + columns[None, :]
    if tile < context_tiles:
        rows += tile * ROWS
        mask = (rows < length)[:, None] & in_columns[None, :]
        zero = tl.zeros((ROWS, BLOCK_D), dtokens_ptr.dtype.element_ty)
        for m in tl.static_range(M):
            tl.store(dtokens_ptr + m * block + rows[:, None] * D, zero, mask=mask)
    elif sequence < sequences:
        rows += (tile - context_tiles) * ROWS
        mask = (rows < K)[:, None] & in_columns[None, :]
        source = dout_ptr + sequence * K * D + rows[:, None] * D + columns[None, :]
        for m in tl.static_range(M):
            x = tl.load(source + m * tl.cast(sequences, tl.int64) * K * D, mask=mask)
            tl.store(dtokens_ptr + m * block + (length + rows)[:, None] * D, x, mask=mask)


def _grid(count: int, max_seqlen: int, size: int, width: int) -> tuple[int, int, tuple[int, int, int]]:
    """(tiles of the context, tiles of the mask tokens, grid over both) for `count` sequences, padding among them."""
    context_tiles, mask_tiles = triton.cdiv(max_seqlen, ROWS), triton.cdiv(size, ROWS)
    return context_tiles, mask_tiles, (count, context_tiles + mask_tiles, triton.cdiv(width, BLOCK_D))


def _rows(tokens: int, sequences: int, size: int) -> int:
    return tokens + sequences * size


def predictor_tokens_fwd(
    context, mask_token, positions, context_index, cu_seqlens, target_index, sequences, max_seqlen, patches
):
    """(M*L, D) in context's dtype."""
    targets, images, size = target_index.shape
    width, count = context.shape[1], cu_seqlens.shape[0] - 1
    rows = _rows(context.shape[0], sequences, size)
    tokens = context.new_empty((targets * rows, width))
    context_tiles, _, grid = _grid(count, max_seqlen, size, width)
    _predictor_tokens_fwd_kernel[grid](
        context,
        mask_token,
        positions,
        context_index,
        cu_seqlens,
        target_index,
        tokens,
        rows,
        size,
        images,
        patches,
        sequences,
        context_tiles,
        targets,
        width,
        ROWS,
        BLOCK_D,
        num_warps=WARPS,
    )
    return tokens


def predictor_tokens_bwd(dtokens, mask_token, cu_seqlens, tokens, targets, sequences, size, max_seqlen):
    """(dcontext (tokens, D) in dtokens' dtype, dmask_token (D,) in mask_token's)."""
    width, count = dtokens.shape[1], cu_seqlens.shape[0] - 1
    dcontext = dtokens.new_empty((tokens, width))
    context_tiles, mask_tiles, grid = _grid(count, max_seqlen, size, width)
    partial = torch.empty((sequences * mask_tiles, width), dtype=torch.float32, device=dtokens.device)
    rows = _rows(tokens, sequences, size)
    _predictor_tokens_bwd_kernel[grid](
        dtokens,
        cu_seqlens,
        dcontext,
        partial,
        rows,
        size,
        sequences,
        context_tiles,
        targets,
        width,
        ROWS,
        BLOCK_D,
        num_warps=WARPS,
    )
    return dcontext, column_sum(partial, mask_token.dtype)


def predictor_readout_fwd(tokens, cu_seqlens, targets, sequences, size):
    """(M*C*B*K, D), bit for bit."""
    width = tokens.shape[1]
    out = tokens.new_empty((targets * sequences * size, width))
    _, _, grid = _grid(sequences, 0, size, width)
    rows = tokens.shape[0] // targets
    _predictor_readout_fwd_kernel[grid](
        tokens, cu_seqlens, out, rows, size, sequences, targets, width, ROWS, BLOCK_D, num_warps=WARPS
    )
    return out


def predictor_readout_bwd(dout, cu_seqlens, rows, targets, sequences, size, max_seqlen):
    """(rows, D): `dout` at the mask rows, zeros elsewhere."""
    width, count = dout.shape[1], cu_seqlens.shape[0] - 1
    dtokens = dout.new_empty((rows, width))
    context_tiles, _, grid = _grid(count, max_seqlen, size, width)
    _predictor_readout_bwd_kernel[grid](
        dout,
        cu_seqlens,
        dtokens,
        rows // targets,
        size,
        sequences,
        context_tiles,
        targets,
        width,
        ROWS,
        BLOCK_D,
        num_warps=WARPS,
    )
    return dtokens


def aot_cases(capability: int = 9) -> list[Case]:
    """The published predictors are 384 wide and see four targets."""
    types = {"positions_ptr": "*fp32"}
    types |= dict.fromkeys(("context_index_ptr", "cu_seqlens_ptr", "target_index_ptr"), "*i32")
    constants = {"M": 4, "D": 384, "ROWS": ROWS, "BLOCK_D": BLOCK_D}
    kernels = {
        "predictor_tokens fwd": _predictor_tokens_fwd_kernel,
        "predictor_tokens bwd": _predictor_tokens_bwd_kernel,
        "predictor_readout fwd": _predictor_readout_fwd_kernel,
        "predictor_readout bwd": _predictor_readout_bwd_kernel,
    }
    return [Case(name, kernel, constants, WARPS, types=types) for name, kernel in kernels.items()]
