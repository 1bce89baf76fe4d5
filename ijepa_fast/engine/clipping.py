"""Gradients clipped one parameter at a time (DINO, iBOT), wherever the shares of a parameter lie."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ijepa_fast.engine.partitions import Partition

BESIDE = 1e-6  # beside the norm, as published


class ClipEach:
    """Scales the gradient of every parameter whose norm is over `largest` down to it.

    partitions: what the optimiser updates on this rank. replicated: whether every rank has whole parameters.
    """

    def __init__(self, partitions: Sequence[Partition], replicated: bool, largest: float, names: Sequence[str]):
        self.largest = largest
        self._shared = not replicated and torch.distributed.get_world_size() > 1
        self._places = {name: place for place, name in enumerate(names)}
        self._fragments = {partition.master: partition.fragments for partition in partitions}

    @torch.no_grad()
    def __call__(self, params: Sequence[torch.Tensor]) -> None:
        """Clip the gradients of `params`, some masters. All ranks call it with the same groups."""
        held = [(p.grad.view(-1), f) for p in params if p.grad is not None for f in self._fragments[p]]
        parts = [gradient[f.offset : f.offset + f.stop - f.start] for gradient, f in held]
        device = params[0].device
        squares = torch.zeros(len(self._places), dtype=torch.float32, device=device)
        places = torch.tensor([self._places[f.name] for _, f in held], dtype=torch.int64, device=device)
        if parts:
            squares.index_add_(0, places, torch.stack([part.float().square().sum() for part in parts]))
        if self._shared:
            torch.distributed.all_reduce(squares)
        factors = (self.largest / (squares.sqrt() + BESIDE)).clamp(max=1)[places]
        for part, factor in zip(parts, factors.unbind(), strict=True):
            part.mul_(factor.to(part.dtype))
