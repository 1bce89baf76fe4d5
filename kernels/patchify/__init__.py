"""uint8 images to normalised, padded patches in one pass."""

from ijepa_fast.kernels.patchify.ops import patchify

__all__ = ["patchify"]
