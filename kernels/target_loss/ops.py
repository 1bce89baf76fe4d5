"""The I-JEPA loss: public function."""

from ijepa_fast.kernels.target_loss.reference import target_loss

__all__ = ["target_loss"]
