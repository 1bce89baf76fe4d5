"""The predictor's input and the read-out of its mask rows, in plain PyTorch: what the two ops mean.

The predictor sees one sequence for every (target block m, context mask c, image b): the context tokens of (c, b), then one
mask token for each of the K patches of target block (m, b), each row with its position added. Sequences are ordered
(m, c, b), so the rows of one target block have the same layout for every m: context row t of sequence s = c*B + b is row
t + s*K of its block, and mask token k of sequence s is row context_cu_seqlens[s + 1] + s*K + k.
"""

from __future__ import annotations

import torch


def context_rows(packed) -> torch.Tensor:
    """(T,) int64: where each context token goes among the rows of one target block."""
    token = torch.arange(packed.context_index.shape[0], device=packed.context_index.device)
    sequence = torch.searchsorted(packed.context_cu_seqlens[1:].long(), token, right=True)
    return token + sequence * packed.target_size


def mask_rows(packed) -> torch.Tensor:
    """(C*B*K,) int64: where each mask token, in order (c, b, k), goes among the rows of one target block."""
    ends = packed.context_cu_seqlens[1:].long()
    size = packed.target_size
    offset = torch.arange(ends.shape[0] * size, device=ends.device).view(-1, size)
    return (ends[:, None] + offset).flatten()


def predictor_tokens(context: torch.Tensor, mask_token: torch.Tensor, positions: torch.Tensor, packed) -> torch.Tensor:
    """context (T, D), mask_token (D,), positions (N, D), packed: PackedBatch -> (M*(T + C*B*K), D), in context's dtype."""
    targets, contexts = packed.targets, packed.contexts
    positions = positions.to(context.dtype)
    context = context + positions[packed.context_index.long() % packed.patches]
    masks = mask_token.to(context.dtype) + positions[packed.target_index.long() % packed.patches]
    rows = torch.cat([context_rows(packed), mask_rows(packed)])
    source = torch.cat(
        [
            context.expand(targets, *context.shape),
            masks[:, None].expand(-1, contexts, -1, -1, -1).reshape(targets, -1, context.shape[1]),
        ],
        dim=1,
    )
    order = torch.empty_like(rows).scatter_(0, rows, torch.arange(rows.shape[0], device=rows.device))
    return source.index_select(1, order).flatten(0, 1)


def predictor_readout(tokens: torch.Tensor, packed) -> torch.Tensor:
    """tokens (S, D) as laid out by `predictor_tokens` -> its mask rows in order (m, c, b, k), (M*C*B*K, D)."""
    return tokens.unflatten(0, (packed.targets, -1)).index_select(1, mask_rows(packed)).flatten(0, 1)
