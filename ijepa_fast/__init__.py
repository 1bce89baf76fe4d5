"""ijepa_fast: a fast training engine for I-JEPA (self-supervised learning by predicting in representation space)."""

__version__ = "0.1.0"
