"""The I-JEPA loss in plain PyTorch: what the op means.

target = (feature - mean) / sqrt(var + eps)        over the last dimension, no weight, no bias
loss   = mean over rows and columns of w l(predictions - target[index]), w the row's weight, 1 where there are none
With a table of means and scales the feature is first (feature - mean[place]) * scale[place], of its place's row and by
channel; then the LayerNorm may be left out.
l(x)   = x^2  ("l2", the paper's)   or   x^2/2 for |x| < 1, |x| - 1/2 beyond  ("smooth_l1", the published code's)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

KINDS = {"l2": F.mse_loss, "smooth_l1": F.smooth_l1_loss}


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
    """predictions (R, D), features (V, D), index (R,) rows of features -> scalar in fp32 (fp64 for fp64 predictions).

    table (2, P, D), places (V,), token: see `normalised`. weights (R,): of the rows. No gradient flows to the features.
    """
    dtype = torch.promote_types(predictions.dtype, torch.float32)
    targets = normalised(features.detach(), eps, dtype, table, places, token)
    predictions, targets = predictions.to(dtype), targets.index_select(0, index)
    if weights is None:
        return KINDS[kind](predictions, targets)
    return (KINDS[kind](predictions, targets, reduction="none") * weights.to(dtype)[:, None]).mean()


def normalised(
    features: torch.Tensor,
    eps: float,
    dtype: torch.dtype,
    table: torch.Tensor | None = None,
    places: torch.Tensor | None = None,
    token: bool = True,
) -> torch.Tensor:
    """Features (V, D) as targets, in `dtype`: by the table's means and scales (2, P, D), row places (V,) or row 0;
    then, with `token`, by LayerNorm without gain and shift.
    """
    features = features.to(dtype)
    if table is not None:
        mean, scale = table.to(dtype)
        rows = slice(0, 1) if places is None else places.long()
        features = (features - mean[rows]) * scale[rows]
    return F.layer_norm(features, features.shape[-1:], eps=eps) if token else features
