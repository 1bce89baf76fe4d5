"""Relative positions (BEiT): a learned bias on the attention scores, shared by all blocks, in the place of a table.

Shapes: n = 1 + N tokens of a sequence, the class token first; H heads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class RelativePositions(nn.Module):
    """A number per head for every offset between two patches, and three with the class token.

    Args:
        side: patches along the square grid, n = 1 + side^2.
        heads: H.
    """

    index: torch.Tensor  # (n*n,) rows of the table

    def __init__(self, side: int, heads: int):
        super().__init__()
        self.tokens = 1 + side**2
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * side - 1) ** 2 + 3, heads))
        self.register_buffer("index", relative_index(side).flatten(), persistent=False)

    def forward(self) -> torch.Tensor:
        """The bias (H, n, n) of every block."""
        return self.relative_position_bias_table.t()[:, self.index].view(-1, self.tokens, self.tokens)


def relative_index(side: int) -> torch.Tensor:
    """(n, n) int64: the row of the table for a query token and a key token.

    Offsets are counted row-major; behind them come class token to patch, patch to class token, class token to itself.
    """
    places = torch.arange(side**2)
    row, column = places // side, places % side
    width = 2 * side - 1
    index = torch.empty(1 + side**2, 1 + side**2, dtype=torch.int64)
    rows, columns = row[:, None] - row[None], column[:, None] - column[None]
    index[1:, 1:] = (rows + side - 1) * width + columns + side - 1
    index[0], index[:, 0], index[0, 0] = width**2, width**2 + 1, width**2 + 2
    return index


def resample_table(table: torch.Tensor, side: int, other: int) -> torch.Tensor:
    """A table of a grid of `side` patches -> one of a grid of `other`, bicubic; the class token's rows stay."""
    if side == other:
        return table
    grid = table[:-3].t().reshape(1, -1, 2 * side - 1, 2 * side - 1)
    grid = F.interpolate(grid, size=(2 * other - 1,) * 2, mode="bicubic", align_corners=False)
    return torch.cat([grid.flatten(2)[0].t(), table[-3:]])
