"""Building an index from a folder tree, a text list or tar shards, in parallel and with a progress bar."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait

import numpy as np
from tqdm import tqdm

from ijepa_fast.data.index import Index, Names, watch

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp")
LABELS_FILE = "labels.csv"

# To list folders and to read tar headers is to wait for storage, for mounted storage above all. Threads wait in
# parallel.
_THREADS = 16
_BLOCK = 512
_LINE = re.compile(r"(.+?)(?:\s*\t\s*(\S.*)|\s+(\d+))?")


def scan_folder(root: str) -> Index:
    """The index of the images below `root`, sorted by name. Labels: labels.csv, else the first folder level, else none.

    Raises ValueError for a labels.csv without a label column or without a row for some image.
    """
    names, watched = [], {}
    with (
        ThreadPoolExecutor(_THREADS) as pool,
        tqdm(desc=f"indexing {root}", unit=" images", mininterval=1, disable=None, delay=2) as bar,
    ):
        waiting = {pool.submit(_list, root, "", frozenset())}
        while waiting:
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            for task in done:
                folder, above, before, files, folders = task.result()
                watched[os.path.join(root, folder)] = before
                names.extend(files)
                bar.update(len(files))
                waiting |= {pool.submit(_list, root, name, above) for name in folders}
    names.sort()
    index = Index(Names.of(names), watched=watched)
    table = os.path.join(root, LABELS_FILE)
    if os.path.isfile(table):
        watched[table] = watch(table)
        index.labels, index.classes = _read_table(table, names)
    else:
        _label_by_folder(index, names)
    return index


def _list(root: str, folder: str, above: frozenset) -> tuple[str, frozenset, list[int], list[str], list[str]]:
    """List one folder: its name, the identities of it and of those above, its state before, its images, its folders."""
    path = os.path.join(root, folder)
    before, status = watch(path), os.stat(path)
    identity = (status.st_dev, status.st_ino)
    if identity in above:  # a link back to a folder above
        return folder, above, before, [], []
    files, folders = [], []
    with os.scandir(path) as entries:
        for entry in entries:
            name = os.path.join(folder, entry.name)
            if entry.name.lower().endswith(EXTENSIONS):
                files.append(name)
            elif not entry.name.startswith(".") and entry.is_dir():
                folders.append(name)
    return folder, above | {identity}, before, files, folders


def _label_by_folder(index: Index, names: list[str]) -> None:
    """Label each image by the first folder of its name, where every name has a folder."""
    if names and all("/" in name for name in names):
        _add_column(index.labels, index.classes, "class", [name.split("/", 1)[0] for name in names])


def _add_column(labels: dict, classes: dict, column: str, values: list[str]) -> None:
    """Add a label column. Integers and text are classes, sorted as numbers or as text; other numbers stay numbers."""
    numbers = _as_numbers(values)
    if numbers is not None and not all(number.is_integer() for number in numbers):
        labels[column] = np.array(numbers)
        return
    distinct = sorted(set(values), key=int if numbers is not None else None)
    position = {value: number for number, value in enumerate(distinct)}
    labels[column] = np.array([position[value] for value in values], np.int64)
    classes[column] = distinct


def _as_numbers(values: list[str]) -> list[float] | None:
    try:
        return [float(value) for value in values]
    except ValueError:
        return None


def _read_table(path: str, names: list[str]) -> tuple[dict[str, np.ndarray], dict[str, list[str]]]:
    with open(path, newline="") as file:
        reader = csv.DictReader(file)
        given = list(reader.fieldnames or ())
        columns = [column for column in given if column != "file"]
        if not columns or "file" not in given:
            raise ValueError(f"{path}: expected the columns file and at least one label, got {given}")
        rows = {row["file"]: row for row in reader}
    missing = [name for name in names if name not in rows]
    if missing:
        raise ValueError(f"{path}: {len(missing)} images have no row, the first {missing[0]!r}; write one per file")
    labels: dict[str, np.ndarray] = {}
    classes: dict[str, list[str]] = {}
    for column in columns:
        _add_column(labels, classes, column, [rows[name][column] for name in names])
    return labels, classes


def scan_list(path: str) -> Index:
    """The index of a text list: per line a path, absolute or relative to the list's folder, and optionally a label.

    A tab or a space stands before the label; after a space it must be an integer, since names may hold spaces. Empty
    lines and lines that begin with # are skipped. Raises ValueError for a line that names no image, and where only some
    lines have a label.
    """
    names, labels = [], []
    with (
        open(path, errors="surrogateescape") as file,
        tqdm(file, desc=f"indexing {path}", unit=" lines", mininterval=1, disable=None, delay=2) as bar,
    ):
        for line in map(str.strip, bar):
            if not line or line.startswith("#"):
                continue
            match = _LINE.fullmatch(line)
            if not match or not match[1].lower().endswith(EXTENSIONS):
                raise ValueError(
                    f"{path}: expected paths that end in {', '.join(EXTENSIONS)}, got the line {line[:80]!r}"
                )
            names.append(match[1])
            labels.append(match[2] or match[3])
    index = Index(Names.of(names), watched={path: watch(path)})
    given = [label for label in labels if label is not None]
    if 0 < len(given) < len(labels):
        raise ValueError(
            f"{path}: {len(given)} of {len(labels)} lines have a label; write one on every line, or on none"
        )
    if given:
        _add_column(index.labels, index.classes, "class", given)
    return index


def scan_shards(shards: list[str]) -> Index:
    """The index of uncompressed tar files. Labels: WebDataset's `.cls` members, else the first folder of the names.

    Nothing is unpacked: a sample is a range of bytes inside its shard. Links, devices and folders among the members are
    skipped. Raises ValueError for a file that is no uncompressed tar file or ends too early.
    """
    watched = {path: watch(path) for shard in shards for path in (shard, os.path.dirname(shard) or ".")}
    with (
        ThreadPoolExecutor(_THREADS) as pool,
        tqdm(total=len(shards), desc="indexing", unit=" shards", mininterval=1, disable=None, delay=2) as bar,
    ):
        parts = []
        for part in pool.map(_scan_shard, shards):
            parts.append(part)
            bar.update()
    names = [name for part in parts for name, *_ in part]
    labels = [label for part in parts for *_, label in part if label is not None]
    index = Index(
        names=Names.of(names),
        shards=shards,
        shard=np.repeat(np.arange(len(parts), dtype=np.int32), [len(part) for part in parts]),
        start=np.array([start for part in parts for _, start, _, _ in part], np.int64),
        size=np.array([size for part in parts for _, _, size, _ in part], np.int64),
        watched=watched,
    )
    if names and len(labels) == len(names):
        _add_column(index.labels, index.classes, "class", labels)
    else:
        _label_by_folder(index, names)
    return index


def _scan_shard(path: str) -> list[tuple[str, int, int, str | None]]:
    """(name, first byte, size, label) of each image; the label is the text of the `.cls` member with the same key."""
    images, labels = [], {}
    with open(path, "rb", buffering=0) as file:
        for name, start, size in _members(file.fileno(), path):
            key, _, extension = name.rpartition("/")[2].partition(".")
            key = name[: len(name) - len(extension)] if extension else name
            if name.lower().endswith(EXTENSIONS):
                images.append((name, start, size, key))
            elif extension == "cls":
                labels[key] = os.pread(file.fileno(), size, start).decode().strip()
    return [(name, start, size, labels.get(key)) for name, start, size, key in images]


def _members(file: int, path: str) -> Iterator[tuple[str, int, int]]:
    """(name, first byte, size) of each regular file in a tar archive: ustar, GNU long names, pax paths and sizes.

    Only headers are read. Python's tarfile takes ten times as long.
    """
    at, end = 0, os.fstat(file).st_size
    override: dict[str, str] = {}
    while at + _BLOCK <= end:
        header = os.pread(file, _BLOCK, at)
        if not header.strip(b"\0"):
            return
        size = _number(header[124:136]) if _checksum_holds(header) else None
        if size is None:
            raise ValueError(
                f"{path}: no tar header at byte {at}; expected an uncompressed tar file (compressed ones cannot be "
                "read at random: unpack them with gunzip or zstd -d)"
            )
        kind, start = header[156:157], at + _BLOCK
        if kind in b"xL" and start + size <= end:
            override |= _extended(kind, os.pread(file, size, start))
            at = start + -(-size // _BLOCK) * _BLOCK
            continue
        size = int(override.get("size", size))
        if start + size > end:
            raise ValueError(
                f"{path}: cut short; its member at byte {at} ends {start + size - end} bytes after the file"
            )
        if kind in (b"0", b"\0", b"7"):
            name, prefix = _text(header[:100]), _text(header[345:500]) if header[257:262] == b"ustar" else ""
            if header[257:265] == b"ustar  \0":  # GNU has times in the place of the prefix
                prefix = ""
            yield override.get("path", f"{prefix}/{name}" if prefix else name).removeprefix("./"), start, size
        if kind != b"g":
            override = {}
        at = start + -(-size // _BLOCK) * _BLOCK


def _checksum_holds(header: bytes) -> bool:
    expected = _number(header[148:156])
    return expected == sum(header) - sum(header[148:156]) + 8 * 0x20


def _number(digits: bytes) -> int | None:
    """A number of a tar header: octal, or base 256 with the top bit set. None where it is neither."""
    if digits[0] & 0x80:
        return int.from_bytes(digits, "big") & ((1 << (8 * len(digits) - 1)) - 1)
    try:
        return int(digits.strip(b" \0") or b"0", 8)
    except ValueError:
        return None


def _text(data: bytes) -> str:
    return os.fsdecode(data.split(b"\0", 1)[0])


def _extended(kind: bytes, data: bytes) -> dict[str, str]:
    """The path and the size that a GNU long name (L) or a pax header (x) gives the next member."""
    if kind == b"L":
        return {"path": _text(data)}
    fields = {}
    while data:
        length = int(data.split(b" ", 1)[0])
        key, _, value = data[:length].split(b" ", 1)[1].rstrip(b"\n").partition(b"=")
        fields[key.decode()] = os.fsdecode(value)
        data = data[length:]
    return {key: fields[key] for key in ("path", "size") if key in fields}
