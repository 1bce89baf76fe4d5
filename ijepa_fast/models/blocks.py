"""The transformer block of every network and what it is made of, and its compilation.

Shapes: T packed tokens, U rows used, D width, H heads.

A block hands on its residual stream and the branch that is still to be added to it, so that the addition and the next
LayerNorm are one pass over memory. A parameter is used only in the `forward` of its module: ZeRO-3 gathers it there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ijepa_fast.kernels.bias_gelu import bias_gelu
from ijepa_fast.kernels.layer_norm import layer_norm
from ijepa_fast.kernels.linear import linear, linear_gelu
from ijepa_fast.kernels.varlen_attention import dense_attention, varlen_attention, varlen_attention_qkv
from ijepa_fast.models.layouts import Biased, Dense, Sequences

EPS = 1e-6  # of every LayerNorm


class LayerNorm(nn.LayerNorm):
    """LayerNorm over D, preceded by the residual addition where a branch is given."""

    def forward(self, x: torch.Tensor, branch: torch.Tensor | None = None) -> Any:
        """`x` (T, D) -> LN(x); with `branch` (T, D) -> (LN(x + branch), x + branch)."""
        return layer_norm(x, self.weight, self.bias, self.eps, branch)


class Linear(nn.Linear):
    def forward(self, x: torch.Tensor, gain: torch.Tensor | None = None) -> torch.Tensor:
        """`x` (T, I) -> (T, O); with `gain` (O,) times it, which is cheaper as a factor of the weights."""
        if gain is None:
            return linear(x, self.weight, self.bias)
        return linear(x, self.weight * gain[:, None], self.bias * gain)


class QKV(nn.Linear):
    """The joint projection to queries, keys and values; queries may be asked for on some rows only."""

    def forward(self, x: torch.Tensor, selected: torch.Tensor | None = None, bias: torch.Tensor | None = None) -> Any:
        """`x` (T, D) -> (T, 3D); with `selected` rows (U, D) -> their queries (U, D), all keys-values (T, 2D).

        bias: (3D,), where it is not the layer's own.
        """
        bias = self.bias if bias is None else bias
        if selected is None:
            return linear(x, self.weight, bias)
        width = x.shape[1]
        queries = linear(selected, self.weight[:width], bias[:width])
        return queries, linear(x, self.weight[width:], bias[width:])


class Attention(nn.Module):
    """Self-attention. key_bias: whether keys have a bias, as queries and values do; BEiT and its kin have none."""

    def __init__(self, dim: int, heads: int, key_bias: bool = True):
        super().__init__()
        self.heads = heads
        self.q_bias = None if key_bias else nn.Parameter(torch.zeros(dim))
        self.v_bias = None if key_bias else nn.Parameter(torch.zeros(dim))
        self.qkv = QKV(dim, 3 * dim, bias=key_bias)
        self.proj = Linear(dim, dim)

    def forward(self, x: torch.Tensor, sequences: Sequences, gain: torch.Tensor | None = None) -> torch.Tensor:
        """Normalised tokens `x` (T, D) -> (T, D), or the wanted rows (U, D); times `gain` (D,)."""
        head_dim = x.shape[1] // self.heads
        bias = None
        if self.q_bias is not None and self.v_bias is not None:
            bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        if isinstance(sequences, Biased):
            if sequences.rows is None:
                q, k, v = self.qkv(x, None, bias).view(-1, 3, self.heads, head_dim).unbind(1)
            else:
                q, keys_values = self.qkv(x, sequences.queries(x), bias)
                k, v = keys_values.view(-1, 2, self.heads, head_dim).unbind(1)
            out = sequences.attend(q.view(-1, self.heads, head_dim), k, v)
        elif isinstance(sequences, Dense):
            out = dense_attention(self.qkv(x, None, bias).view(sequences.count, -1, 3, self.heads, head_dim))
        elif sequences.rows is None:
            qkv = self.qkv(x, None, bias).view(-1, 3, self.heads, head_dim)
            out = varlen_attention_qkv(qkv, sequences.cu_seqlens, sequences.max_seqlen)
        else:
            rows = sequences.rows
            queries, keys_values = self.qkv(x, rows.pick(x), bias)
            queries = queries.view(-1, self.heads, head_dim)
            keys, values = keys_values.view(-1, 2, self.heads, head_dim).unbind(1)
            ends, longest = (rows.cu_seqlens, sequences.cu_seqlens), (rows.max_seqlen, sequences.max_seqlen)
            out = varlen_attention(queries, keys, values, *ends, *longest)
        return self.proj(out.reshape(-1, x.shape[1]), gain)


class LinearGELU(nn.Linear):
    """Linear, then exact GELU."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x` (T, D) -> (T, F)."""
        return linear_gelu(x, self.weight, self.bias, bias_gelu)


class MLP(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = LinearGELU(dim, hidden)
        self.fc2 = Linear(hidden, dim)

    def forward(self, x: torch.Tensor, gain: torch.Tensor | None = None) -> torch.Tensor:
        """`x` (T, D) -> (T, D), times `gain` (D,)."""
        return self.fc2(self.fc1(x), gain)


class Block(nn.Module):
    """Pre-norm transformer block. layer_scale: what the branches' gains begin as; 0: they have none."""

    def __init__(
        self,
        dim: int,
        heads: int,
        mlp_ratio: float,
        eps: float = EPS,
        layer_scale: float = 0.0,
        key_bias: bool = True,
    ):
        super().__init__()
        self.gamma_1 = nn.Parameter(torch.full((dim,), layer_scale)) if layer_scale else None
        self.gamma_2 = nn.Parameter(torch.full((dim,), layer_scale)) if layer_scale else None
        self.norm1 = LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, heads, key_bias)
        self.norm2 = LayerNorm(dim, eps=eps)
        self.mlp = MLP(dim, int(dim * mlp_ratio))

    def forward(
        self, x: torch.Tensor, branch: torch.Tensor | None, sequences: Sequences
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Residual stream `x` (T, D), `branch` (T, D) to add to it -> the same two, of the wanted rows (U, D)."""
        normed, x = (self.norm1(x), x) if branch is None else self.norm1(x, branch)
        branch = self.attn(normed, sequences, self.gamma_1)
        normed, x = self.norm2(sequences.select(x), sequences.scale(branch, 0))
        return x, sequences.scale(self.mlp(normed, self.gamma_2), 1)


def run_blocks(
    blocks: Iterable[Callable],
    norm: LayerNorm,
    x: torch.Tensor,
    branch: torch.Tensor | None,
    sequences: Sequences,
    last: Sequences | None = None,
    recompute: bool = False,
    keep: list[torch.Tensor | None] | None = None,
    measured: torch.Tensor | None = None,
) -> torch.Tensor:
    """All `blocks` and the final `norm`: (T, D) -> (T, D), or (U, D) where `last` describes the last block's rows.

    keep: `keep` of each block's layout. measured: what `measure` writes of the last block's output into.
    """
    blocks = list(blocks)
    for i, block in enumerate(blocks):
        layout = last if last is not None and i == len(blocks) - 1 else sequences
        if keep is not None:
            layout = replace(layout, keep=keep[i])
        if recompute and torch.is_grad_enabled():
            # Nothing is random; and a CUDA graph could not capture the reading of the generator's state.
            x, branch = checkpoint(block, x, branch, layout, use_reentrant=False, preserve_rng_state=False)
        else:
            x, branch = block(x, branch, layout)
    normed, output = norm(x, branch)
    measure(output, measured)
    return normed


def measure(output: torch.Tensor, into: torch.Tensor | None) -> None:
    """Write the mean square of a block's `output` (T, D) into the fp32 scalar `into`; None: nothing.

    In place, so that a CUDA graph's replay writes it too.
    """
    if into is not None:
        into.copy_(output.detach().float().square().mean())


def compile_blocks(*networks: nn.Module, **options: Any) -> None:
    """Let torch.compile take every Block of `networks`, one by one; `options` are its own.

    Blocks of one kind share their code, so depth costs no compilation, and token counts are run-time values. A step has
    eight kinds: first, inner and last block of the target encoder, first and inner of the context encoder, first, inner
    and last of the predictor. Dynamo's limit of eight would send the ninth, of a probe say, back to eager unasked.
    """
    torch._dynamo.config.recompile_limit = max(32, torch._dynamo.config.recompile_limit)
    for network in networks:
        for module in network.modules():
            if isinstance(module, Block):
                module.compile(**{"dynamic": True} | options)
