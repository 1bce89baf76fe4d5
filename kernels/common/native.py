"""The optional extension ijepa_fast._C (csrc/): C++ and CUDA for ops whose schemas the op folders define."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import warnings
from collections.abc import Callable

import torch

from ijepa_fast.kernels.common.dispatch import choice
from ijepa_fast.kernels.common.library import NAMESPACE

# csrc's loops take rows and heads of multiples of this many values.
WIDTH = 16

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


def unsupported(x: torch.Tensor) -> str | None:
    """Why csrc's fp32 loops for the CPU cannot take tensors like `x`, or None if they can."""
    if x.device.type != "cpu":
        return f"needs CPU tensors, got one on {x.device}"
    if not _has_loops():
        return "needs the extension ijepa_fast._C, which is not built, or not from this version"
    if x.dtype != torch.float32:
        return f"takes float32, got {x.dtype}"
    if x.shape[-1] % WIDTH:
        return f"takes a last dimension that is a multiple of {WIDTH}, got {x.shape[-1]}"
    if torch.compiler.is_compiling():
        return "is not for torch.compile, which makes loops of its own"
    return None


def runs_loops(op: str, x: torch.Tensor) -> bool:
    """Whether `op` is to run csrc's loops on `x`: where it can and is not set otherwise."""
    return choice(op) == "auto" and unsupported(x) is None


@functools.cache
def _has_loops() -> bool:
    if not available():
        return False
    # The newest of them.
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::linear_dweight_cpu_", "CPU"):
        return True
    warnings.warn(
        "ijepa_fast._C is of an older version, so its loops for the CPU are not used; build it again with "
        "`pip install --no-build-isolation -e .`",
        RuntimeWarning,
        stacklevel=2,
    )
    return False


def define(schema: str) -> Callable:
    """Define the op `schema`, which writes into its arguments and returns nothing, and return it.

    csrc implements it, at least for CPU tensors; see `unsupported` for one that nothing else does.
    """
    name = schema.partition("(")[0]
    _library.define(schema)
    torch.library.register_fake(f"{NAMESPACE}::{name}", lambda *args: None, lib=_library)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def register(schema: str, cpu: Callable, cuda: Callable) -> Callable:
    """As `define`; whatever the extension does not implement, `cpu` and `cuda` do, with the schema's arguments."""
    op = define(schema)
    name = schema.partition("(")[0]
    available()
    for key, implementation in (("CPU", cpu), ("CUDA", cuda)):
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", key):
            _library.impl(name, implementation, key)
    return op
