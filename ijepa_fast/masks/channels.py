"""Contexts that do not see all channels of their image (mask.strategy=channels)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ijepa_fast.config import ConfigError
from ijepa_fast.data.crops import counter_uniform

HIDDEN_SHARE = 0.5  # of the channels, under mask.strategy=channels
_CHANNELS = 1 << 40  # stream of random numbers, see data.crops.counter_bits


def hidden_channels(mask: dict[str, Any], channels: int, foreign: bool) -> int:
    """How many channels of an image its contexts do not see. Takes the option out of `mask`. Raises ConfigError."""
    if not foreign and ":" in mask["strategy"]:
        raise ConfigError(f"mask.strategy={mask['strategy']}: only strategies of this package are imported here")
    if mask["strategy"] != "channels":
        if mask["hidden_channels"] is None:  # else the sampler refuses it
            mask.pop("hidden_channels")
        return 0
    share = mask.pop("hidden_channels") or HIDDEN_SHARE
    if channels < 2:
        raise ConfigError(f"mask.strategy=channels: expected images of several channels, got data.channels={channels}")
    return min(channels - 1, max(1, round(share * channels)))


def seen_channels(images: int, seed: int, step: int, first: int, channels: int, hidden: int) -> torch.Tensor:
    """Bool (images, channels), a function of (seed, step, place): False for `hidden` channels of each image."""
    places = (step << 32) + first + np.arange(images)
    order = counter_uniform(seed, places, channels, _CHANNELS).argsort(1).argsort(1)
    return torch.from_numpy(order >= hidden)
