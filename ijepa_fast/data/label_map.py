"""Maps over images: classes of places (land cover, tissue, objects) or numbers (depth), in files of their own.

A map labels a whole sample, by what most of it is (`with_label_map`), or every place of it (`LabelMap.crop`).
"""

from __future__ import annotations

import os

import numpy as np

from ijepa_fast.data import Size
from ijepa_fast.data.expand import read_values, taken
from ijepa_fast.data.formats import is_dali, open_image
from ijepa_fast.data.headers import BadImage, screen
from ijepa_fast.data.sources import Source
from ijepa_fast.data.tables import add_classes

COLUMN = "map"


class LabelMap:
    """A map over each image of a source, loose files or windows of them.

    where: a file, or a folder with one for each image, of the same stem; of any resolution. numbers: whether its values
    are numbers, of which those that are not above 0 or not finite are none; else they are classes, whole numbers of
    which 0 is none. Raises ValueError for archives, and every method for a map that is missing or has other values.
    """

    def __init__(self, source: Source, where: str, numbers: bool = False):
        if type(source) is not Source or source.index.shards:
            raise ValueError(f"{where}: a map labels files of images, loose ones, not {source.root}")
        self.source, self.where, self.numbers = source, where, numbers
        self._kept: tuple[tuple[str, int], np.ndarray, Size] | None = None  # the last, as windows are in order

    def under(self, row: int) -> np.ndarray:
        """The part of the map that lies under sample `row`: (h, w), int64 classes or float32 numbers, 0 for none."""
        values, (height, width) = self._whole(row)
        index, window = self.source.index, self.source.reading.window
        if not len(index.y) or window is None:
            return values
        y, x = int(index.y[row]), int(index.x[row])
        scale = np.array(values.shape) / (height, width)
        top, left = np.floor(np.array([y, x]) * scale).astype(int)
        bottom, right = np.ceil(np.minimum([y + window, x + window], (height, width)) * scale).astype(int)
        return values[top : max(bottom, top + 1), left : max(right, left + 1)]

    def crop(self, row: int, crop: Size, cover: Size) -> np.ndarray:
        """The map at the pixels of an evaluation's crop of sample `row`, (H, W), the nearest value at each.

        crop: height and width, of the centre of an image that just covers `cover`. Raises ValueError too where the map
        has another shape than its image.
        """
        values, (height, width) = self._whole(row)
        across = values.shape[0] / height, values.shape[1] / width
        if abs(across[0] - across[1]) * max(height, width) > 1.01:  # more than a pixel of the map
            raise ValueError(
                f"{self.where}: expected a map of the shape of {self.source.name(row)}, {height} x {width} pixels or "
                f"fewer of the same aspect, found {values.shape[0]} x {values.shape[1]}"
            )
        part = self.under(row)
        step = min(side / most for side, most in zip(part.shape, cover))
        rows, columns = (
            np.clip((length / 2 + (np.arange(side) + 0.5 - side / 2) * step).astype(int), 0, length - 1)
            for length, side in zip(part.shape, crop)
        )
        return part[np.ix_(rows, columns)]

    def _whole(self, row: int) -> tuple[np.ndarray, Size]:
        """The map over the image that sample `row` is of, and the image's height and width."""
        index = self.source.index
        key = index.names[row], int(index.page[row]) if len(index.page) else 0
        if self._kept is None or self._kept[0] != key:
            self._kept = key, self._read(key[0]), self._size(row, *key)
        return self._kept[1], self._kept[2]

    def _read(self, name: str) -> np.ndarray:
        what = "the map of numbers" if self.numbers else "the map of classes"
        values = read_values(self.where, name, what)
        if values.shape[2] == 1 and self.numbers:
            return np.where(np.isfinite(values[..., 0]) & (values[..., 0] > 0), values[..., 0], np.float32(0))
        if values.shape[2] != 1 or not (values == np.rint(values)).all() or values.min() < 0:
            kind = "of numbers" if self.numbers else "of whole numbers, 0 for none,"
            raise ValueError(
                f"{self.where}: expected a map of one channel {kind} for {name}; found {values.shape[2]} channels from "
                f"{values.min():g} to {values.max():g}"
            )
        return values[..., 0].astype(np.int64)

    def _size(self, row: int, name: str, page: int) -> Size:
        try:
            if is_dali(name):
                return screen(self.source.stored(row))
            whole = open_image(name, os.path.join(self.source.root, name), self.source.reading, page)
        except BadImage as error:
            raise ValueError(f"{self.source.name(row)}: {error}") from None
        return whole.height, whole.width


def with_label_map(source: Source, where: str) -> Source:
    """Those samples of `source` that the map has a class for, with the label column "map".

    where: of a LabelMap of classes. The class of a sample, an image or a window of one, is what most of the map under
    it is; where that is 0, the sample is left out. Two maps of one scene, each 0 where the other is not, part it for
    training and testing. Raises ValueError.
    """
    labels, rows, values = LabelMap(source, where), [], []
    for row in range(len(source)):
        found, counts = np.unique(labels.under(row), return_counts=True)
        if value := int(found[counts.argmax()]):
            rows.append(row)
            values.append(value)
    if not rows:
        raise ValueError(f"{where}: has no class for any of {len(source)} samples of {source.root}; 0 is none")
    chosen = taken(source.index, np.array(rows))
    chosen.labels, chosen.classes, chosen.problem = {}, {}, ""
    add_classes(chosen.labels, chosen.classes, COLUMN, [str(value) for value in values])
    return Source(source.root, chosen, reading=source.reading)
