"""How the sequences of a batch lie in its tokens, and which of their rows are wanted: what a block is run on.

Shapes: T tokens in all, U or R wanted rows, D width; B sequences of n tokens, K wanted rows of one at most; H heads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ijepa_fast.kernels.masked_gather import masked_gather
from ijepa_fast.masks.blocks import MaskedRows

# Tokens per sequence up to which attention in bf16 on a CPU is written out, scores in memory: with a bias PyTorch's
# fused one took three times as long there, forward and backward, at 197 (docs/LOG.md).
WRITTEN_OUT = 1024


@dataclass(frozen=True)
class Dense:
    """`count` sequences of equal length, all of whose outputs are wanted.

    keep: (2, count) factors of a block's two branches for each sequence: 0 where stochastic depth drops it.
    """

    count: int
    keep: torch.Tensor | None = None

    def select(self, x: torch.Tensor) -> torch.Tensor:
        """The wanted rows of `x` (T, D): all."""
        return x

    def scale(self, branch: torch.Tensor, number: int) -> torch.Tensor:
        """The `branch` number of a block: each sequence times its factor."""
        return branch if self.keep is None else _by_sequence(branch, self.keep[number])


@dataclass(frozen=True)
class Rows:
    """Rows whose outputs alone are wanted.

    pick: (T, D) -> (U, D). They lie in sequences of their own, cu_seqlens (n+1,) int32, none longer than max_seqlen.
    """

    pick: Callable[[torch.Tensor], torch.Tensor]
    cu_seqlens: torch.Tensor
    max_seqlen: int


@dataclass(frozen=True)
class Packed:
    """Sequences of any length: cu_seqlens (n+1,) int32, none longer than max_seqlen.

    rows: the wanted ones; None: all. keep: (2, n) factors of a block's two branches for each sequence: 0 where
    stochastic depth drops it.
    """

    cu_seqlens: torch.Tensor
    max_seqlen: int
    rows: Rows | None = None
    keep: torch.Tensor | None = None

    def select(self, x: torch.Tensor) -> torch.Tensor:
        """The wanted rows of `x` (T, D)."""
        return x if self.rows is None else self.rows.pick(x)

    def scale(self, branch: torch.Tensor, number: int) -> torch.Tensor:
        """The branch `number` of a block, in wanted rows: each sequence times its factor."""
        if self.keep is None:
            return branch
        lengths = (self.cu_seqlens if self.rows is None else self.rows.cu_seqlens).diff()
        factor = self.keep[number].to(branch.dtype).repeat_interleave(lengths, output_size=len(branch))
        return branch * factor[:, None]


@dataclass(frozen=True)
class Biased:
    """`count` sequences of equal length whose scores get `bias` (H, n, n), where there is one (models/relative.py).

    Their attention is PyTorch's, with a mask, not a kernel of this project.

    rows: the wanted ones; None: all. keep: (2, count) factors of a block's two branches for each sequence: 0 where
    stochastic depth drops it.
    """

    count: int
    bias: torch.Tensor | None
    rows: MaskedRows | None = None
    keep: torch.Tensor | None = None

    def select(self, x: torch.Tensor) -> torch.Tensor:
        """The wanted rows of `x` (B*n, D)."""
        return x if self.rows is None else masked_gather(x, self.rows.index, unique=True)

    def scale(self, branch: torch.Tensor, number: int) -> torch.Tensor:
        """The branch `number` of a block, in wanted rows: each sequence times its factor."""
        if self.keep is None:
            return branch
        if self.rows is None:
            return _by_sequence(branch, self.keep[number])
        factor = self.keep[number].to(branch.dtype)
        return branch * factor.repeat_interleave(self.rows.lengths, output_size=len(branch))[:, None]

    def queries(self, x: torch.Tensor) -> torch.Tensor:
        """The rows of `x` (B*n, D) whose queries are wanted, as many of each sequence: (B*K, D)."""
        return x if self.rows is None else masked_gather(x, self.rows.padded, unique=self.rows.kept is None)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q (B*K, H, d), of all rows or those of `queries`; k and v (B*n, H, d) -> (R, H, d)."""
        bias, rows = None if self.bias is None else self.bias.to(q.dtype), self.rows
        if rows is not None and bias is not None:
            bias = bias[:, rows.places].unflatten(1, (self.count, -1)).transpose(0, 1)
        q, k, v = (x.unflatten(0, (self.count, -1)).transpose(1, 2) for x in (q, k, v))
        out = _attention(q, k, v, bias).transpose(1, 2).flatten(0, 1)
        return out if rows is None or rows.kept is None else out[rows.kept]


Sequences = Dense | Packed | Biased


def _attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """q (B, H, K, d), k and v (B, H, n, d), bias (H, K, n) or (B, H, K, n) -> (B, H, K, d)."""
    if q.device.type != "cpu" or q.dtype != torch.bfloat16 or k.shape[2] > WRITTEN_OUT:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    scale, keys = q.shape[-1] ** -0.5, k.transpose(-2, -1)
    if bias is None:
        return ((q * scale) @ keys).softmax(-1) @ v
    scores = torch.baddbmm(  # rounded once
        bias.expand(*q.shape[:3], k.shape[2]).flatten(0, 1), q.flatten(0, 1), keys.flatten(0, 1), alpha=scale
    )
    return scores.view(*q.shape[:3], -1).softmax(-1) @ v


def _by_sequence(branch: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """`branch` (I*n, D) of I sequences of equal length, each times its `factor` (I,)."""
    return (branch.view(len(factor), -1, branch.shape[1]) * factor.to(branch.dtype)[:, None, None]).view_as(branch)


def keep_branches(chance: torch.Tensor, drop_path: float) -> list[torch.Tensor | None]:
    """`keep` of each block's layout: 0 where a branch is dropped, else 1 over the chance to be kept.

    chance: numbers in 0..1, (depth, 2, sequences). They come with the batch, not from a generator, so that a resumed
    run drops the same. drop_path: share dropped in the last block, rising linearly from 0 at the first.
    """
    if not drop_path:
        return [None] * len(chance)
    drop = torch.linspace(0, drop_path, len(chance), device=chance.device)[:, None, None]
    return [None, *((chance >= drop) / (1 - drop))[1:]]
