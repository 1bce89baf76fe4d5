"""The I-JEPA loss in plain PyTorch: what the op means.

target = (feature - mean) / sqrt(var + eps)        over the last dimension, no weight, no bias
loss   = mean over rows and columns of l(predictions - target[index])
l(x)   = x^2  ("l2", the paper's)   or   x^2/2 for |x| < 1, |x| - 1/2 beyond  ("smooth_l1", the published code's)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

KINDS = {"l2": F.mse_loss, "smooth_l1": F.smooth_l1_loss}


def target_loss(
    predictions: torch.Tensor, features: torch.Tensor, index: torch.Tensor, kind: str = "l2", eps: float = 1e-5
) -> torch.Tensor:
    """predictions (R, D), features (V, D), index (R,) rows of features -> scalar in fp32 (fp64 for fp64 predictions).

    No gradient flows to the features.
    """
    dtype = torch.promote_types(predictions.dtype, torch.float32)
    return KINDS[kind](predictions.to(dtype), normalised(features.detach(), eps, dtype).index_select(0, index))


def normalised(features: torch.Tensor, eps: float, dtype: torch.dtype) -> torch.Tensor:
    """LayerNorm without gain and shift, (V, D), computed in `dtype`."""
    return F.layer_norm(features.to(dtype), features.shape[-1:], eps=eps)
