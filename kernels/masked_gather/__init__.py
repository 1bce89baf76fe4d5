"""Rows by flat index, with position rows added in the same pass."""

from ijepa_fast.kernels.masked_gather.ops import masked_gather

__all__ = ["masked_gather"]
