"""Registration of the ops with torch.library, namespace `ijepa_fast`.

An op's Triton launcher lives in `ijepa_fast.kernels.<folder>.kernel` under the op's own name, and is imported by the
first call that needs it. On CPU tensors the launcher runs in Triton's interpreter if that is on; otherwise the op is
plain PyTorch.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch

from ijepa_fast.kernels.common.dispatch import interpreted

NAMESPACE = "ijepa_fast"

_library = torch.library.Library(NAMESPACE, "FRAGMENT")


def register(schema: str, folder: str, cpu: Callable, fake: Callable) -> Callable:
    """Define the op `schema` and return it; `cpu` is its meaning in PyTorch, `fake` its output's shape for tracing.

    The Triton launcher, `cpu` and `fake` all take the schema's arguments in its order.
    """
    name = schema.partition("(")[0]

    def launch(*args):
        return getattr(importlib.import_module(f"ijepa_fast.kernels.{folder}.kernel"), name)(*args)

    def on_cpu(*args):
        return launch(*args) if interpreted() else cpu(*args)

    _library.define(schema, tags=(torch.Tag.needs_fixed_stride_order,))
    _library.impl(name, on_cpu, "CPU")
    _library.impl(name, launch, "CUDA")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    return getattr(getattr(torch.ops, NAMESPACE), name).default
