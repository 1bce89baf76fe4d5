"""masked_gather: checks, dispatch and registration."""

from __future__ import annotations

import torch

from ijepa_fast.kernels.common.checks import check_index, check_tensor
from ijepa_fast.kernels.masked_gather import reference


def masked_gather(
    x: torch.Tensor,
    index: torch.Tensor,
    positions: torch.Tensor | None = None,
    period: int | None = None,
    unique: bool = False,
) -> torch.Tensor:
    """Gather rows: `x[index]`, or `x[index] + positions[index % period]` in the same pass.

    Args:
        x: (R, D) floating point.
        index: (T,) int32 rows of `x`.
        positions: (N, D) rows to add, floating point.
        period: rows of `x` an image; default N.
        unique: no row is asked for twice. The backward then stores instead of summing; with a repeated row its gradient
            would be wrong.

    Returns:
        (T, D) in x's dtype. The backward is deterministic either way.

    Raises:
        ValueError: for a wrong dtype, shape, device or layout; in debug mode, for an index outside `x`.
    """
    check_tensor("masked_gather", "x", x, (None, None))
    check_tensor("masked_gather", "index", index, (None,), torch.int32, x.device)
    if positions is not None:
        check_tensor("masked_gather", "positions", positions, (None, x.shape[1]), device=x.device)
        period = positions.shape[0] if period is None else period
        if not 1 <= period <= positions.shape[0]:
            raise ValueError(
                f"masked_gather: period: expected 1 to {positions.shape[0]}, the rows of positions, got {period}"
            )
    check_index("masked_gather", "index", index, x.shape[0])
    return reference.masked_gather(x, index, positions, period)
