"""What each op will run on a device, and why, for a person: the run's banner and the command `doctor`."""

from __future__ import annotations

import importlib.util
import platform

from ijepa_fast.kernels.common import dispatch, native

GET_CSRC = "pip install --no-build-isolation --force-reinstall --no-deps ijepa_fast, where torch and a C++ compiler are"


def chosen(device: str) -> dict[str, tuple[str, str]]:
    """{op: (implementation, reason)} on "cpu" or "cuda", by the settings in force.

    A case that an implementation cannot take, of an odd width say, goes to PyTorch's.
    """
    return {op: _chosen(op, device) for op in dispatch.OPS}


def summary(device: str) -> str:
    """The same in one line, implementations with the ops they run."""
    groups: dict[str, list[str]] = {}
    for op, (name, _) in chosen(device).items():
        groups.setdefault(name, []).append(op)
    return "; ".join(f"{name}: {', '.join(ops)}" for name, ops in groups.items())


def missing() -> str | None:
    """What is slower for want of the extension, and how to get it; None where it is there."""
    if native.loops() is not None or platform.machine() != "x86_64":
        return None
    return f"csrc is not built: a step takes about twice as long on a CPU; to build it: {GET_CSRC}"


def _chosen(op: str, device: str) -> tuple[str, str]:
    setting = dispatch.choice(op)
    if setting == "reference":
        return "reference", "as asked for"
    if setting == "triton":
        return "triton", "as asked for"
    if device == "cuda" and op in dispatch.TRITON and op != "mask_sampler":
        return "triton", "on a GPU"
    if op in ("adamw_ema", "mask_sampler", "resize") or _has(op, "native"):
        loops = native.loops()
        if loops is not None:
            return f"csrc ({loops})", "built, the fastest on a CPU"
        return ("torch" if _has(op, "cpu") else "reference"), "csrc is not built"
    return ("torch" if _has(op, "cpu") else "reference"), "no other for a CPU"


def _has(op: str, part: str) -> bool:
    return importlib.util.find_spec(f"ijepa_fast.kernels.{op}.{part}") is not None
