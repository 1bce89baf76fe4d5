"""The process's memory on the CPU."""

from __future__ import annotations

import ctypes


def keep_freed_memory() -> None:
    """Let the C library keep what this process frees, where that is glibc.

    A step on the CPU frees its activations and takes as much again; given back to the system in between, every page of
    it is cleared anew: some thousand page faults per step.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never give back the top of the heap
        mallopt(-4, 0)  # M_MMAP_MAX: no tensor is mapped by itself, whatever its size
