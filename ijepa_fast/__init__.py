"""ijepa_fast: a fast training engine for I-JEPA (self-supervised learning by predicting in representation space)."""

import importlib

__version__ = "0.1.0"
__all__ = ["embed", "load", "train"]


def __getattr__(name: str) -> object:
    # Imported when it is asked for: `import ijepa_fast` alone must not load torch.
    if name == "load":
        from ijepa_fast.interop.load import load

        return load
    if name == "embed":
        return importlib.import_module("ijepa_fast.api").embed
    if name == "train":  # a module, which is called as the function of its name in api.py
        return importlib.import_module("ijepa_fast.train")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
