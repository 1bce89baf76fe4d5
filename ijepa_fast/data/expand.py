"""From files to samples, where a file is not one image: stacks of images, pages, windows of large images."""

from __future__ import annotations

import functools
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from ijepa_fast.data.formats import STACKS, TIFF, count, extension, labels, open_image
from ijepa_fast.data.headers import BadImage
from ijepa_fast.data.index import Index, Names
from ijepa_fast.data.reading import Raster, Reading
from ijepa_fast.data.tables import add_column

_THREADS = 8
_SHARE = 0.5  # of a window must lie where the map says, at least


def is_single(path: str) -> bool:
    """Whether one path is a source of its own: a file of arrays, or a TIFF."""
    return extension(path.rstrip("/")) in (*STACKS, *TIFF) and os.path.exists(path)


def expand(index: Index, root: str, reading: Reading) -> Index:
    """The index with a sample for each image of each file, and for each window of each image.

    A stack's own labels are taken where the collection has no others. Raises ValueError, naming the file that cannot be
    opened, and ImportError for a package that reading it needs.
    """
    names = [index.names[number] for number in range(len(index))]
    if index.shards or not names:
        if reading.window and names:
            raise ValueError("data.window: images in archives are not read by windows; unpack them")
        return index
    paths = [os.path.join(root, name) for name in names]
    several = extension(names[0]) in STACKS or (extension(names[0]) in TIFF and reading.page == "each")
    if several:
        counts = _counts(paths, reading)
        if max(counts) > 1 or len(counts) == 1:
            rows = np.repeat(np.arange(len(names)), counts)
            index = taken(index, rows)
            index.page = np.concatenate([np.arange(number) for number in counts])
            if not index.labels:
                found = [labels(path, reading) for path in paths]
                own = [part for part, _ in found if part is not None]
                wrong = [f"{path}: {problem}" for path, (_, problem) in zip(paths, found) if problem]
                if wrong:
                    index.problem = f"{wrong[0]}; expected one for each"
                elif len(own) == len(paths):
                    values = np.concatenate(own)
                    add_column(index.labels, index.classes, "class", [str(value) for value in values.tolist()])
    return index if reading.window is None else _windows(index, root, reading)


def _counts(paths: list[str], reading: Reading) -> list[int]:
    """How many images each file holds. One among others that cannot be opened holds one, which is bad when it is read.

    Raises ValueError, for the first, where none can be opened.
    """
    problems: list[ValueError | OSError] = []

    def of(path: str) -> int:
        try:
            return count(path, reading)
        except (ValueError, OSError) as error:
            problems.append(error)
            return 1

    with ThreadPoolExecutor(_THREADS) as pool:
        counts = list(pool.map(of, paths))
    if len(problems) == len(paths):
        raise problems[0]
    return counts


def taken(index: Index, rows: np.ndarray) -> Index:
    """The index of the samples `rows` of another."""
    return Index(
        Names.of([index.names[row] for row in rows.tolist()]),
        labels={name: np.asarray(values)[rows] for name, values in index.labels.items()},
        classes=index.classes,
        page=index.page[rows] if len(index.page) else index.page,
        y=index.y[rows] if len(index.y) else index.y,
        x=index.x[rows] if len(index.x) else index.x,
        watched=index.watched,
        left_out=index.left_out,
        problem=index.problem,
    )


def _windows(index: Index, root: str, reading: Reading) -> Index:
    """The index of the windows of all images: a grid of squares, the last ones moved in to the border."""
    size = reading.window or 0
    rows: list[int] = []
    corners: list[np.ndarray] = []
    for number in range(len(index)):
        name, page = index.names[number], int(index.page[number]) if len(index.page) else 0
        path = os.path.join(root, name)
        try:
            raster = open_image(name, path, reading, page)
        except BadImage as error:
            raise ValueError(f"{path}: {error}") from None
        places = [np.array([y, x]) for y in _starts(raster.height, size) for x in _starts(raster.width, size)]
        if reading.where is not None:
            places = _where(places, raster, size, name, reading)
        corners += places
        rows += [number] * len(places)
    if not rows:
        raise ValueError(f"data.where={reading.where} leaves no window of {root}; is it nonzero where data are?")
    if len(index.page) == 0:
        index.page = np.zeros(len(index), np.int64)
    index = taken(index, np.array(rows))
    index.y, index.x = np.stack(corners).T.astype(np.int64).copy()
    return index


def _starts(length: int, size: int) -> list[int]:
    """Where windows of `size` begin along an axis: side by side, the last one ending at the border."""
    if length <= size:
        return [0]
    count = -(-length // size)
    return [min(number * size, length - size) for number in range(count)]


def _where(places: list[np.ndarray], raster: Raster, size: int, name: str, reading: Reading) -> list[np.ndarray]:
    """Those places whose window lies where the map is not zero, by half of it at least. The map may be coarser."""
    inside = read_map(str(reading.where), name)
    scale = np.array(inside.shape) / (raster.height, raster.width)
    kept = []
    for place in places:
        low = np.floor(place * scale).astype(int)
        high = np.maximum(np.ceil((place + size) * scale).astype(int), low + 1)
        if inside[low[0] : high[0], low[1] : high[1]].mean() >= _SHARE:
            kept.append(place)
    return kept


def read_map(where: str, name: str) -> np.ndarray:
    """The map of the image `name`, bool (H, W), of any resolution. Raises ValueError.

    where: a file, or a folder with one for each image, of the same stem.
    """
    inside: np.ndarray = read_values(where, name).max(axis=2) > 0
    return inside


@functools.lru_cache(4)
def _by_stem(folder: str, _changed: int) -> dict[str, str]:
    """The files of a folder by stem, of several the first by name."""
    return {os.path.splitext(file)[0]: file for file in sorted(os.listdir(folder), reverse=True)}


def read_values(where: str, name: str, key: str = "data.where") -> np.ndarray:
    """The map of the image `name`, float32 (H, W, C); `where` is as in read_map. Raises ValueError, naming `key`."""
    path = where
    if os.path.isdir(path) and extension(path) not in STACKS:
        stem = os.path.splitext(os.path.basename(name))[0]
        found = _by_stem(path, os.stat(path).st_mtime_ns).get(stem)
        if found is None:
            raise ValueError(f"{key}={path}: expected a map named {stem}.*, found none; add one, empty or full")
        path = os.path.join(path, found)
    if not os.path.exists(path):
        raise ValueError(f"{key}={path}: there is no such file or folder")
    try:
        reading = Reading(channels=1, depth="float32")
        if extension(path) in STACKS and (number := count(path, reading)) > 1:
            raise ValueError(f"{key}={path}: expected one map, found {number} in an array")
        opened = open_image(path, path, reading)
        return np.asarray(opened.read(0, 0, opened.height, opened.width), np.float32)
    except BadImage as error:
        raise ValueError(f"{key}={path}: {error}") from None
