"""Products in fp8 for networks that need no gradient: rows are quantised by what produces them."""

from ijepa_fast.kernels.fp8.ops import bias_gelu_quantise, layer_norm_quantise, quantise, scaled_linear

__all__ = ["bias_gelu_quantise", "layer_norm_quantise", "quantise", "scaled_linear"]
