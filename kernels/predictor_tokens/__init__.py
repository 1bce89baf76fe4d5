"""The predictor's input sequences, and the read-out of their mask rows."""

from ijepa_fast.kernels.predictor_tokens.ops import predictor_readout, predictor_tokens

__all__ = ["predictor_readout", "predictor_tokens"]
