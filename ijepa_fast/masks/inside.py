"""Target blocks where there is something to see: of some draws of an image's masks the first whose blocks lie there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from ijepa_fast.masks.samplers import Masks

TRIES = 16
SHARE = 0.5  # of every target block must lie inside
APART = 1 << 26  # between the places that the draws of an image are made for: more than a step has images


def held(draw: Callable[[int], Masks], first: int, inside: np.ndarray | None) -> Masks:
    """Masks of the images from place `first` on, whose target blocks lie inside by half at least, where that is found.

    Draw t of an image is what the sampler gives for its place + t * APART. It takes the first whose blocks all lie
    there, and of TRIES that fail the one whose worst block is the best. So an image's masks follow from (seed, step,
    its place) and from where its crop lies.

    draw: the masks of the same images if the first one had that place; all of a step have blocks of the same size.
    inside: (B, N) in 0..1, how much of each patch lies inside; None: all of it.
    """
    masks = draw(first)
    if inside is None:
        return masks
    context, target = masks.context.clone(), masks.target.clone()
    worst = _worst(masks, inside)
    for number in range(1, TRIES):
        if not (wanting := worst < SHARE).any():
            break
        other = draw(first + number * APART)
        found = _worst(other, inside)
        better = wanting & (found > worst)
        taken = torch.from_numpy(better)
        context[:, taken], target[:, taken] = other.context[:, taken], other.target[:, taken]
        worst = np.where(better, found, worst)
    return replace(masks, context=context, target=target)


def _worst(masks: Masks, inside: np.ndarray) -> np.ndarray:
    """(B,) how much of the target block lies inside that lies there least."""
    blocks = np.take_along_axis(inside[None], masks.target.numpy().astype(np.int64), axis=2)
    least: np.ndarray = blocks.mean(axis=2).min(axis=0)
    return least
