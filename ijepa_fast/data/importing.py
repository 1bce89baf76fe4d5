"""Importing somebody else's modules by their paths."""

from __future__ import annotations

import importlib
import os
import re
import sys
from types import ModuleType
from typing import Any


def import_module(path: str) -> ModuleType:
    """A module by its import path, from the working folder too, which a launcher leaves off the search path."""
    here = os.getcwd()
    added = here not in sys.path
    if added:
        sys.path.append(here)
    try:
        return importlib.import_module(path)
    finally:
        if added:
            sys.path.remove(here)


def is_code(name: str) -> bool:
    """Whether `name` is written as module:function, and no file is called so."""
    return re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", name) is not None and not os.path.exists(name)


def import_function(key: str, name: str) -> Any:
    """What module:function names. Raises ValueError that begins with the configuration's `key`."""
    module, _, function = name.partition(":")
    try:
        return getattr(import_module(module), function)
    except Exception as error:  # whatever a module raises while it is imported
        raise ValueError(
            f"{key}={name}: expected the import path of a module and a function in it ({type(error).__name__}: {error})"
        ) from error
