"""Masks of somebody else's: `mask.strategy=module:function`, held to the contract of the samplers here.

The function is called with the grid, (rows, columns) of patches, and the options of the section `mask` that are set, by
name. It returns a sampler: called with (images, seed, step, first), it gives the masks of the images whose places in
the global batch are first to first + images - 1:

    context  bool (C, images, N): the patches of each context, before the policy
    target   int32 (M, images, K): patch numbers of each target block, row-major; K is one number for the whole step

as samplers.Masks, or as the two tensors or arrays. An image's masks depend on (seed, step, place) alone, so that a run
is the same on any number of ranks and when it is resumed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from ijepa_fast.data.importing import import_function
from ijepa_fast.kernels.mask_sampler import Key
from ijepa_fast.masks.samplers import Masks


class Foreign:
    """A sampler that checks what somebody else's gives. Raises ValueError, naming the strategy."""

    def __init__(self, strategy: str, grid: tuple[int, int], options: Mapping[str, Any]):
        self.strategy, self.patches = strategy, grid[0] * grid[1]
        make: Callable[..., Any] = import_function("mask.strategy", strategy)
        try:
            self.sampler = make((int(grid[0]), int(grid[1])), **options)
        except TypeError as error:
            raise ValueError(f"mask.strategy={strategy}: {error}; its options are those of the section mask") from None
        if not callable(self.sampler):
            raise self._wrong(f"a sampler that is called with images, seed, step and first, got {self.sampler!r}")
        self._checked = False

    def __call__(self, batch: int, seed: int, step: int, first: int = 0) -> Masks:
        """Masks of `batch` images, the first of which has the place `first` in the global batch."""
        masks = self._draw(batch, seed, step, first)
        if not self._checked and batch > 1:
            alone, self._checked = self._draw(1, seed, step, first + batch - 1), True
            for name in ("context", "target"):
                ours, theirs = getattr(masks, name)[:, -1:], getattr(alone, name)
                if ours.shape != theirs.shape or not torch.equal(ours, theirs):
                    raise self._wrong(f"the same {name} of an image whatever images it is drawn with; got another")
        return masks

    def _draw(self, batch: int, seed: int, step: int, first: int) -> Masks:
        drawn = self.sampler(batch, seed, step, first)
        pair = (drawn.context, drawn.target) if isinstance(drawn, Masks) else drawn
        if not (isinstance(pair, tuple) and len(pair) == 2):
            raise self._wrong(f"context and target, got a {type(drawn).__name__}")
        context, target = (torch.from_numpy(x) if isinstance(x, np.ndarray) else x for x in pair)
        for name, tensor, dtype in (("context", context, torch.bool), ("target", target, torch.int32)):
            if not isinstance(tensor, torch.Tensor) or tensor.dtype != dtype or tensor.dim() != 3:
                found = f"{tensor.dtype} {tuple(tensor.shape)}" if isinstance(tensor, torch.Tensor) else type(tensor)
                raise self._wrong(f"{name} of {dtype} and three axes, got {found}")
            if tensor.shape[1] != batch or 0 in tensor.shape:
                raise self._wrong(f"{name} of {batch} images, got {tuple(tensor.shape)}")
        if context.shape[2] != self.patches:
            raise self._wrong(f"context of {self.patches} patches, got {context.shape[2]}")
        if int(target.min()) < 0 or int(target.max()) >= self.patches:
            raise self._wrong(f"target patches from 0 to {self.patches - 1}, got {int(target.min())} to {target.max()}")
        if not context.any(2).all():
            raise self._wrong("at least one patch in every context, got a context without any")
        return Masks(context.contiguous(), target.contiguous(), Key(seed, step, first))

    def _wrong(self, expected: str) -> ValueError:
        return ValueError(f"mask.strategy={self.strategy}: expected {expected}")
