"""The optional extension ijepa_fast._C (csrc/): C++ and CUDA for ops whose schemas the op folders define."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import warnings
from collections.abc import Callable

import torch

from ijepa_fast.kernels.common.library import NAMESPACE

_library = torch.library.Library(NAMESPACE, "FRAGMENT")


@functools.cache
def available() -> bool:
    """Whether the extension is there; the first call loads it. One that does not load is warned of, once."""
    if importlib.util.find_spec("ijepa_fast._C") is None:
        return False
    try:
        importlib.import_module("ijepa_fast._C")
    except (ImportError, OSError) as error:
        warnings.warn(
            f"ijepa_fast._C does not load ({error}), so its ops run in Python; build it again for torch "
            f"{torch.__version__} with `pip install --no-build-isolation -e .`",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True


def register(schema: str, cpu: Callable, cuda: Callable) -> Callable:
    """Define the op `schema`, which writes into its arguments and returns nothing, and return it.

    Whatever the extension does not implement, `cpu` and `cuda` do; they take the schema's arguments in its order.
    """
    name = schema.partition("(")[0]
    _library.define(schema)
    available()
    for key, implementation in (("CPU", cpu), ("CUDA", cuda)):
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", key):
            _library.impl(name, implementation, key)
    torch.library.register_fake(f"{NAMESPACE}::{name}", lambda *args: None, lib=_library)
    return getattr(getattr(torch.ops, NAMESPACE), name).default
