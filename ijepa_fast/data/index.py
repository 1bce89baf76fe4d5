"""The index of a collection: names, places and labels of millions of samples, as flat arrays.

To build an index, the whole collection is listed. So the index is kept in a cache folder, one `.npy` file per array,
which every rank of the machine maps into memory. A kept index is used only while all that it was made from (folders,
shards, lists) still has the same times and sizes. To add, remove or rename a file changes the times of its folder; a
copy that keeps the time of modification changes the time of change. The contents of loose files are not part of the
index.
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

_VERSION = 4  # of the arrays on disk


_LONGEST = 40  # characters of a source's name in a folder's, which may have 255 bytes


class Names:
    """Strings in two arrays: all their bytes, uint8, and the end of each, int64: eight bytes more per string."""

    def __init__(self, blob: np.ndarray, ends: np.ndarray):
        self.blob, self.ends = blob, ends

    @classmethod
    def of(cls, names: Iterable[str]) -> Names:
        """Pack these strings."""
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
    """What is known of n samples without decoding them.

    names: relative to the collection's folder, or inside the tar file. labels: per label column (n,), int64 indices
    into `classes[column]`, or float64 values of a column without classes. shards: the archives; shard, start, size,
    packed: per sample its archive's number, its first byte there, how many, and whether they are deflated (zip); empty
    for loose files. page, y, x: per sample which image of its file it is, and the corner of its window; empty where a
    file is an image. watched: the paths that the index was made from, each with its state (see `watch`). left_out:
    {extension: how many files} of those that are no samples. problem: why the collection's labels cannot be used; ""
    where they can, or there are none.
    """

    names: Names
    labels: dict[str, np.ndarray] = field(default_factory=dict)
    classes: dict[str, list[str]] = field(default_factory=dict)
    shards: list[str] = field(default_factory=list)
    shard: np.ndarray = field(default_factory=_nothing)
    start: np.ndarray = field(default_factory=_nothing)
    size: np.ndarray = field(default_factory=_nothing)
    packed: np.ndarray = field(default_factory=_nothing)
    page: np.ndarray = field(default_factory=_nothing)
    y: np.ndarray = field(default_factory=_nothing)
    x: np.ndarray = field(default_factory=_nothing)
    watched: dict[str, list[int]] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)
    problem: str = ""

    def __len__(self) -> int:
        return len(self.names)


def watch(path: str) -> list[int]:
    """The state of a path: time of modification and time of change (ns), size (bytes); [] if there is nothing."""
    try:
        status = os.stat(path)
    except OSError:
        return []
    return [status.st_mtime_ns, status.st_ctime_ns, status.st_size]


def cached(path: str, cache: str | Path | None, build: Callable[[], Index], how: str = "") -> Index:
    """The index of the collection at `path`: the kept one if it still holds, else a new one.

    cache: the folder to keep it in; None: build it and keep nothing. Of several processes, one builds and the others
    wait. how: what else the index is a function of. Copies of a collection that machines have under one path, each its
    own, get an index each: they are told apart by the number of their file (inode).
    """
    if cache is None:
        return build()
    number = os.stat(path).st_ino if os.path.exists(path) else 0
    key = hashlib.sha256(f"{os.path.abspath(path)}{how}{number}".encode()).hexdigest()[:12]
    folder = Path(cache) / f"index-v{_VERSION}-{Path(path).name[:_LONGEST]}-{key}"
    index = _load(folder)
    if index is not None:
        return index
    with publish(folder, lock=True) as draft:
        index = _load(folder)
        if index is None:
            index = build()
            try:
                _save(index, draft)
            except OSError as error:
                raise OSError(error.errno, f"the index cannot be kept: {error.strerror}", str(folder)) from None
    return index


_ARRAYS = ("shard", "start", "size", "packed", "page", "y", "x")


def _save(index: Index, folder: Path) -> None:
    folder.mkdir()
    arrays = {"blob": index.names.blob, "ends": index.names.ends}
    arrays |= {name: values for name in _ARRAYS if len(values := getattr(index, name))}
    arrays |= {f"label{number}": values for number, values in enumerate(index.labels.values())}
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    meta = {
        "columns": list(index.labels),
        "classes": index.classes,
        "shards": index.shards,
        "watched": index.watched,
        "left_out": index.left_out,
        "problem": index.problem,
    }
    (folder / "meta.json").write_text(json.dumps(meta))


def _load(folder: Path) -> Index | None:
    """The kept index; None where there is none, or where what it was made from has changed."""
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
        left_out=meta["left_out"],
        problem=meta["problem"],
        **{name: arrays[name] for name in _ARRAYS if name in arrays},
    )
