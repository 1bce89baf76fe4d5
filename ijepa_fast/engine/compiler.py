"""Whether there is the compiler that torch.compile and Triton use while a run is under way."""

from __future__ import annotations

import os
import shutil

import torch

from ijepa_fast.config import ConfigError

NO_COMPILER = "csrc, torch.compile and, on a GPU, Triton need one: apt-get install g++, or name yours in CC and CXX"


def compiler() -> str | None:
    """The path of this machine's C++ compiler, None where there is none."""
    names = (os.environ.get("CXX"), os.environ.get("CC"), "g++", "clang++", "c++", "gcc", "clang")
    return next((path for name in names if name and (path := shutil.which(name.split()[0]))), None)


def check_compiler(compiled: bool | None, device: torch.device) -> None:
    """Raises ConfigError where the run would need a compiler and there is none.

    compiled: engine.compile. device: of the run.
    """
    if compiler() is not None or not (compiled or device.type == "cuda"):
        return
    asked = "engine.compile=true" if compiled else "engine.device=cuda"
    raise ConfigError(f"{asked}: there is no C++ compiler on this machine; {NO_COMPILER}")
