"""Sizes of grids and tiles that kernels share."""

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


def row_tile(width: int, elements: int) -> dict[str, int]:
    """A tile of whole rows of `width`: BLOCK_D, the power of two that holds one, and the ROWS that make `elements`."""
    block = 1 << (width - 1).bit_length()
    return {"ROWS": max(1, elements // block), "BLOCK_D": block}
