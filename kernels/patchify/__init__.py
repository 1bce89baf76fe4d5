"""Images of 8 or 16 bits, or floats, to normalised, padded patches in one pass."""

from ijepa_fast.kernels.patchify.ops import patchify

__all__ = ["patchify"]
