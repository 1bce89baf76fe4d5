"""Fixed two-dimensional sine-cosine position tables, as in the published I-JEPA and MAE."""

from __future__ import annotations

import torch


def sincos_1d(width: int, positions: torch.Tensor) -> torch.Tensor:
    """Sines, then cosines, of `positions` (n,) at width/2 frequencies 10000^(-2i/width): (n, width) in fp64."""
    frequencies = 10000.0 ** (-torch.arange(width // 2, dtype=torch.float64) / (width / 2))
    angles = positions.double()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def sincos_2d(width: int, grid: tuple[int, int], row_first: bool = False) -> torch.Tensor:
    """Position table (rows*columns, width) in fp32 for a grid of (rows, columns) patches, row-major.

    The first half of the features encodes the column, the second half the row; row_first: the other way round, as in
    CAE. Raises ValueError unless width % 4 == 0.
    """
    if width % 4:
        raise ValueError(f"positions: a 2-D sine-cosine table needs a width divisible by 4, got {width}")
    rows, columns = grid
    row = torch.arange(rows).repeat_interleave(columns)
    column = torch.arange(columns).repeat(rows)
    halves = (row, column) if row_first else (column, row)
    return torch.cat([sincos_1d(width // 2, places) for places in halves], dim=1).float()
