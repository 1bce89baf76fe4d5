"""SIGReg: how far embeddings are from an isotropic Gaussian, along random directions."""

from ijepa_fast.kernels.sigreg.ops import sigreg

__all__ = ["sigreg"]
