"""Which implementation of an op runs. One setting per op, made once from the run's config with `use`:

auto       on CUDA tensors the Triton kernel, on CPU tensors the fastest of what there is
triton     the Triton kernel, or an error with the reason; on the CPU it needs Triton's interpreter
reference  the PyTorch reference on every device
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Mapping

import torch

# The ops that have a Triton kernel, and all of them.
TRITON = (
    "patchify",
    "masked_gather",
    "varlen_attention",
    "layer_norm",
    "bias_gelu",
    "predictor_tokens",
    "target_loss",
    "adamw_ema",
    "mask_sampler",
    "fp8",
    "sigreg",
)
OPS = (*TRITON, "linear", "resize")
IMPLEMENTATIONS = ("auto", "triton", "reference")

_choices: dict[str, str] = dict.fromkeys(OPS, "auto")

# Read once: Triton, too, fixes both when it is imported, and torch.compile can trace constants only.
_HAS_TRITON = importlib.util.find_spec("triton") is not None
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if _HAS_TRITON and _INTERPRETED:
    importlib.import_module("ijepa_fast.kernels.common.interpreter").repair()


def use(impl: str | Mapping[str, str]) -> None:
    """Set the implementation of every op (a string), or of some of them (a mapping from op to implementation).

    "triton" for every op leaves those without a Triton kernel at "auto". Raises ValueError for an op or an
    implementation that does not exist.
    """
    if isinstance(impl, str):
        wanted = {op: "auto" if impl == "triton" and op not in TRITON else impl for op in OPS}
    else:
        wanted = dict(impl)
    for op, name in wanted.items():
        if op not in OPS:
            raise ValueError(f"kernels: there is no op {op!r}; the ops are {', '.join(OPS)}")
        known = IMPLEMENTATIONS if op in TRITON else ("auto", "reference")
        if name not in known:
            raise ValueError(f"kernels.{op}: expected one of {', '.join(known)}, got {name!r}")
    _choices.update(wanted)


def choice(op: str) -> str:
    """The setting of `op`: auto, triton or reference."""
    return _choices[op]


def interpreted() -> bool:
    """Whether Triton kernels run in the interpreter, so on CPU tensors."""
    return _INTERPRETED


def runs_triton(op: str, tensor: torch.Tensor) -> bool:
    """Whether `op` is to run its Triton kernel on `tensor`; RuntimeError when that was asked for and cannot be."""
    setting = _choices[op]
    if setting == "reference" or (setting == "auto" and not tensor.is_cuda):
        return False
    if not _HAS_TRITON:
        raise RuntimeError(
            f"kernels.{op}: {setting!r} needs the package triton, which is not installed; install it or set "
            f"kernels.{op}=reference"
        )
    if not tensor.is_cuda and not _INTERPRETED:
        raise RuntimeError(
            f"kernels.{op}: 'triton' was asked for a tensor on {tensor.device}; set TRITON_INTERPRET=1 to run it "
            f"there, or kernels.{op}=auto"
        )
    if tensor.dtype == torch.float64:
        raise RuntimeError(
            f"kernels.{op}: the Triton kernel computes in fp32, got a float64 tensor; set kernels.{op}=reference"
        )
    return True
