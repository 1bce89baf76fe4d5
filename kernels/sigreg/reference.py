"""SIGReg in plain PyTorch: what the op means (Balestriero and LeCun 2025: sliced Epps-Pulley).

x = embeddings @ directions                       N samples seen along K directions
value = mean over views and directions of  N sum over knots t of  w(t) ((mean cos(t x) - phi(t))^2 + (mean sin(t x))^2)

Samples of several ranks are one set: sums over them are sums over all ranks.

phi(t) = exp(-t^2 / 2) is the characteristic function of a standard Gaussian, the means are over the N samples, and w is
phi times the weights of the trapezoidal rule on [0, t_max], doubled, as the integrand is even.
"""

from __future__ import annotations

import torch

from ijepa_fast.kernels.common.over_ranks import ranks, summed


def knots(t_max: float, points: int, device: torch.device | None = None) -> tuple[torch.Tensor, ...]:
    """(t, phi, w), each (T,) fp64 for T = `points` knots from 0 to `t_max`."""
    t = torch.linspace(0, t_max, points, dtype=torch.float64, device=device)
    phi = (-t.square() / 2).exp()
    trapezoid = torch.full_like(t, 2 * t_max / (points - 1))
    trapezoid[0] /= 2
    trapezoid[-1] /= 2
    return t, phi, phi * trapezoid


def sigreg(embeddings: torch.Tensor, directions: torch.Tensor, t_max: float = 3.0, points: int = 17) -> torch.Tensor:
    """embeddings (V, N, D), directions (D, K) -> scalar in fp32 (fp64 for fp64 embeddings)."""
    dtype = torch.promote_types(embeddings.dtype, torch.float32)
    x = embeddings.to(dtype) @ directions.to(dtype)
    t, phi, weights = (values.to(dtype) for values in knots(t_max, points, x.device))
    angles = x[..., None] * t  # (V, N, K, T): here alone, and small enough to be read
    samples = x.shape[1] * ranks()
    cos, sin = summed(torch.stack([angles.cos().sum(1), angles.sin().sum(1)])) / samples
    return samples * (((cos - phi).square() + sin.square()) @ weights).mean()
