"""Labels and names in text files: labels.csv, and lists of paths."""

from __future__ import annotations

import csv
import math
import os
import re
from collections.abc import Iterator

import numpy as np
from tqdm import tqdm

from ijepa_fast.data.kinds import kind_of_file, printable

Columns = dict[str, np.ndarray]
Classes = dict[str, list[str]]

_INTEGER = re.compile(r"[+-]?\d+", re.ASCII)
_LOOKED_AT = 1000  # paths of a list whose files are looked for


def add_classes(labels: Columns, classes: Classes, column: str, values: list[str]) -> None:
    """Add a label column of classes, sorted as numbers where all are integers, else as text."""
    distinct = sorted(set(values))
    if all(map(_INTEGER.fullmatch, distinct)):
        distinct.sort(key=int)
    position = {value: number for number, value in enumerate(distinct)}
    labels[column] = np.array([position[value] for value in values], np.int64)
    classes[column] = [printable(value) for value in distinct]


def add_column(labels: Columns, classes: Classes, column: str, values: list[str]) -> None:
    """Add a label column. Whole numbers and text are classes; other numbers stay numbers."""
    try:
        numbers = [float(value) for value in values]
    except ValueError:
        add_classes(labels, classes, column, values)
        return
    if not all(map(float.is_integer, numbers)):
        labels[column] = np.array(numbers)
    elif all(map(_INTEGER.fullmatch, values)):
        add_classes(labels, classes, column, values)
    else:  # 3.0, as a table is written that had an empty cell once
        add_classes(labels, classes, column, [str(int(number)) for number in numbers])


def read_table(path: str, names: list[str]) -> tuple[Columns, Classes]:
    """The label columns of a labels.csv for the images `names`. Raises ValueError, naming file and line."""
    rows: dict[str, tuple[int, list[str]]] = {}
    lines = _rows(path)
    _, header = next(lines, (1, []))
    header = [column.strip() for column in header]
    columns = [column for column in header if column != "file"]
    if not columns or header.count("file") != 1 or len(set(header)) < len(header):
        raise ValueError(
            f"{path}, line 1: expected the columns file and at least one label, separated by commas; got {header}"
        )
    key = header.index("file")
    for line, row in lines:
        if len(row) != len(header):
            raise ValueError(f"{path}, line {line}: expected {len(header)} cells, got {len(row)}")
        name = os.path.normpath(row.pop(key))
        if name in rows:
            raise ValueError(f"{path}, line {line}: {printable(name)} has a row already, in line {rows[name][0]}")
        for column, value in zip(columns, row):
            if not value.strip() or _is_odd(value):
                raise ValueError(f"{path}, line {line}: expected a label under {column!r}, got {value!r}")
        rows[name] = line, [value.strip() for value in row]
    missing = [name for name in names if name not in rows]
    if missing:
        first = (
            f" (the first row is for {printable(next(iter(rows)))!r})" if len(missing) == len(names) and rows else ""
        )
        raise ValueError(
            f"{path}: {len(missing)} images have no row, the first {printable(missing[0])!r}; write one per file{first}"
        )
    labels: Columns = {}
    classes: Classes = {}
    for place, column in enumerate(columns):
        add_column(labels, classes, column, [rows[name][1][place] for name in names])
    return labels, classes


def _is_odd(value: str) -> bool:
    """Whether a cell is a number and none that can be learned: nan, inf."""
    try:
        return not math.isfinite(float(value))
    except ValueError:
        return False


def _rows(path: str) -> Iterator[tuple[int, list[str]]]:
    """(line, cells) of each row of a CSV file that is not empty."""
    if what := kind_of_file(path):
        raise ValueError(f"{path}: expected a CSV table, got {what}")
    line = last = 0
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            for row in reader:
                line, last = last + 1, reader.line_num  # a row in quotes has several lines, and is known by its first
                if any("\0" in cell for cell in row):
                    raise ValueError(f"{path}, line {line}: holds a NUL byte")
                if row:
                    yield line, row
    except UnicodeDecodeError:
        raise ValueError(f"{path}, line {_undecodable(path)}: is not UTF-8 text; save the table as UTF-8") from None
    except csv.Error as error:
        raise ValueError(f"{path}, line {last + 1}: {error}") from None


def _undecodable(path: str) -> int:
    """The number of the first line that is no UTF-8."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return number
    return 1


def read_list(path: str, extensions: tuple[str, ...]) -> tuple[list[str], list[str | None]]:
    """The paths and labels in a text list, see scan.scan_list. Raises ValueError, naming file and line."""
    names, labels = [], []
    if what := kind_of_file(path) or _is_binary(path):
        raise ValueError(f"{path}: expected a text list of paths, got {what}")
    with (
        # Names on disk need not be UTF-8.
        open(path, encoding="utf-8-sig", errors="surrogateescape") as file,
        tqdm(file, desc=f"indexing {path}", unit=" lines", mininterval=1, disable=None, delay=2) as bar,
    ):
        for number, line in enumerate(map(str.strip, bar), 1):
            if not line or line.startswith("#"):
                continue
            name, label = _split(line)
            if not name.lower().endswith(extensions) or "\0" in name:
                raise ValueError(
                    f"{path}, line {number}: expected a path that ends in {', '.join(extensions)}, without quotes, and "
                    f"a label, if any, after a tab or space; got the line {line[:80]!r}"
                )
            names.append(name)
            labels.append(label)
    _look(path, names)
    return names, labels


def _is_binary(path: str) -> str | None:
    """What to call a file that begins with many bytes that no text has; None for others."""
    with open(path, "rb") as file:
        head = file.read(512)
    strange = sum(byte < 9 or 13 < byte < 32 for byte in head)
    return "binary data of an unknown kind" if 4 * strange > len(head) else None


def _split(line: str) -> tuple[str, str | None]:
    """A path and its label: after a tab anything, after a space an integer, since names may hold spaces."""
    name, tab, label = line.partition("\t")
    if tab:
        return name.rstrip(), label.strip()
    parts = line.rsplit(None, 1)
    return (parts[0], parts[1]) if len(parts) == 2 and parts[1].isdecimal() else (line, None)


def _look(path: str, names: list[str]) -> None:
    """ValueError where none of the files, or none of a thousand from all over the list, is there."""
    some = names[:: -(-len(names) // _LOOKED_AT)] if names else []
    folder = os.path.dirname(path)
    for name in some:
        try:
            os.stat(os.path.join(folder, name))
            return
        except FileNotFoundError:
            continue
        except OSError:  # trouble of storage, or a name that is too long: not for this check
            return
    if some:
        whose = "" if len(some) == len(names) else f" of {len(names)} that were looked for"
        raise ValueError(
            f"{path}: {len(some)} of {len(some)} files{whose} do not exist, the first {printable(names[0])!r}; paths "
            f"are relative to the list's folder, {folder or '.'}"
        )
