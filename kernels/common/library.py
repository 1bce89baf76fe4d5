"""Registration of the ops with torch.library, namespace `ijepa_fast`.

Every implementation of a registered op is a function of the op's name that takes the schema's arguments in its order:
in `kernel.py` the Triton launcher, imported by the first call that needs it; in the module given to `register`, the
folder's `cpu.py` or `reference.py`, what CPU tensors get unless Triton's interpreter is on.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType

import torch

from ijepa_fast.kernels.common.dispatch import interpreted

NAMESPACE = "ijepa_fast"

_library = torch.library.Library(NAMESPACE, "FRAGMENT")


def register(schema: str, cpu: ModuleType, fake: Callable) -> Callable:
    """Define the op `schema` and return it; `fake` gives its outputs' shapes and dtypes for tracing."""
    name = name_of(schema)
    launch, plain = triton_launcher(cpu, name), getattr(cpu, name)

    def on_cpu(*args):
        return launch(*args) if interpreted() else plain(*args)

    _library.define(schema, tags=(torch.Tag.needs_fixed_stride_order,))
    _library.impl(name, on_cpu, "CPU")
    _library.impl(name, launch, "CUDA")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def name_of(schema: str) -> str:
    """The op's name in a schema."""
    return schema.partition("(")[0]


def triton_launcher(beside: ModuleType, name: str) -> Callable:
    """The function `name` of the kernel.py that lies beside a module, which is imported when it is first called."""
    module = f"{beside.__package__}.kernel"

    def launch(*args):
        return getattr(importlib.import_module(module), name)(*args)

    return launch
