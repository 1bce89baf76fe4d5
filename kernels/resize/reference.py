"""The meaning of resize: what Pillow makes of an 8-bit RGB image, bit for bit, along its rows and then its columns.

A value is the weighted mean of those around its place, rounded to a byte after each of the two. Where an axis shrinks,
the filter is widened by that factor. Weights are rounded to multiples of 2^-22. Images of other dtypes or numbers of
channels are filtered in fp64 by exact weights, and rounded once, to even, where they are integers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from operator import add

import torch

ONE = 1 << 22
DTYPES = (torch.uint8, torch.uint16, torch.float32)


def triangle(x: float) -> float:
    """The bilinear filter."""
    return max(0.0, 1.0 - abs(x))


def cubic(x: float) -> float:
    """Keys' cubic convolution with a = -1/2."""
    x = abs(x)
    if x < 1:
        return (1.5 * x - 2.5) * x * x + 1
    return (((x - 5) * x + 8) * x - 4) * -0.5 if x < 2 else 0.0


# The filters, and how far from its centre each reaches.
FILTERS: dict[str, tuple[Callable[[float], float], float]] = {"bilinear": (triangle, 1.0), "bicubic": (cubic, 2.0)}


def resize_(out: torch.Tensor, images: Sequence[torch.Tensor], interpolation: str) -> None:
    """Fill `out` (n, H, W, C) with `images` (height, width, C) of its dtype, one of DTYPES, by `interpolation`."""
    for target, image in zip(out, images, strict=True):
        if image.dtype == torch.uint8 and image.shape[2] == 3:
            across = _bytes(image.transpose(0, 1), target.shape[1], interpolation).transpose(0, 1)
            target.copy_(_bytes(across, target.shape[0], interpolation))
            continue
        across = _filtered(image.double().transpose(0, 1), target.shape[1], interpolation).transpose(0, 1)
        exact = _filtered(across, target.shape[0], interpolation)
        if image.dtype != torch.float32:
            exact = exact.round().clamp(0, torch.iinfo(image.dtype).max)
        target.copy_(exact)


def _filtered(values: torch.Tensor, size: int, interpolation: str) -> torch.Tensor:
    """fp64 (rows, ...) -> (size, ...)."""
    return torch.tensordot(_weights(values.shape[0], size, interpolation), values, 1)


def _bytes(values: torch.Tensor, size: int, interpolation: str) -> torch.Tensor:
    """uint8 (rows, ...) -> (size, ...)."""
    weights = _weights(values.shape[0], size, interpolation) * ONE
    weights = (weights.abs() + 0.5).floor().copysign(weights)
    # fp64 holds every product and sum of these integers exactly.
    total = torch.tensordot(weights, values.double(), 1)
    return ((total + ONE / 2) / ONE).floor().clamp(0, 255).byte()


def _weights(old: int, new: int, interpolation: str) -> torch.Tensor:
    """(new, old): what each old place adds to each new one, fp64."""
    function, reach = FILTERS[interpolation]
    scale = old / new
    widened = max(scale, 1.0)
    weights = torch.zeros(new, old, dtype=torch.float64)
    for i in range(new):
        centre = (i + 0.5) * scale
        first = max(int(centre - reach * widened + 0.5), 0)
        last = min(int(centre + reach * widened + 0.5), old)
        row = [function((k - centre + 0.5) * (1 / widened)) for k in range(first, last)]
        total = reduce(add, row)
        weights[i, first:last] = torch.tensor([w / total for w in row], dtype=torch.float64)
    return weights
