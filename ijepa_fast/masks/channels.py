"""Contexts that do not see all channels of their image (mask.strategy=channels)."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from ijepa_fast.data.crops import counter_uniform

_CHANNELS = 1 << 40  # stream of random numbers, see data.crops.counter_bits


def seen_channels(images: int, seed: int, step: int, first: int, channels: int, hidden: int) -> torch.Tensor:
    """Bool (images, channels), a function of (seed, step, place): False for `hidden` channels of each image."""
    places = (step << 32) + first + np.arange(images)
    order = counter_uniform(seed, places, channels, _CHANNELS).argsort(1).argsort(1)
    return torch.from_numpy(order >= hidden)


def hide_channels(patches: torch.Tensor, seen: torch.Tensor, side: int) -> torch.Tensor:
    """`patches` (B*N, W) with the channels that are not `seen`, (B, C), at their mean, which is zero."""
    columns = seen.to(patches.dtype).repeat_interleave(side**2, 1)
    columns = F.pad(columns, (0, patches.shape[1] - columns.shape[1]))
    return (patches.view(len(seen), -1, patches.shape[1]) * columns[:, None]).view_as(patches)
