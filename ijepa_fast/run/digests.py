"""Digests: what was written is verified before anything of it is used."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CHUNK = 1 << 24  # bytes hashed at a time


def damage(path: Path, known: Mapping[str, Any]) -> str | None:
    """What is wrong with the file by what is known of it, {"size", "sha256"}; None where it is as it was written."""
    try:
        size = path.stat().st_size
        if size != known["size"]:
            return f"{path.name} has {size:,} bytes of {known['size']:,}"
        with open(path, "rb", buffering=0) as file:
            digest, chunk = hashlib.sha256(), bytearray(CHUNK)
            while count := file.readinto(chunk):
                digest.update(memoryview(chunk)[:count])
    except FileNotFoundError:
        return f"{path.name} is missing"
    except OSError as error:
        return f"{path.name} cannot be read ({error.strerror})"
    return None if digest.hexdigest() == known["sha256"] else f"{path.name} is not what was written (sha256 differs)"


def seal(state: Mapping[str, Any]) -> str:
    """The JSON text of `state` with the digest of itself."""
    plain = json.loads(json.dumps(state))  # as it is read again: lists for tuples
    return json.dumps(plain | {"sha256": _of(plain)}, indent=1)


def is_sealed(state: Mapping[str, Any]) -> bool:
    """Whether what was read of a text that `seal` made is what was written."""
    return state.get("sha256") == _of({name: value for name, value in state.items() if name != "sha256"})


def _of(state: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
