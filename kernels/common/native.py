"""The optional extension ijepa_fast._C (csrc/): C++ and CUDA for ops whose schemas the op folders define."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import warnings
from collections.abc import Callable
from types import ModuleType

import torch

from ijepa_fast.kernels.common.library import NAMESPACE, name_of, triton_launcher

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


def unsupported(
    dtypes: tuple[torch.dtype, ...], x: torch.Tensor, *others: torch.Tensor, width: int = WIDTH
) -> str | None:
    """Why csrc's loops of an op, written for CPU tensors of `dtypes`, cannot take `x` and `others`; None if they can.

    The others must have x's dtype, and x's last dimension must be a multiple of `width`. An op's native.py asks this
    with the dtypes that csrc has its loops for.
    """
    if x.device.type != "cpu":
        return f"needs CPU tensors, got one on {x.device}"
    if torch.compiler.is_compiling():
        return "is not for torch.compile, which makes loops of its own"
    if not _has_loops():
        return "needs the extension ijepa_fast._C, which is not built, or not from this version"
    if x.dtype not in dtypes:
        return f"takes {' or '.join(str(dtype).removeprefix('torch.') for dtype in dtypes)}, got {x.dtype}"
    if any(other.dtype != x.dtype for other in others):
        return f"takes tensors of one dtype, got {', '.join(str(tensor.dtype) for tensor in (x, *others))}"
    if x.shape[-1] % width:
        return f"takes a last dimension that is a multiple of {width}, got {x.shape[-1]}"
    return None


@functools.cache
def _has_loops() -> bool:
    if not available():
        return False
    # The newest of what it holds.
    if hasattr(importlib.import_module("ijepa_fast._C"), "LOOPS"):
        return True
    warnings.warn(
        "ijepa_fast._C is of an older version, so its loops for the CPU are not used; build it again with "
        "`pip install --no-build-isolation -e .`",
        RuntimeWarning,
        stacklevel=2,
    )
    return False


@functools.cache
def loops() -> str | None:
    """Which of csrc's loops this machine runs, or None without them: any, v3 (AVX2), v4 (AVX-512) or amx.

    The environment asks for lesser ones by these names in IJEPA_FAST_CPU_LOOPS, by PyTorch's in ATEN_CPU_CAPABILITY.
    What speaks against better ones is warned of, once.
    """
    if not _has_loops():
        return None
    extension = importlib.import_module("ijepa_fast._C")
    if extension.COMPLAINT:
        message = f"ijepa_fast: {extension.COMPLAINT}; the loops for the CPU are {extension.LOOPS}"
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    return extension.LOOPS


def implements(name: str, key: str = "CPU") -> bool:
    """Whether the op `name` has an implementation for tensors of dispatch key `key`."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", key)


def define(schema: str) -> Callable:
    """Define the op `schema`, which writes into its arguments and returns nothing, and return it.

    Only csrc implements it, at least for CPU tensors: ask `unsupported` before a call.
    """
    name = name_of(schema)
    _library.define(schema)
    torch.library.register_fake(f"{NAMESPACE}::{name}", lambda *args: None, lib=_library)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def register(schema: str, cpu: ModuleType) -> None:
    """As `define`, and what the extension does not implement, others do: functions of the op's name and arguments.

    For CPU tensors that is the one in `cpu`, the folder's cpu.py or reference.py; for CUDA tensors that in kernel.py,
    where the folder has one.
    """
    define(schema)
    available()
    name = name_of(schema)
    others = {"CPU": getattr(cpu, name)}
    if importlib.util.find_spec(f"{cpu.__package__}.kernel"):
        others["CUDA"] = triton_launcher(cpu, name)
    for key, implementation in others.items():
        if not implements(name, key):
            _library.impl(name, implementation, key)
