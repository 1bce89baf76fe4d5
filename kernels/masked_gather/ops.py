"""masked_gather: checks, dispatch, autograd and registration."""

from __future__ import annotations

import torch

from ijepa_fast.kernels.common.checks import check_index, check_tensor
from ijepa_fast.kernels.common.dispatch import runs_triton
from ijepa_fast.kernels.common.library import register
from ijepa_fast.kernels.masked_gather import cpu, reference


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
        period: rows of `x` per image; default N.
        unique: no row is asked for twice. The backward then stores instead of summing; with a repeated row its gradient
            would be wrong.

    Returns:
        (T, D) in x's dtype. The backward is deterministic either way.

    Raises:
        ValueError: for a wrong dtype, shape, device or layout; in debug mode, for an index outside `x`, or a repeated
            one that was said to be unique.
    """
    check_tensor("masked_gather", "x", x, (None, None))
    check_tensor("masked_gather", "index", index, (None,), torch.int32, x.device)
    if positions is not None:
        check_tensor("masked_gather", "positions", positions, (None, x.shape[1]), device=x.device)
        if period is not None and not 1 <= period <= positions.shape[0]:
            raise ValueError(
                f"masked_gather: period: expected 1 to {positions.shape[0]}, the rows of positions, got {period}"
            )
    check_index("masked_gather", "index", index, x.shape[0], unique=unique)
    if not runs_triton("masked_gather", x):
        return reference.masked_gather(x, index, positions, _period(positions, period))
    return _MaskedGather.apply(x, index, positions, period, unique)


def _period(positions, period):
    return 1 if positions is None else positions.shape[0] if period is None else period


class _MaskedGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, index, positions, period, unique):
        # Tensors without columns carry dtype and row count: torch.compile does not carry over symbolic sizes alone.
        sizes = (None if tensor is None else tensor.new_empty(tensor.shape[0], 0) for tensor in (x, positions))
        ctx.save_for_backward(index, *sizes)
        ctx.period, ctx.unique = period, unique
        return _fwd(x, index, positions, _period(positions, period))

    @staticmethod
    def backward(ctx, dy):
        index, x, positions = ctx.saved_tensors
        dy = dy.contiguous()
        dx = dpositions = None
        if ctx.needs_input_grad[0]:
            dx = _bwd(dy, index, x.shape[0], ctx.unique, x.dtype)
        if ctx.needs_input_grad[2]:
            within = index % _period(positions, ctx.period)
            dpositions = _bwd(dy, within, positions.shape[0], False, positions.dtype)
        return dx, None, dpositions, None, None


_fwd = register(
    "masked_gather_fwd(Tensor x, Tensor index, Tensor? positions, SymInt period) -> Tensor",
    cpu,
    fake=lambda x, index, positions, period: x.new_empty(index.shape[0], x.shape[1]),
)
_bwd = register(
    "masked_gather_bwd(Tensor dy, Tensor index, SymInt rows, bool unique, ScalarType dtype) -> Tensor",
    cpu,
    fake=lambda dy, index, rows, unique, dtype: dy.new_empty(rows, dy.shape[1], dtype=dtype),
)
