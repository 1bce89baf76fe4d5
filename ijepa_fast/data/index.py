"""What a collection holds: sample names, places and labels as flat arrays, for millions of samples.

Building one walks the whole collection, so it is kept in a cache folder: one `.npy` file an array, memory-mapped by
every rank of the machine. A kept index is used only while all that it was made from (folders, shards, lists) has the
times and sizes of that moment: adding, removing or renaming a file changes its folder's, and no copy that keeps
modification times escapes the time of change. What a loose file holds is not part of the index.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ijepa_fast.files import publish

_VERSION = 2  # of the layout on disk


class Names:
    """Strings in two arrays: their bytes end to end, and where each ends. Eight bytes a string beside its own."""

    def __init__(self, blob: np.ndarray, ends: np.ndarray):
        self.blob, self.ends = blob, ends

    @classmethod
    def of(cls, names: Iterable[str]) -> Names:
        """The same strings, packed."""
        encoded = [os.fsencode(name) for name in names]
        ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)
        return cls(np.frombuffer(b"".join(encoded), np.uint8), ends)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        begin = self.ends[index - 1] if index > 0 else 0
        return os.fsdecode(self.blob[begin : self.ends[index]].tobytes())


def _nothing() -> np.ndarray:
    return np.empty(0, np.int64)


@dataclass
class Index:
    """labels: the label columns, (n,) each: int64 indices into `classes[column]`, or float64 values without classes.

    shards, shard, start, size: the tar files, and of each sample which, the first byte and how many; of loose files
    none. watched: what the index was made from, with its state as `watch` gives it.
    """

    names: Names
    labels: dict[str, np.ndarray] = field(default_factory=dict)
    classes: dict[str, list[str]] = field(default_factory=dict)
    shards: list[str] = field(default_factory=list)
    shard: np.ndarray = field(default_factory=_nothing)
    start: np.ndarray = field(default_factory=_nothing)
    size: np.ndarray = field(default_factory=_nothing)
    watched: dict[str, list[int]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.names)


def watch(path: str) -> list[int]:
    """The times of modification and of change (ns) and the size of a file or folder, or [] where there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return []
    return [status.st_mtime_ns, status.st_ctime_ns, status.st_size]


def cached(path: str, cache: str | Path | None, build: Callable[[], Index]) -> Index:
    """The index of the collection at `path`: a kept one that still holds, or a new one, made by one process for all."""
    if cache is None:
        return build()
    key = hashlib.sha256(os.path.abspath(path).encode()).hexdigest()[:12]
    folder = Path(cache) / f"index-v{_VERSION}-{Path(path).name}-{key}"
    index = _load(folder)
    if index is not None:
        return index
    with publish(folder, lock=True) as draft:
        index = _load(folder)
        if index is None:
            index = build()
            _save(index, draft)
    return index


_ARRAYS = ("shard", "start", "size")


def _save(index: Index, folder: Path) -> None:
    folder.mkdir()
    arrays = {"blob": index.names.blob, "ends": index.names.ends}
    arrays |= {name: getattr(index, name) for name in _ARRAYS if index.shards}
    arrays |= {f"label{number}": values for number, values in enumerate(index.labels.values())}
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    meta = {
        "columns": list(index.labels),
        "classes": index.classes,
        "shards": index.shards,
        "watched": index.watched,
    }
    (folder / "meta.json").write_text(json.dumps(meta))


def _load(folder: Path) -> Index | None:
    """The kept index, or None where there is none or what it was made from has changed."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        arrays = {file.stem: np.load(file, mmap_mode="r") for file in folder.glob("*.npy")}
    except (OSError, ValueError):
        return None
    if any(watch(path) != seen for path, seen in meta["watched"].items()):
        return None
    return Index(
        names=Names(arrays["blob"], arrays["ends"]),
        labels={column: arrays[f"label{number}"] for number, column in enumerate(meta["columns"])},
        classes=meta["classes"],
        shards=meta["shards"],
        watched=meta["watched"],
        **{name: arrays[name] for name in _ARRAYS if meta["shards"]},
    )
