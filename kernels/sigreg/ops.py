"""sigreg: checks, dispatch, autograd, the sum over ranks, registration."""

from __future__ import annotations

import torch

from ijepa_fast.kernels.common.checks import check_tensor
from ijepa_fast.kernels.common.dispatch import choice, runs_triton
from ijepa_fast.kernels.common.library import register
from ijepa_fast.kernels.common.over_ranks import ranks, summed
from ijepa_fast.kernels.sigreg import cpu, reference


def sigreg(embeddings: torch.Tensor, directions: torch.Tensor, t_max: float = 3.0, points: int = 17) -> torch.Tensor:
    """How far embeddings are from a standard Gaussian: the mean over directions of the Epps-Pulley statistic.

    The samples of all ranks are one set; every rank must have as many, and the same directions. The gradient is that of
    the sum of all ranks' losses: averaged over ranks, as gradients are, it is the gradient of the one value.

    Args:
        embeddings: (V, N, D) floating point: V views of N samples, each view a set of its own; or (N, D).
        directions: (D, K) floating point, unit columns; no gradient flows to them.
        t_max: the last knot; the first is 0.
        points: T, knots of the trapezoidal rule, at least 2.

    Returns:
        Scalar in fp32 (fp64 for fp64 embeddings), computed in that dtype. A statistic grows with N, as published.

    Raises:
        ValueError: for a wrong dtype, shape, device or layout, fewer than 2 samples over all ranks, no directions,
            fewer than 2 knots, a last knot that is not positive.
    """
    if isinstance(embeddings, torch.Tensor) and embeddings.dim() == 2:
        embeddings = embeddings[None]
    check_tensor("sigreg", "embeddings", embeddings, (None, None, None))
    check_tensor("sigreg", "directions", directions, (embeddings.shape[2], None), device=embeddings.device)
    if embeddings.shape[0] == 0 or embeddings.shape[1] * ranks() < 2:
        raise ValueError(
            f"sigreg: embeddings: expected at least 2 samples, got shape {tuple(embeddings.shape)} on {ranks()} ranks"
        )
    if directions.numel() == 0:
        raise ValueError(f"sigreg: directions: expected at least one, got shape {tuple(directions.shape)}")
    if points < 2:
        raise ValueError(f"sigreg: points: expected at least 2 knots, got {points}")
    if not t_max > 0:
        raise ValueError(f"sigreg: t_max: expected more than 0, got {t_max}")
    triton = runs_triton("sigreg", embeddings)
    if choice("sigreg") == "reference":
        return reference.sigreg(embeddings, directions.detach(), t_max, points)
    dtype = torch.promote_types(embeddings.dtype, torch.float32)
    x = embeddings.to(dtype) @ directions.detach().to(dtype)
    return _SIGReg.apply(x.contiguous(), t_max, points, "triton" if triton else "cpu")


# Of each of this project's implementations, where its functions are, named as the registered ops.
IMPLEMENTATIONS = {"triton": torch.ops.ijepa_fast, "cpu": cpu}


class _SIGReg(torch.autograd.Function):
    """Of what is seen along the directions, x (V, N, K)."""

    @staticmethod
    def forward(ctx, x, t_max, points, implementation):
        views, samples, count = x.shape
        step = t_max / (points - 1)
        sums = summed(IMPLEMENTATIONS[implementation].sigreg_sums(x, step, points))
        samples = samples * ranks()
        t, phi, weights = (values.to(x.dtype)[:, None, None] for values in reference.knots(t_max, points, x.device))
        cos, sin = sums / samples
        cos = cos - phi
        # d value / dx, apart from the angles; times the ranks, over which gradients are averaged.
        slope = 2 * weights * t * (ranks() / (views * count))
        ctx.save_for_backward(x, torch.stack([slope * sin, -slope * cos]))
        ctx.step, ctx.implementation = step, implementation
        return samples * (weights * (cos.square() + sin.square())).sum(0).mean()

    @staticmethod
    def backward(ctx, upstream):
        x, factors = ctx.saved_tensors
        return IMPLEMENTATIONS[ctx.implementation].sigreg_bwd(x, factors * upstream, ctx.step), None, None, None


register(
    "sigreg_sums(Tensor x, float step, int points) -> Tensor",
    cpu,
    fake=lambda x, step, points: x.new_empty(2, points, x.shape[0], x.shape[2]),
)
register(
    "sigreg_bwd(Tensor x, Tensor factors, float step) -> Tensor",
    cpu,
    fake=lambda x, factors, step: torch.empty_like(x),
)
