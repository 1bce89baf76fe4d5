"""Work of a training step in floating-point operations, from plain sizes and real token counts: what methods share.

Counted as torch.utils.flop_counter counts: two operations for each multiply-add of a matrix product, attention
included, element-wise work left out. The backward pass of a product costs twice its forward, or once where no gradient
flows to the input (patch embedding). Nothing is counted for recomputation. Functions take the sequences of a batch and
return the work of the batch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

# Dense peak of a GPU in bf16 (fp16 on a V100), FLOP/s: data sheets.
PEAKS = {"H200": 989e12, "H100": 989e12, "GH200": 989e12, "A100": 312e12, "V100": 125e12}
# Its memory, bytes: data sheets; the larger one where there are two.
MEMORIES = {"H200": 141e9, "H100": 80e9, "GH200": 96e9, "A100": 80e9, "V100": 32e9}


@dataclass(frozen=True)
class Transformer:
    """Sizes of a stack of pre-norm blocks."""

    dim: int
    depth: int
    mlp_ratio: float = 4.0

    def forward(self, lengths: Iterable[int], queries: Iterable[int] | None = None) -> int:
        """Forward work on sequences of `lengths` tokens. Where `queries` is given, the last block computes only that
        many rows of each sequence; its keys and values are still those of all tokens.
        """
        lengths = list(lengths)
        full = sum(self._block(n, n) for n in lengths)
        if queries is None or not self.depth:
            return self.depth * full
        last = sum(self._block(n, q) for n, q in zip(lengths, queries, strict=True))
        return (self.depth - 1) * full + last

    def saved_values(self, tokens: int, used: int, recompute: bool) -> int:
        """Values that the stack keeps for its backward pass, its last block computing `used` of `tokens` rows.

        Of width `dim`: both LayerNorms' inputs and outputs, queries, keys, values, attention's output; of the MLP's
        hidden width: GELU's input and output. With recomputation each block's two inputs, and all of the block that is
        being recomputed.
        """
        hidden = int(self.dim * self.mlp_ratio)

        def block(rows: int) -> int:
            return tokens * 4 * self.dim + rows * (4 * self.dim + 2 * hidden)

        norm = 2 * used * self.dim
        if recompute:
            return self.depth * 2 * tokens * self.dim + block(tokens) + norm
        return (self.depth - 1) * block(tokens) + block(used) + norm

    def _block(self, tokens: int, queries: int) -> int:
        hidden = int(self.dim * self.mlp_ratio)
        keys_values = 2 * tokens * self.dim * 2 * self.dim
        queries_and_projection = 2 * queries * self.dim * 2 * self.dim
        attention = 2 * queries * tokens * 2 * self.dim
        return keys_values + queries_and_projection + attention + 2 * queries * self.dim * 2 * hidden


@dataclass(frozen=True)
class Work:
    """Forward work of the parts of a step, for a batch."""

    teacher: int  # forward only: I-JEPA's target encoder, iBOT's teacher
    trained: dict[str, int]  # forward and backward, by part
    no_input_gradient: int  # the part of `trained` that embeds pixels

    @property
    def forward(self) -> int:
        """Forward work alone."""
        return self.teacher + sum(self.trained.values())

    @property
    def total(self) -> int:
        """Forward and backward."""
        return self.teacher + 3 * sum(self.trained.values()) - self.no_input_gradient


def linear(rows: int, inputs: int, outputs: int) -> int:
    """A matrix product of (rows, inputs) by (inputs, outputs)."""
    return 2 * rows * inputs * outputs
