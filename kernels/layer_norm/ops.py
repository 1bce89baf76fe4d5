"""layer_norm: checks, dispatch, autograd and registration."""

from __future__ import annotations

import torch

from ijepa_fast.kernels.common.checks import check_tensor
from ijepa_fast.kernels.common.dispatch import choice, runs_triton
from ijepa_fast.kernels.common.library import register
from ijepa_fast.kernels.layer_norm import cpu, native, reference


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float = 1e-6, residual: torch.Tensor | None = None
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """LayerNorm over the last dimension, the residual added before it in the same pass.

    Args:
        x: (T, D) floating point.
        weight: (D,) gain.
        bias: (D,) shift, in weight's dtype.
        eps: added to the variance.
        residual: (T, D) in x's dtype, or None.

    Returns:
        y = (s - mean(s)) / sqrt(var(s) + eps) * weight + bias in x's dtype, with statistics in fp32. Without a residual
        s is x and y is returned; with one the result is (y, s), s = x + residual.

    Raises:
        ValueError: for a wrong dtype, shape, device or layout.
    """
    check_tensor("layer_norm", "x", x, (None, None))
    check_tensor("layer_norm", "weight", weight, (x.shape[1],), device=x.device)
    check_tensor("layer_norm", "bias", bias, (x.shape[1],), weight.dtype, x.device)
    if residual is not None:
        check_tensor("layer_norm", "residual", residual, (x.shape[0], x.shape[1]), x.dtype, x.device)
    if runs_triton("layer_norm", x):
        return _LayerNorm.apply(x, residual, weight, bias, eps, "triton")
    if choice("layer_norm") == "auto" and native.unsupported(x, weight) is None:
        return _LayerNorm.apply(x, residual, weight, bias, eps, "native")
    return reference.layer_norm(x, weight, bias, eps, residual)


# Of each of this project's implementations, where its functions are, named as the registered ops.
IMPLEMENTATIONS = {"triton": torch.ops.ijepa_fast, "native": native}


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, bias, eps, implementation):
        ctx.implementation, kernels = implementation, IMPLEMENTATIONS[implementation]
        ctx.set_materialize_grads(False)
        if residual is None:
            y, mean, rstd = kernels.layer_norm_fwd(x, weight, bias, eps)
            ctx.save_for_backward(x, weight, mean, rstd)
            ctx.fused = False
            return y
        y, total, mean, rstd = kernels.add_layer_norm_fwd(x, residual, weight, bias, eps)
        ctx.save_for_backward(total, weight, mean, rstd)
        ctx.fused = True
        return y, total

    @staticmethod
    def backward(ctx, dy, ds=None):
        total, weight, mean, rstd = ctx.saved_tensors
        dy = torch.zeros_like(total) if dy is None else dy.contiguous()
        ds = None if ds is None else ds.contiguous()
        dx, dparameters = IMPLEMENTATIONS[ctx.implementation].layer_norm_bwd(dy, ds, total, weight, mean, rstd)
        # One tensor is the gradient of both summands; autograd copies it before it would write into it.
        return dx, dx if ctx.fused else None, dparameters[0], dparameters[1], None, None


def _statistic(x):
    return x.new_empty(x.shape[0], dtype=torch.float32)


register(
    "layer_norm_fwd(Tensor x, Tensor weight, Tensor bias, float eps) -> (Tensor y, Tensor mean, Tensor rstd)",
    cpu,
    fake=lambda x, weight, bias, eps: (torch.empty_like(x), _statistic(x), _statistic(x)),
)
register(
    "add_layer_norm_fwd(Tensor x, Tensor residual, Tensor weight, Tensor bias, float eps)"
    " -> (Tensor y, Tensor s, Tensor mean, Tensor rstd)",
    cpu,
    fake=lambda x, residual, weight, bias, eps: (
        torch.empty_like(x),
        torch.empty_like(x),
        _statistic(x),
        _statistic(x),
    ),
)
register(
    "layer_norm_bwd(Tensor dy, Tensor? ds, Tensor s, Tensor weight, Tensor mean, Tensor rstd)"
    " -> (Tensor dx, Tensor dparameters)",
    cpu,
    fake=lambda dy, ds, s, weight, mean, rstd: (torch.empty_like(s), weight.new_empty(2, weight.shape[0])),
)
