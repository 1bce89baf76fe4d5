"""Gradients clipped where DeepSpeed cannot: one parameter at a time (DINO, iBOT), or but for some of them (MSN)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

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


class ClipTogether:
    """Scales gradients so that the norm of all of them together is `largest` at most.

    replicated: whether every rank has whole parameters. due: this rank's gradients of all that is clipped, asked for at
    the first call of a step; the optimiser may be called several times in one, each time for other parameters.
    """

    def __init__(self, replicated: bool, largest: float, due: Callable[[], Sequence[torch.Tensor]]):
        self.largest, self._due = largest, due
        self._shared = not replicated and torch.distributed.get_world_size() > 1
        self._factor: torch.Tensor | None = None

    def begin(self) -> None:
        """Called before a step."""
        self._factor = None

    @torch.no_grad()
    def __call__(self, params: Sequence[torch.Tensor]) -> None:
        """Scale the gradients of `params`. All ranks call it equally often."""
        if self._factor is None:
            squares = torch.zeros((), dtype=torch.float32, device=params[0].device)
            if norms := torch._foreach_norm(list(self._due()), dtype=torch.float32):
                squares += torch.stack(norms).square().sum()
            if self._shared:
                torch.distributed.all_reduce(squares)
            self._factor = (self.largest / (squares.sqrt() + BESIDE)).clamp(max=1)
        for gradient in (p.grad for p in params if p.grad is not None):
            gradient.mul_(self._factor.to(gradient.dtype))
