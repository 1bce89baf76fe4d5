"""Image collections: what files there are, their bytes, and their labels where the layout has them."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import numpy as np

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp")
LABELS_FILE = "labels.csv"


class Source:
    """A fixed, ordered collection of encoded images.

    labels: (n,) int64 class indices into `classes`, or None. columns: every column of the folder's labels.csv, (n,) each.
    """

    def __init__(self, labels: np.ndarray | None, classes: list[str], columns: dict[str, np.ndarray] | None = None):
        self.labels, self.classes, self.columns = labels, classes, columns or {}

    def __len__(self) -> int:
        raise NotImplementedError

    def name(self, index: int) -> str:
        """What to call sample `index` in a message."""
        raise NotImplementedError

    def read(self, index: int) -> bytes:
        """The encoded bytes of sample `index`."""
        raise NotImplementedError


class FileSource(Source):
    """Files of a folder, by relative name in sorted order."""

    def __init__(self, root: Path, names: list[str], labels, classes, columns=None):
        super().__init__(labels, classes, columns)
        self.root, self.names = str(root), names

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        return os.path.join(self.root, self.names[index])

    def read(self, index: int) -> bytes:
        with open(os.path.join(self.root, self.names[index]), "rb", buffering=0) as file:
            return file.read()


def open_source(path: str | Path, label: str | None = None) -> Source:
    """The images under `path`: a folder, nested (its first level names the classes) or flat.

    A labels.csv in the folder (columns: file, then one a label) takes precedence; `label` names the column to use, the
    first by default. Raises ValueError for a path that does not exist or holds no image.
    """
    root = Path(path)
    if not root.exists():
        raise ValueError(f"data.path: {str(path)!r} does not exist; expected a folder of images")
    names = sorted(
        os.path.relpath(os.path.join(folder, file), root)
        for folder, _, files in os.walk(root, followlinks=True)
        for file in files
        if file.lower().endswith(EXTENSIONS)
    )
    if not names:
        raise ValueError(
            f"data.path: {str(path)!r} holds no image; expected files named {', '.join('*' + e for e in EXTENSIONS)}"
        )
    if (root / LABELS_FILE).is_file():
        columns, classes = _read_labels(root / LABELS_FILE, names)
        chosen = label or next(iter(columns))
        if chosen not in columns:
            raise ValueError(f"data.label: no column {chosen!r} in {LABELS_FILE}; it has {', '.join(columns)}")
        return FileSource(root, names, columns[chosen], classes[chosen], columns)
    if label is not None:
        raise ValueError(f"data.label: {label!r} was asked for, but {str(path)!r} has no {LABELS_FILE}")
    if all(os.sep in name for name in names):
        classes, labels = np.unique([name.split(os.sep, 1)[0] for name in names], return_inverse=True)
        return FileSource(root, names, labels.astype(np.int64), classes.tolist())
    return FileSource(root, names, None, [])


def _read_labels(path: Path, names: list[str]) -> tuple[dict[str, np.ndarray], dict[str, list[str]]]:
    with open(path, newline="") as file:
        rows = {row["file"]: row for row in csv.DictReader(file)}
    missing = [name for name in names if name not in rows]
    if missing:
        raise ValueError(f"{path}: {len(missing)} images have no row, the first {missing[0]!r}; write one a file")
    columns, classes = {}, {}
    for column in next(iter(rows.values())):
        if column == "file":
            continue
        values = [rows[name][column] for name in names]
        names_of, index = np.unique(values, return_inverse=True)
        columns[column], classes[column] = index.astype(np.int64), names_of.tolist()
    return columns, classes
