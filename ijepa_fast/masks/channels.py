"""Contexts that do not see all channels of their image (mask.strategy=channels)."""

from __future__ import annotations

import numpy as np
import torch

from ijepa_fast.data.crops import counter_uniform

_CHANNELS = 1 << 40  # stream of random numbers, see data.crops.counter_bits


def seen_channels(images: int, seed: int, step: int, first: int, channels: int, hidden: int) -> torch.Tensor:
    """Bool (images, channels), a function of (seed, step, place): False for `hidden` channels of each image."""
    places = (step << 32) + first + np.arange(images)
    order = counter_uniform(seed, places, channels, _CHANNELS).argsort(1).argsort(1)
    return torch.from_numpy(order >= hidden)
