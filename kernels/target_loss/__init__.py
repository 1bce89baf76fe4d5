"""The I-JEPA loss over normalised, gathered target features."""

from ijepa_fast.kernels.target_loss.ops import target_loss

__all__ = ["target_loss"]
