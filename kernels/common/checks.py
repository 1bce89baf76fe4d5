"""Argument checks of the ops: a ValueError that names the op, the argument, what was expected and what was got.

`debug` (environment IJEPA_FAST_DEBUG=1, or set it here) adds the checks that read tensors and so wait for the device.
"""

from __future__ import annotations

import os
from itertools import pairwise

import torch

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

debug: bool = os.environ.get("IJEPA_FAST_DEBUG") == "1"


def check_tensor(
    op: str,
    name: str,
    tensor: torch.Tensor | None,
    shape: tuple[int | None, ...],
    dtypes: torch.dtype | tuple[torch.dtype, ...] = FLOATS,
    device: torch.device | None = None,
    contiguous: bool = True,
) -> None:
    """ValueError unless `tensor` has `shape` (None: any size), one of `dtypes`, is on `device` and is contiguous."""
    # The messages are built only on failure: formatting a symbolic size would make torch.compile specialise on it.
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"{op}: {name}: expected a tensor, got {type(tensor).__name__}")
    if tensor.dim() != len(shape) or any(want is not None and got != want for got, want in zip(tensor.shape, shape)):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{op}: {name}: expected shape ({wanted}), got {tuple(tensor.shape)}")
    if tensor.dtype not in (dtypes if isinstance(dtypes, tuple) else (dtypes,)):
        wanted = " or ".join(str(dtype) for dtype in (dtypes if isinstance(dtypes, tuple) else (dtypes,)))
        raise ValueError(f"{op}: {name}: expected dtype {wanted}, got {tensor.dtype}")
    if device is not None and tensor.device != device:
        raise ValueError(f"{op}: {name}: expected device {device}, got {tensor.device}")
    if contiguous and not tensor.is_contiguous():
        raise ValueError(
            f"{op}: {name}: expected a contiguous tensor, got strides {tensor.stride()} for shape "
            f"{tuple(tensor.shape)}; call .contiguous() on it"
        )


def check_index(op: str, name: str, index: torch.Tensor, size: int, unique: bool = False) -> None:
    """In debug mode, ValueError unless every value of `index` is in [0, size), and none comes twice if `unique`."""
    if not debug or index.numel() == 0:
        return
    low, high = (int(bound) for bound in torch.aminmax(index))
    if low < 0 or high >= size:
        raise ValueError(f"{op}: {name}: expected values in [0, {size}), got values from {low} to {high}")
    if unique and (distinct := index.unique().numel()) < index.numel():
        raise ValueError(f"{op}: {name}: expected no value twice, got {distinct} distinct of {index.numel()}")


def check_sequences(op: str, name: str, cu_seqlens: torch.Tensor, rows: int, max_name: str, max_seqlen: int) -> None:
    """ValueError unless cu_seqlens rises from 0 to `rows` by at most `max_seqlen`: on the CPU, or in debug mode."""
    if torch.compiler.is_compiling() or not (debug or cu_seqlens.device.type == "cpu"):
        return
    bounds = cu_seqlens.tolist()
    lengths = [end - start for start, end in pairwise(bounds)]
    if not bounds or bounds[0] != 0 or bounds[-1] != rows or min(lengths, default=0) < 0:
        shown = str(bounds) if len(bounds) <= 8 else f"[{', '.join(map(str, bounds[:3]))}, ..., {bounds[-1]}]"
        raise ValueError(
            f"{op}: {name}: expected values that start at 0, never decrease and end at the row count {rows}, "
            f"got {shown}"
        )
    if max(lengths, default=0) > max_seqlen:
        raise ValueError(
            f"{op}: {max_name}: expected at least {max(lengths)}, the longest sequence of {name}, got {max_seqlen}"
        )
