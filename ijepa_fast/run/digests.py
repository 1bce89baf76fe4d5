"""Files with a digest: written and hashed in one pass, verified before anything of them is used."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch

CHUNK = 1 << 24  # bytes hashed at a time
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> dict[str, Any]:
    """Write a safetensors file; its {"size": bytes, "sha256": hex}.

    Equal contents give equal bytes: everything is in the order of its name. One tensor at a time comes to the host.
    """
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    for name, tensor in sorted(tensors.items()):
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of their element's size
    digest, size = hashlib.sha256(), 0
    contents = (_bytes(tensor) for _, tensor in sorted(tensors.items()))
    parts: Iterable[bytes | memoryview] = chain((len(text).to_bytes(8, "little"), text), contents)
    with open(path, "wb") as file:
        for part in parts:
            file.write(part)
            digest.update(part)
            size += len(part)
        file.flush()
        os.fsync(file.fileno())  # here, as another machine's flush does not reach what this one holds
    return {"size": size, "sha256": digest.hexdigest()}


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


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
