"""The registered ops in PyTorch on a CPU."""

from __future__ import annotations

import torch

from ijepa_fast.kernels.target_loss import reference


def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """That of the predictions, but fp32 for fp16, which cannot hold a mean's gradient before loss scaling."""
    return torch.float32 if dtype == torch.float16 else dtype


def target_loss_fwd(
    predictions: torch.Tensor,
    features: torch.Tensor,
    index: torch.Tensor,
    kind: str,
    eps: float,
    table: torch.Tensor | None = None,
    places: torch.Tensor | None = None,
    token: bool = True,
    weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss, a scalar, and its gradient (R, D) of `gradient_dtype`."""
    dtype = torch.promote_types(predictions.dtype, torch.float32)
    targets = reference.normalised(features, eps, dtype, table, places, token)
    error = predictions.to(dtype) - targets.index_select(0, index)
    gradient = 2 * error if kind == "l2" else error.clamp(-1, 1)
    if weights is None:
        loss = reference.KINDS[kind](error, torch.zeros_like(error)).float()
    else:
        weights = weights.to(dtype)[:, None]
        loss = (reference.KINDS[kind](error, torch.zeros_like(error), reduction="none") * weights).mean().float()
        gradient = gradient * weights
    return loss, (gradient / error.numel()).to(gradient_dtype(predictions.dtype))


def target_loss_scale_(gradient: torch.Tensor, upstream: torch.Tensor) -> None:
    """Multiply the gradient by the upstream one, in place."""
    gradient.mul_(upstream)
