"""Grid sizes of the kernels whose programs loop over their share of the rows."""

from __future__ import annotations

from functools import cache

import torch


@cache
def _multiprocessors(device: torch.device) -> int:
    # In the interpreter, where a program costs a Python call: few, but enough to need the reduction across programs.
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def programs(device: torch.device, per_multiprocessor: int) -> int:
    """Programs of a persistent grid on `device`: a constant of the device, so that sums are deterministic."""
    return _multiprocessors(device) * per_multiprocessor
