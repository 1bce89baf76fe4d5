"""Building an index from a folder tree, a text list or tar shards, in parallel and with a progress bar."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ijepa_fast.data.archives import Member, files_of, inflate, unpacked
from ijepa_fast.data.formats import DALI, EXTENSIONS, PILLOW, STACKS, TIFF, extension
from ijepa_fast.data.index import Index, Names, watch
from ijepa_fast.data.kinds import printable
from ijepa_fast.data.tables import add_classes, add_column, read_list, read_table

LABELS_FILE = "labels.csv"

# To list folders and to read tar headers is to wait for storage, for mounted storage above all. Threads wait in
# parallel.
_THREADS = 16
_LONGEST_LABEL = 4096  # bytes of a .cls member
# Of the files of one collection the first of these groups that occurs are its images: arrays beside photographs are
# something else of theirs.
_GROUPS = ((*DALI, *PILLOW), TIFF, STACKS)
_PARTS = ("train", "training", "val", "valid", "validation", "dev", "test", "testing", "eval", "holdout")
_MAC = "._"  # begins the names in which macOS keeps a file's attributes beside it


def is_image(name: str) -> bool:
    """Whether a file's name is an image's."""
    return name.lower().endswith(EXTENSIONS) and not name.rpartition("/")[2].startswith(_MAC)


def _wanted(names: Iterable[str]) -> tuple[str, ...]:
    """The extensions that are the images' in a collection of these names."""
    found = {extension(name) for name in names}
    return next((group for group in _GROUPS if found & set(group)), EXTENSIONS)


def _others(names: Iterable[str]) -> Counter[str]:
    """How many of the names, which are no images', have each extension; hidden files do not count."""
    kinds: Counter[str] = Counter()
    for name in names:
        base = name.rpartition("/")[2].lower()
        stem, extension = os.path.splitext(base)
        if base.startswith(_MAC):
            kinds["._* of macOS"] += 1
        elif not base.startswith("."):
            kinds[(".tar" if stem.endswith(".tar") else "") + (extension or "without extension")] += 1
    return kinds


def scan_folder(root: str) -> Index:
    """The index of the images below `root`, sorted by name. Labels: labels.csv, else the first folder level, else none.

    One image in a hundred, or a single one, that lies beside the class folders is left out. What is wrong with a
    labels.csv is the index's `problem`.
    """
    names: list[str] = []
    watched, left_out = {}, Counter[str]()
    with (
        ThreadPoolExecutor(_THREADS) as pool,
        tqdm(desc=f"indexing {root}", unit=" images", mininterval=1, disable=None, delay=2) as bar,
    ):
        waiting = {pool.submit(_list, root, "", frozenset())}
        while waiting:
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            for task in done:
                folder, above, before, files, folders, others = task.result()
                left_out += others
                watched[os.path.join(root, folder)] = before
                names.extend(files)
                bar.update(len(files))
                waiting |= {pool.submit(_list, root, name, above) for name in folders}
    names.sort()
    wanted = _wanted(names)
    left_out += _others(name for name in names if not name.lower().endswith(wanted))
    names = [name for name in names if name.lower().endswith(wanted)]
    table = os.path.join(root, LABELS_FILE)
    if not os.path.isfile(table):
        stray = [name for name in names if "/" not in name]
        held = {name.partition("/")[0] for name in names if "/" in name}
        if 0 < len(stray) <= max(1, len(names) // 100) and len(held) > 1:
            left_out[f"beside the class folders ({printable(stray[0])})"] = len(stray)
            names = [name for name in names if "/" in name]
        index = Index(Names.of(names), watched=watched, left_out=dict(left_out))
        if parts := _parts(names):
            index.problem = (
                f"{root}: {' and '.join(parts)} look like parts of a data set, not classes; name one of them"
            )
        else:
            _label_by_folder(index, names)
        return index
    watched[table] = watch(table)
    left_out[".csv"] -= 1
    index = Index(Names.of(names), watched=watched, left_out=dict(+left_out))
    try:
        index.labels, index.classes = read_table(table, names)
    except ValueError as error:
        index.problem = str(error)
    return index


def _list(
    root: str, folder: str, above: frozenset
) -> tuple[str, frozenset, list[int], list[str], list[str], Counter[str]]:
    """List one folder: its name, the identities of it and of those above, its state before, its images, its folders,
    and how many others of each extension."""
    path = os.path.join(root, folder)
    before, status = watch(path), os.stat(path)
    identity = (status.st_dev, status.st_ino)
    if identity in above:  # a link back to a folder above
        return folder, above, before, [], [], Counter()
    files, folders, others = [], [], []
    with os.scandir(path) as entries:
        for entry in entries:
            name = os.path.join(folder, entry.name)
            if is_image(entry.name):
                files.append(name)
            elif not entry.name.startswith(".") and entry.is_dir():
                folders.append(name)
            else:
                others.append(entry.name)
    return folder, above | {identity}, before, files, folders, _others(others)


def _parts(names: list[str]) -> list[str]:
    """The first folders, where all are called as parts of a data set are and hold folders, not images."""
    firsts = sorted({name.partition("/")[0] for name in names})
    named = len(firsts) > 1 and all(first.lower() in _PARTS for first in firsts)
    return firsts if named and all(name.count("/") > 1 for name in names) else []


def _label_by_folder(index: Index, names: list[str]) -> None:
    """Label each image by the first folder of its name, where every name has a folder."""
    if names and all("/" in name for name in names):
        add_classes(index.labels, index.classes, "class", [name.split("/", 1)[0] for name in names])


def scan_list(path: str) -> Index:
    """The index of a text list: per line a path, absolute or relative to the list's folder, and optionally a label.

    A tab or a space stands before the label; after a space it must be an integer, since names may hold spaces. Empty
    lines and lines that begin with # are skipped. Raises ValueError for a line that names no image, and where no file
    of the list is there. Labels on some lines alone are the index's `problem`.
    """
    found, labels = read_list(path, EXTENSIONS)
    wanted = _wanted(found)
    kept = [is_image(name) and name.lower().endswith(wanted) for name in found]
    names = [name for name, is_kept in zip(found, kept) if is_kept]
    left_out = _others(name for name, is_kept in zip(found, kept) if not is_kept)
    labels = [label for label, is_kept in zip(labels, kept) if is_kept]
    index = Index(Names.of(names), watched={path: watch(path)}, left_out=dict(left_out))
    given = [label for label in labels if label is not None]
    if 0 < len(given) < len(labels):
        index.problem = f"{path}: {len(given)} of {len(labels)} lines have a label; write one on every line, or on none"
    elif given:
        add_column(index.labels, index.classes, "class", given)
    return index


def scan_shards(shards: list[str], root: str | None = None, cache: str | Path | None = None) -> Index:
    """The index of archives. Labels: WebDataset's `.cls` members, else the first folder of the names.

    A sample is a range of bytes inside its shard; only a .tar.gz is unpacked, in the folder `cache`. Links, devices and
    folders among the members are skipped. root: the folder, where the shards are all those of one. Raises ValueError
    for a file that is no archive or ends too early, with its path and the offset, and for folders of images in `root`.
    """
    watched = {path: watch(path) for shard in shards for path in (shard, os.path.dirname(shard) or ".")}
    with (
        ThreadPoolExecutor(_THREADS) as pool,
        tqdm(total=len(shards), desc="indexing", unit=" shards", mininterval=1, disable=None, delay=2) as bar,
    ):
        parts, left_out = [], Counter[str]() if root is None else _beside(root, shards)
        shards = [unpacked(shard, cache) for shard in shards]
        for part, others in pool.map(_scan_shard, shards):
            parts.append(part)
            left_out += others
            bar.update()
    wanted = _wanted(member.name for part in parts for member, _ in part)
    for number, part in enumerate(parts):
        parts[number] = [row for row in part if row[0].name.lower().endswith(wanted)]
        left_out += _others(member.name for member, _ in part if not member.name.lower().endswith(wanted))
    found = [row for part in parts for row in part]
    names = [member.name for member, _ in found]
    labels = [label for _, label in found if label is not None]
    index = Index(
        names=Names.of(names),
        shards=shards,
        shard=np.repeat(np.arange(len(parts), dtype=np.int32), [len(part) for part in parts]),
        start=np.array([member.start for member, _ in found], np.int64),
        size=np.array([member.size for member, _ in found], np.int64),
        packed=np.array([member.packed for member, _ in found] if any(member.packed for member, _ in found) else []),
        watched=watched,
        left_out=dict(left_out),
    )
    if names and len(labels) == len(names):
        add_column(index.labels, index.classes, "class", labels)
    else:
        _label_by_folder(index, names)
    return index


def _scan_shard(path: str) -> tuple[list[tuple[Member, str | None]], Counter[str]]:
    """Each image with its label, and how many other members have each extension.

    The label is the text of the `.cls` member with the same key.
    """
    images, labels, others = [], {}, []
    with open(path, "rb", buffering=0) as file:
        for member in files_of(path):
            name = member.name
            key, _, ending = name.rpartition("/")[2].partition(".")
            key = name[: len(name) - len(ending)] if ending else name
            if is_image(name):
                images.append((member, key))
            elif ending == "cls":
                data = os.pread(file.fileno(), min(member.size, _LONGEST_LABEL + 1), member.start)
                labels[key] = _label(inflate(data) if member.packed else data, path, member.start)
            else:
                others.append(name)
    return [(member, labels.get(key)) for member, key in images], _others(others)


def _label(data: bytes, path: str, start: int) -> str:
    """The text of a .cls member. Raises ValueError with its place."""
    try:
        text = data.decode().strip()
    except UnicodeDecodeError:
        text = ""
    if not text or len(data) > _LONGEST_LABEL:
        raise ValueError(f"{path}: the .cls member at byte {start} is no label but {data[:40]!r}")
    return text


def _beside(root: str, shards: list[str]) -> Counter[str]:
    """How many other files of each extension lie in a folder of shards. ValueError for folders of images there."""
    others = []
    for entry in sorted(os.scandir(root), key=lambda entry: entry.name):
        if entry.name.startswith(".") or not entry.is_dir():
            others.append(entry.name)
        elif loose := _first_image(entry.path):
            raise ValueError(
                f"data path {root!r} holds tar shards ({os.path.basename(shards[0])}) and folders of images "
                f"({printable(os.path.relpath(loose, root))}); move one kind away, or name the shards alone: "
                f"{os.path.join(root, '*.tar')!r}"
            )
    return _others(set(others) - {os.path.basename(shard) for shard in shards})


def _first_image(root: str) -> str | None:
    """The path of some image below a folder, None where there is none."""
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if is_image(name):
                return os.path.join(folder, name)
    return None
