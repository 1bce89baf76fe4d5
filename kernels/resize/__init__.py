"""Antialiased resizing of decoded images, on the CPU."""

from ijepa_fast.kernels.resize.ops import resize_

__all__ = ["resize_"]
