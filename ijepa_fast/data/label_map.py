"""Labels of images and windows from a map of classes: land cover, tissue, whatever was drawn over a scene."""

from __future__ import annotations

import os

import numpy as np

from ijepa_fast.data.expand import read_values, taken
from ijepa_fast.data.formats import open_image
from ijepa_fast.data.sources import Source
from ijepa_fast.data.tables import add_classes

COLUMN = "map"


def with_label_map(source: Source, where: str) -> Source:
    """Those samples of `source` that the map has a class for, with the label column "map".

    where: a file, or a folder with one for each image, of the same stem; whole numbers, of any resolution. 0 is no
    class. The class of a sample, an image or a window of one, is what most of the map under it is; where that is 0, the
    sample is left out. Two maps of one scene, each 0 where the other is not, part it for training and testing. Raises
    ValueError.
    """
    if type(source) is not Source or source.index.shards:
        raise ValueError(f"{where}: a map of classes labels files of images, loose ones, not {source.root}")
    index, rows, values = source.index, [], []
    kept: tuple[tuple[str, int], np.ndarray, tuple[int, int]] | None = None  # the last image, as windows are in order
    for row in range(len(source)):
        name, page = index.names[row], int(index.page[row]) if len(index.page) else 0
        if kept is None or kept[0] != (name, page):
            whole = open_image(name, os.path.join(source.root, name), source.reading, page)
            kept = (name, page), _classes(where, name), (whole.height, whole.width)
        _, classes, (height, width) = kept
        y, x = (int(index.y[row]), int(index.x[row])) if len(index.y) else (0, 0)
        size = source.reading.window if len(index.y) and source.reading.window else max(height, width)
        scale = np.array(classes.shape) / (height, width)
        top, left = np.floor(np.array([y, x]) * scale).astype(int)
        bottom, right = np.ceil(np.minimum([y + size, x + size], (height, width)) * scale).astype(int)
        found, counts = np.unique(classes[top : max(bottom, top + 1), left : max(right, left + 1)], return_counts=True)
        if value := int(found[counts.argmax()]):
            rows.append(row)
            values.append(value)
    if not rows:
        raise ValueError(f"{where}: has no class for any of {len(source)} samples of {source.root}; 0 is none")
    chosen = taken(index, np.array(rows))
    chosen.labels, chosen.classes, chosen.problem = {}, {}, ""
    add_classes(chosen.labels, chosen.classes, COLUMN, [str(value) for value in values])
    return Source(source.root, chosen, reading=source.reading)


def _classes(where: str, name: str) -> np.ndarray:
    """The map of an image, int64 (H, W). Raises ValueError for what is no map of classes."""
    values = read_values(where, name, "the map of classes")
    if values.shape[2] != 1 or not (values == np.rint(values)).all() or values.min() < 0:
        raise ValueError(
            f"{where}: expected a map of one channel of whole numbers, 0 for none, for {name}; found "
            f"{values.shape[2]} channels from {values.min():g} to {values.max():g}"
        )
    return values[..., 0].astype(np.int64)
