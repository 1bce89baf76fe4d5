"""target_loss: checks, dispatch, autograd and registration."""

from __future__ import annotations

import torch

from ijepa_fast.kernels.common.checks import check_index, check_tensor
from ijepa_fast.kernels.common.dispatch import runs_triton
from ijepa_fast.kernels.common.library import register
from ijepa_fast.kernels.target_loss import cpu, reference


def target_loss(
    predictions: torch.Tensor,
    features: torch.Tensor,
    index: torch.Tensor,
    kind: str = "l2",
    eps: float = 1e-5,
    table: torch.Tensor | None = None,
    places: torch.Tensor | None = None,
    token: bool = True,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean loss between predictions and the target features they belong to, normalised without gain and shift.

    Args:
        predictions: (R, D) floating point, R >= 1.
        features: (V, D) floating point, before the normalisation; no gradient flows to them.
        index: (R,) int32, the row of `features` each prediction is for; rows may repeat.
        kind: "l2", the mean square (the paper), or "smooth_l1" with beta 1 (the published code).
        eps: added to the variance.
        table: (2, P, D) fp32, a mean and a factor for every place and channel: the features are taken from the mean and
            multiplied before anything else; None: they are not.
        places: (V,) int32, each feature's row of the table; None: row 0.
        token: whether each feature is then normalised over its channels.
        weights: (R,) fp32, what the loss of each prediction is multiplied by before the mean; None: by nothing.

    Returns:
        Scalar in fp32 (fp64 for fp64 predictions), statistics and sums in fp32. The kernel makes the gradient with the
        loss, rounded to predictions' dtype; the backward multiplies it by the upstream gradient (exact for a power of
        two, one more rounding otherwise) and can run only once for each call.

    Raises:
        ValueError: for a wrong dtype, shape, device, layout or kind, no rows; in debug mode, for an index outside
            `features`.
    """
    check_tensor("target_loss", "predictions", predictions, (None, None))
    check_tensor("target_loss", "features", features, (None, predictions.shape[1]), device=predictions.device)
    check_tensor("target_loss", "index", index, (predictions.shape[0],), torch.int32, predictions.device)
    if predictions.numel() == 0:
        raise ValueError(
            f"target_loss: predictions: expected at least one row and column, got shape {tuple(predictions.shape)}"
        )
    if kind not in reference.KINDS:
        raise ValueError(f"target_loss: kind: expected one of {', '.join(reference.KINDS)}, got {kind!r}")
    check_index("target_loss", "index", index, features.shape[0])
    if table is not None:
        check_tensor("target_loss", "table", table, (2, None, predictions.shape[1]), device=predictions.device)
    if places is not None:
        if table is None:
            raise ValueError("target_loss: places: expected a table that they are rows of, got none")
        check_tensor("target_loss", "places", places, (features.shape[0],), torch.int32, predictions.device)
        check_index("target_loss", "places", places, table.shape[1])
    if weights is not None:
        check_tensor("target_loss", "weights", weights, (predictions.shape[0],), torch.float32, predictions.device)
    norm = (eps, table, places, token)
    if not runs_triton("target_loss", predictions):
        return reference.target_loss(predictions, features, index, kind, *norm, weights)
    return _TargetLoss.apply(predictions, features.detach(), index, kind, *norm, weights)


class _TargetLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, predictions, features, index, kind, *norm):
        loss, gradient = _fwd(predictions, features, index, kind, *norm)
        ctx.save_for_backward(gradient)
        ctx.dtype, ctx.used = predictions.dtype, False
        return loss

    @staticmethod
    def backward(ctx, upstream):
        (gradient,) = ctx.saved_tensors
        if torch.compiler.is_compiling():
            return (gradient * upstream).to(ctx.dtype), *[None] * 8
        if ctx.used:
            raise RuntimeError("target_loss: its backward can run only once; call target_loss again for a second one")
        ctx.used = True
        _scale_(gradient, upstream)
        return gradient.to(ctx.dtype), *[None] * 8


_fwd = register(
    "target_loss_fwd(Tensor predictions, Tensor features, Tensor index, str kind, float eps,"
    " Tensor? table=None, Tensor? places=None, bool token=True, Tensor? weights=None)"
    " -> (Tensor loss, Tensor gradient)",
    cpu,
    fake=lambda predictions, *_: (
        predictions.new_empty((), dtype=torch.float32),
        torch.empty_like(predictions, dtype=cpu.gradient_dtype(predictions.dtype)),
    ),
)
_scale_ = register(
    "target_loss_scale_(Tensor(a!) gradient, Tensor upstream) -> ()",
    cpu,
    fake=lambda gradient, upstream: None,
)
