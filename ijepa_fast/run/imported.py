"""Functions that a configuration names by their import path, `module:function`."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from ijepa_fast.config import ConfigError


def functions(key: str, paths: Sequence[str]) -> list[Callable[..., Any]]:
    """The functions of the key `key`, looked for in the working folder too. Raises ConfigError, naming the key."""
    return [_function(key, path) for path in paths]


def _function(key: str, path: str) -> Callable[..., Any]:
    module, colon, name = path.partition(":")
    if not (module and colon and name):
        raise ConfigError(f"{key}: expected module:function, for example my_hooks:look, got {path!r}")
    here = os.getcwd()
    added = here not in sys.path
    if added:
        sys.path.append(here)
    try:
        found = getattr(importlib.import_module(module), name, None)
    except Exception as error:  # whatever a module raises while it is imported
        raise ConfigError(f"{key}: {module} cannot be imported ({type(error).__name__}: {error})") from error
    finally:
        if added:
            sys.path.remove(here)
    if not callable(found):
        raise ConfigError(f"{key}: {module} has no function {name}")
    function: Callable[..., Any] = found
    return function
