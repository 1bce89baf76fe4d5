"""Archives: which files are shards, and where their members lie, so that they are read in place.

Members of tar files, of tar files inside tar files and of zip files are ranges of bytes. A .tar.gz is unpacked to a
.tar once, since nothing in it can be read without all that lies before.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import itertools
import os
import re
import shutil
import struct
import sys
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ijepa_fast.data.headers import BadImage
from ijepa_fast.data.kinds import kind_of_file
from ijepa_fast.data.storage import MAX_BYTES
from ijepa_fast.data.tar import members
from ijepa_fast.files import publish

GZIP = (".tar.gz", ".tgz")
NAMED = (".tar", ".zip", *GZIP)  # that a path may name; of a folder, only .tar are its shards
UNPACKED = "~/.cache/ijepa_fast/unpacked"


class Member(NamedTuple):
    """A file in an archive: its first byte, how many, and whether they are deflated."""

    name: str
    start: int
    size: int
    packed: bool = False


def find_shards(path: str) -> list[str]:
    """The archives that `path` names: itself, the .tar files in a folder, or those that match a pattern; else []."""
    if os.path.isdir(path):
        return sorted(entry.path for entry in os.scandir(path) if _is_shard(entry))
    if not path.endswith(NAMED):
        return []
    # Text and choices by turns.
    pieces = re.split(r"\{(\d+\.\.\d+|[^{}]*,[^{}]*)\}", path)
    choices = [_choices(piece) if place % 2 else [piece] for place, piece in enumerate(pieces)]
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


def _choices(span: str) -> list[str]:
    """What "000..127", with the same padding, or "a,b" stands for."""
    if "," in span:
        return span.split(",")
    first, last = span.split("..")
    return [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]


def files_of(path: str) -> Iterator[Member]:
    """The files in a tar or zip archive. Raises ValueError naming the archive and the place of what is wrong.

    A tar file inside a tar file is a folder, named without its extension: so ImageNet is shipped.
    """
    if path.endswith(".zip"):
        yield from _zip(path)
        return
    with open(path, "rb", buffering=0) as file:
        for name, start, size in members(file.fileno(), path):
            if not name.endswith(".tar") or name.rpartition("/")[2].startswith("._"):
                yield Member(name, start, size)
                continue
            for inner, first, length in members(file.fileno(), f"{path}:{name}", start, start + size):
                yield Member(f"{name.removesuffix('.tar')}/{inner}", first, length)


def _zip(path: str) -> Iterator[Member]:
    try:
        with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
            for info in archive.infolist():
                if info.is_dir():
                    continue
                if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or info.flag_bits & 1:
                    how = "encrypted" if info.flag_bits & 1 else "compressed otherwise than by deflate"
                    raise ValueError(f"{path}: {info.filename} is {how}; unpack the archive")
                file.seek(info.header_offset + 26)
                name, extra = struct.unpack("<HH", file.read(4))
                packed = info.compress_type == zipfile.ZIP_DEFLATED
                yield Member(info.filename, info.header_offset + 30 + name + extra, info.compress_size, packed)
    except (zipfile.BadZipFile, struct.error) as error:
        found = kind_of_file(path) or str(error)
        found = f"one that is cut short or damaged ({error})" if found.startswith("a zip archive") else found
        raise ValueError(f"{path}: expected a zip archive, got {found}") from None


def inflate(data: bytes) -> bytes:
    """Deflated bytes as they were. Raises BadImage where they are damaged, or too many."""
    stream = zlib.decompressobj(-15)
    try:
        out = stream.decompress(data, MAX_BYTES)
    except zlib.error as error:
        raise BadImage(f"cannot be unpacked: {error}") from None
    if stream.unconsumed_tail or not stream.eof:
        raise BadImage("cannot be unpacked: it is cut short, or too large")
    return out


def unpacked(path: str, cache: str | Path | None) -> str:
    """The .tar of a .tar.gz, which is made in the folder `cache` if it is not there; another archive as it is.

    Of several processes one unpacks, and the others wait. Raises ValueError for a file that is cut short or no gzip.
    """
    if not path.endswith(GZIP):
        return path
    status = os.stat(path)
    if not (what := kind_of_file(path) or "other bytes").startswith("a gzip"):
        raise ValueError(f"{path}: expected a gzip-compressed tar file, got {what}")
    key = hashlib.sha256(f"{os.path.abspath(path)}|{status.st_size}|{status.st_mtime_ns}".encode()).hexdigest()[:16]
    folder = Path(cache) / "unpacked" if cache else Path(UNPACKED).expanduser()
    name = os.path.basename(path).removesuffix(".tgz").removesuffix(".tar.gz")
    target = folder / key / f"{name}.tar"
    if not target.exists():
        with publish(target, lock=True) as draft:
            if not target.exists():
                print(f"{path}: unpacking it once, to {target}", file=sys.stderr)
                try:
                    with gzip.open(path) as packed, open(draft, "wb") as out:
                        shutil.copyfileobj(packed, out, 1 << 20)
                except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                    raise ValueError(f"{path}: cut short or no gzip file: {error}; fetch it again") from None
    return str(target)
