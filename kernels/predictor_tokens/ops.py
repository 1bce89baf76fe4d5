"""The predictor's input and the read-out of its mask rows: public functions."""

from ijepa_fast.kernels.predictor_tokens.reference import predictor_readout, predictor_tokens

__all__ = ["predictor_readout", "predictor_tokens"]
