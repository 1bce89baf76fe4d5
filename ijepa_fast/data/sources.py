"""Collections of images: how many there are, their encoded bytes, and their labels where the layout has any."""

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
from ijepa_fast.data.kinds import printable
from ijepa_fast.data.scan import EXTENSIONS, scan_folder, scan_list, scan_shards
from ijepa_fast.data.storage import StorageTrouble, check_size, read_file

_OPEN_SHARDS = 64
_NAMED = 6  # extensions that are named


class Source:
    """A collection of encoded images in a fixed order: loose files, with names relative to `root`.

    labels: int64 (n,), indices into `classes`; None without labels, and where they cannot be used: index.problem says
    why. columns: every label column of the collection, by name. label: the column to use, by default the first one that
    has classes. Raises ValueError where it has none.
    """

    def __init__(self, root: str, index: Index, label: str | None = None):
        self.root, self.index, self.columns = root, index, index.labels
        self.labels: np.ndarray | None = None
        self.classes: list[str] = []
        if label is not None or index.classes:
            chosen = label or next(iter(index.classes))
            if chosen not in index.classes:
                if index.problem:
                    raise ValueError(index.problem)
                raise ValueError(
                    f"label: {root} has no classes {chosen!r}; it has {', '.join(index.classes) or 'none'}"
                )
            self.labels, self.classes = np.asarray(index.labels[chosen]), index.classes[chosen]

    def __len__(self) -> int:
        return len(self.index)

    def name(self, index: int) -> str:
        """The name of sample `index` in messages: its path, without characters that could harm a terminal."""
        return printable(os.path.join(self.root, self.index.names[index]))

    def read(self, index: int) -> bytes:
        """The encoded bytes of sample `index`. Raises OSError, and BadImage for what can be no image."""
        return read_file(os.path.join(self.root, self.index.names[index]))

    @property
    def left_out(self) -> str:
        """What of the collection is no sample, in words: "12 .tif, 1 .txt"; "" where there is nothing else."""
        kinds = sorted(self.index.left_out.items(), key=lambda item: -item[1])
        named = [f"{count} {printable(kind)}" for kind, count in kinds[:_NAMED]]
        rest = sum(count for _, count in kinds[_NAMED:])
        return ", ".join([*named, f"{rest} others"] if rest else named)

    @property
    def groups(self) -> np.ndarray | None:
        """The shard of each sample, (n,), for an order that reads few shards at a time; None for loose files."""
        return None


class TarSource(Source):
    """A collection of members of tar shards, which are read in place."""

    def name(self, index: int) -> str:
        """The shard's path and the member's name."""
        return printable(f"{self.index.shards[self.index.shard[index]]}:{self.index.names[index]}")

    def read(self, index: int) -> bytes:
        """The encoded bytes of sample `index`. Raises OSError, and BadImage for one over the bound of bytes."""
        path, size = self.index.shards[self.index.shard[index]], int(self.index.size[index])
        check_size(size)
        try:
            data = os.pread(_open_shard(path).fileno(), size, int(self.index.start[index]))
        except OSError:
            _open_shard.cache_clear()  # the next try opens the file again: where it was replaced, this one is stale
            raise
        if len(data) < size:
            raise StorageTrouble(f"{path}: is {size - len(data)} bytes shorter than when it was indexed; start again")
        return data

    @property
    def groups(self) -> np.ndarray:
        """The shard of each sample: int32 (n,)."""
        return self.index.shard


@functools.lru_cache(_OPEN_SHARDS)
def _open_shard(path: str) -> io.FileIO:
    # A shard is closed when it leaves the cache and its last reader is done with it.
    return open(path, "rb", buffering=0)


def open_source(path: str | Path, label: str | None = None, cache: str | Path | None = None) -> Source:
    """The images at `path`, which is one of these:

    - a folder of images, flat or nested (then the first level names the classes), with an optional labels.csv (its
      columns: file, then one per label);
    - uncompressed tar shards: a folder of them, one shard, or a pattern with `*` and `{000..127}`;
    - a text list of paths.

    label: the label column, by default the first. cache: a folder to keep the index in. Raises ValueError for a path
    that does not exist or holds no image, for a folder with tar shards and folders of images, and for an archive that
    is compressed, damaged or cut short. Labels that cannot be used raise nothing unless `label` asks for them.
    """
    path = os.fspath(path)
    shards = _shards(path)
    source: Source
    if shards:
        root = path if os.path.isdir(path) else None
        source = TarSource(path, cached(path, cache, lambda: scan_shards(shards, root)), label)
    elif os.path.isdir(path):
        source = Source(path, cached(path, cache, lambda: scan_folder(path)), label)
    elif os.path.isfile(path):
        source = Source(os.path.dirname(path), cached(path, cache, lambda: scan_list(path)), label)
    else:
        found = "is neither a folder nor a file" if os.path.exists(path) else "does not exist"
        raise ValueError(f"data path {path!r} {found}; expected a folder of images, tar shards or a text list")
    if not len(source):
        held = f"files named {', '.join('*' + extension for extension in EXTENSIONS)}, loose or in *.tar"
        found = f"; found {source.left_out}" if source.left_out else ""
        raise ValueError(f"data path {path!r} holds no image; expected {held}{found}")
    return source


def _shards(path: str) -> list[str]:
    """The tar files that `path` names: itself, those in a folder, or those that match a pattern; [] for other paths."""
    if os.path.isdir(path):
        return sorted(entry.path for entry in os.scandir(path) if _is_shard(entry))
    if not path.endswith(".tar"):
        return []
    pieces = re.split(r"\{(\d+\.\.\d+)\}", path)  # text and ranges by turns
    choices = [_numbers(piece) if place % 2 else [piece] for place, piece in enumerate(pieces)]
    patterns = ["".join(choice) for choice in itertools.product(*choices)]
    shards = [shard for pattern in patterns for shard in (sorted(glob.glob(pattern)) if "*" in pattern else [pattern])]
    missing = [shard for shard in shards if not os.path.isfile(shard)]
    if missing:
        raise ValueError(
            f"data path {path!r}: {len(missing)} of {len(shards)} shards do not exist, first {missing[0]!r}"
        )
    return shards


def _is_shard(entry: os.DirEntry) -> bool:
    return entry.name.endswith(".tar") and not entry.name.startswith("._") and entry.is_file()


def _numbers(span: str) -> list[str]:
    """The numbers that "000..127" names, with the same padding."""
    first, last = span.split("..")
    return [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
