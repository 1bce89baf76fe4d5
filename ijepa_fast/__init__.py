"""ijepa_fast: a fast training engine for I-JEPA (self-supervised learning by predicting in representation space)."""

__version__ = "0.1.0"
__all__ = ["load"]


def __getattr__(name: str) -> object:
    # Imported when it is asked for: `import ijepa_fast` alone must not load torch.
    if name == "load":
        from ijepa_fast.interop.load import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
