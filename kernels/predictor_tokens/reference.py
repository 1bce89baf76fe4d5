"""The predictor's input and the read-out of its mask rows, in plain PyTorch: what the two ops mean.

The predictor sees one sequence for every (target block m, context mask c, image b): the context tokens of (c, b), then
one mask token for each of the K patches of target block (m, b), each row with its position added. Sequences are
ordered (m, c, b), so the rows of one target block have the same layout for every m: context row t of sequence
s = c*B + b is row t + s*K of its block, and mask token k of sequence s is row context_cu_seqlens[s + 1] + s*K + k.
Further context sequences, s >= C*B, are padding: they follow those of every block, and have no mask tokens.

T context tokens; M targets, C contexts, B images, K patches per target; L = T + C*B*K rows per target block; D width.
"""

from __future__ import annotations

import torch


def context_rows(context_cu_seqlens: torch.Tensor, tokens: int, sequences: int, size: int) -> torch.Tensor:
    """(T,) int64: where each context token goes among the L rows of a target block; `sequences` are not padding."""
    token = torch.arange(tokens, device=context_cu_seqlens.device)
    sequence = torch.searchsorted(context_cu_seqlens[1:].long(), token, right=True)
    return token + sequence.clamp(max=sequences) * size


def mask_rows(context_cu_seqlens: torch.Tensor, sequences: int, size: int) -> torch.Tensor:
    """(C*B*K,) int64: where each mask token, in order (c, b, k), goes among the L rows of a target block."""
    ends = context_cu_seqlens[1 : sequences + 1].long()
    mask_token = torch.arange(ends.shape[0] * size, device=ends.device).view(-1, size)
    return (ends[:, None] + mask_token).flatten()


def predictor_tokens(
    context: torch.Tensor,
    mask_token: torch.Tensor,
    positions: torch.Tensor,
    context_index: torch.Tensor,
    context_cu_seqlens: torch.Tensor,
    target_index: torch.Tensor,
    sequences: int,
    patches: int,
) -> torch.Tensor:
    """context (T, D), mask_token (D,), positions (N, D), indices as in MaskDraw -> (M*L, D) in context's dtype."""
    targets, _, size = target_index.shape
    tokens, width = context.shape
    positions = positions.to(context.dtype)
    context = context + positions.index_select(0, context_index % patches)
    masks = mask_token.to(context.dtype) + positions.index_select(0, target_index.flatten() % patches)
    masks = masks.view(targets, 1, -1, width).expand(-1, sequences // target_index.shape[1], -1, -1).flatten(1, 2)

    mask_tokens = mask_rows(context_cu_seqlens, sequences, size)
    rows = torch.cat([context_rows(context_cu_seqlens, tokens, sequences, size), mask_tokens])
    block = torch.cat([context.expand(targets, -1, -1), masks], 1)
    return block.index_select(1, _inverse(rows)).flatten(0, 1)


def predictor_readout(
    tokens: torch.Tensor, context_cu_seqlens: torch.Tensor, targets: int, sequences: int, size: int
) -> torch.Tensor:
    """tokens (M*L, D) as laid out by `predictor_tokens` -> its mask rows in order (m, c, b, k), (M*C*B*K, D)."""
    rows = mask_rows(context_cu_seqlens, sequences, size)
    return tokens.unflatten(0, (targets, -1)).index_select(1, rows).flatten(0, 1)


def _inverse(permutation: torch.Tensor) -> torch.Tensor:
    numbers = torch.arange(permutation.shape[0], device=permutation.device)
    return torch.empty_like(permutation).scatter_(0, permutation, numbers)
