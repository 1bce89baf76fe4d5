"""Image collections: how many samples, their encoded bytes, and their labels where the layout has them."""

from __future__ import annotations

import functools
import glob
import io
import itertools
import os
import re
from pathlib import Path

import numpy as np

from ijepa_fast.data.index import Index, cached
from ijepa_fast.data.scan import EXTENSIONS, scan_folder, scan_list, scan_shards

_OPEN_SHARDS = 64


class Source:
    """A fixed, ordered collection of encoded images: loose files, named relative to `root`.

    labels: (n,) int64 class indices into `classes`, or None. columns: every label column that the collection has.
    """

    def __init__(self, root: str, index: Index, label: str | None = None):
        self.root, self.index, self.columns = root, index, index.labels
        self.labels: np.ndarray | None = None
        self.classes: list[str] = []
        if label is not None or index.classes:
            chosen = label or next(iter(index.classes))
            if chosen not in index.classes:
                raise ValueError(
                    f"label: {root} has no classes {chosen!r}; it has {', '.join(index.classes) or 'none'}"
                )
            self.labels, self.classes = np.asarray(index.labels[chosen]), index.classes[chosen]

    def __len__(self) -> int:
        return len(self.index)

    def name(self, index: int) -> str:
        """What to call sample `index` in a message: its path."""
        return os.path.join(self.root, self.index.names[index])

    def read(self, index: int) -> bytes:
        """The encoded bytes of sample `index`. Raises OSError."""
        with open(self.name(index), "rb", buffering=0) as file:
            return file.read()

    @property
    def groups(self) -> np.ndarray | None:
        """(n,) which shard each sample lies in, for an order that stays near; None where any order costs the same."""
        return None


class TarSource(Source):
    """Members of tar shards, read in place."""

    def name(self, index: int) -> str:
        """The shard's path and the member's name."""
        return f"{self.index.shards[self.index.shard[index]]}:{self.index.names[index]}"

    def read(self, index: int) -> bytes:
        """The encoded bytes of sample `index`. Raises OSError."""
        shard = _open_shard(self.index.shards[self.index.shard[index]])
        return os.pread(shard.fileno(), int(self.index.size[index]), int(self.index.start[index]))

    @property
    def groups(self) -> np.ndarray:
        """(n,) the shard of each sample."""
        return self.index.shard


@functools.lru_cache(_OPEN_SHARDS)
def _open_shard(path: str) -> io.FileIO:
    # Closed when it falls out of the cache and its last reader lets go of it.
    return open(path, "rb", buffering=0)


def open_source(path: str | Path, label: str | None = None, cache: str | Path | None = None) -> Source:
    """The images at `path`.

    A folder of images, nested (the first level names the classes) or flat, with an optional labels.csv (file, then a
    column a label); a folder of uncompressed tar shards, one shard, or a pattern of them (`*` and `{000..127}`); or a
    text list of paths. `label` chooses the label column, the first by default. `cache` is a folder to keep the index
    in. Raises ValueError for a path that does not exist or holds no image.
    """
    path = os.fspath(path)
    shards = _shards(path)
    source: Source
    if shards:
        source = TarSource(path, cached(path, cache, lambda: scan_shards(shards)), label)
    elif os.path.isdir(path):
        source = Source(path, cached(path, cache, lambda: scan_folder(path)), label)
    elif os.path.isfile(path):
        source = Source(os.path.dirname(path), cached(path, cache, lambda: scan_list(path)), label)
    else:
        raise ValueError(f"data path {path!r} does not exist; expected a folder of images, tar shards or a text list")
    if not len(source):
        held = f"files named {', '.join('*' + extension for extension in EXTENSIONS)}, loose or in *.tar"
        raise ValueError(f"data path {path!r} holds no image; expected {held}")
    return source


def _shards(path: str) -> list[str]:
    """The tar files that `path` names: itself, those of a folder, or those that match a pattern."""
    if os.path.isdir(path):
        return sorted(entry.path for entry in os.scandir(path) if entry.name.endswith(".tar") and entry.is_file())
    if not path.endswith(".tar"):
        return []
    pieces = re.split(r"\{(\d+\.\.\d+)\}", path)  # text and ranges in turn
    choices = [_numbers(piece) if place % 2 else [piece] for place, piece in enumerate(pieces)]
    patterns = ["".join(choice) for choice in itertools.product(*choices)]
    shards = [shard for pattern in patterns for shard in (sorted(glob.glob(pattern)) if "*" in pattern else [pattern])]
    missing = [shard for shard in shards if not os.path.isfile(shard)]
    if missing:
        raise ValueError(
            f"data path {path!r}: {len(missing)} of {len(shards)} shards do not exist, first {missing[0]!r}"
        )
    return shards


def _numbers(span: str) -> list[str]:
    """The numbers of "000..127", zero-padded alike."""
    first, last = span.split("..")
    return [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
