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
        grid: (rows, columns) of patches, n = 1 + rows*columns.
        heads: H.
    """

    index: torch.Tensor  # (n*n,) rows of the table

    def __init__(self, grid: tuple[int, int], heads: int):
        super().__init__()
        self.tokens = 1 + grid[0] * grid[1]
        offsets = (2 * grid[0] - 1) * (2 * grid[1] - 1)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(offsets + 3, heads))
        self.register_buffer("index", relative_index(grid).flatten(), persistent=False)

    def forward(self) -> torch.Tensor:
        """The bias (H, n, n) of every block."""
        return self.relative_position_bias_table.t()[:, self.index].view(-1, self.tokens, self.tokens)


def relative_index(grid: tuple[int, int]) -> torch.Tensor:
    """(n, n) int64: the row of the table for a query token and a key token.

    Offsets are counted row-major; behind them come class token to patch, patch to class token, class token to itself.
    """
    places, width = torch.arange(grid[0] * grid[1]), 2 * grid[1] - 1
    row, column = places // grid[1], places % grid[1]
    index = torch.empty(1 + len(places), 1 + len(places), dtype=torch.int64)
    rows, columns = row[:, None] - row[None], column[:, None] - column[None]
    index[1:, 1:] = (rows + grid[0] - 1) * width + columns + grid[1] - 1
    offsets = (2 * grid[0] - 1) * width
    index[0], index[:, 0], index[0, 0] = offsets, offsets + 1, offsets + 2
    return index


def resample_table(table: torch.Tensor, old: tuple[int, int], grid: tuple[int, int]) -> torch.Tensor:
    """A table of the grid `old` -> one of `grid`, bicubic; the class token's rows stay."""
    if old == grid:
        return table
    offsets = table[:-3].t().reshape(1, -1, 2 * old[0] - 1, 2 * old[1] - 1)
    size = (2 * grid[0] - 1, 2 * grid[1] - 1)
    offsets = F.interpolate(offsets, size=size, mode="bicubic", align_corners=False)
    return torch.cat([offsets.flatten(2)[0].t(), table[-3:]])
