"""A map of where there is something to see: how much of each patch of a crop lies there."""

from __future__ import annotations

import os
from functools import lru_cache

import numpy as np

from ijepa_fast.data.crops import crop_keys, drawn_crops
from ijepa_fast.data.expand import read_map
from ijepa_fast.data.formats import open_image
from ijepa_fast.data.order import SampleStream
from ijepa_fast.data.sources import Source

_HELD = 128  # maps that are kept in memory
_FINEST = 1024  # places along an axis at which a map that is kept is known


class Area:
    """A map (H, W) of an image of `height` x `width` pixels, as sums over its corners: any box costs the same."""

    def __init__(self, inside: np.ndarray, height: int, width: int):
        self.height, self.width = height, width
        sums = np.pad(inside.cumsum(0, dtype=np.int64).cumsum(1), ((1, 0), (1, 0)))
        self._places = [np.append(np.arange(0, side, -(-side // _FINEST)), side) for side in inside.shape]
        self._sums = sums[np.ix_(*self._places)]
        self._scale = inside.shape[0] / height, inside.shape[1] / width

    def shares(self, y: np.ndarray, x: np.ndarray) -> np.ndarray:
        """How much of each box lies inside, (rows, columns) in 0..1. y (rows + 1,), x (columns + 1,): edges, pixels."""
        (top, bottom), (left, right) = (self._between(axis, edges) for axis, edges in enumerate((y, x)))
        held = self._sums[np.ix_(bottom, right)] - self._sums[np.ix_(top, right)]
        held = held - self._sums[np.ix_(bottom, left)] + self._sums[np.ix_(top, left)]
        heights, widths = (
            places[last] - places[first]
            for places, first, last in zip(self._places, (top, left), (bottom, right), strict=True)
        )
        shares: np.ndarray = held / np.outer(heights, widths)
        return shares

    def _between(self, axis: int, edges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The numbers of the places around each interval between edges: at least one apart."""
        places, at = self._places[axis], edges * self._scale[axis]
        first = np.clip(np.searchsorted(places, at[:-1] + 1e-6, "right") - 1, 0, len(places) - 2)
        last = np.clip(np.searchsorted(places, at[1:] - 1e-6, "left"), 0, len(places) - 1)
        return first, np.maximum(last, first + 1)


class Inside:
    """How much of each patch of the crops at positions of the stream lies where `data.where` says.

    It follows from the seed and the position alone, as order and crops do; a sample that takes the place of a bad one
    is not known here.

    source: of windows, with a map. seed, scale, ratio, flip, crops_per_image: of the loader. grid: rows and columns of
    patches.
    """

    def __init__(
        self,
        source: Source,
        seed: int,
        scale: tuple[float, float],
        ratio: tuple[float, float],
        flip: bool,
        grid: tuple[int, int],
        crops_per_image: int = 0,
    ):
        self._source, self._seed, self._scale, self._ratio, self._flip = source, seed, scale, ratio, flip
        self._grid, self._stream = grid, SampleStream(len(source), seed, source.groups)
        self._per_image = crops_per_image
        self._area = lru_cache(_HELD)(self._opened)

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """float (B, N) in 0..1, for positions (B,). Raises ValueError, OSError where a map or an image is gone."""
        index, window = self._source.index, self._source.reading.window or 0
        ids = self._stream[positions]
        pages = index.page[ids] if len(index.page) else np.zeros_like(ids)
        areas = [
            self._area(index.names[number], page) for number, page in zip(ids.tolist(), pages.tolist(), strict=True)
        ]
        sizes = np.array([(min(window, area.height), min(window, area.width)) for area in areas])
        keys = crop_keys(positions, ids, len(self._source), self._per_image)
        crops, mirrored = drawn_crops(self._seed, keys, sizes, self._scale, self._ratio)
        corners = np.stack([index.x[ids], index.y[ids]], axis=1) + crops[:, :2]
        shares = np.stack(
            [
                area.shares(*(np.linspace(corner[a], corner[a] + sides[a], self._grid[1 - a] + 1) for a in (1, 0)))
                for area, corner, sides in zip(areas, corners, crops[:, 2:], strict=True)
            ]
        )
        if self._flip:
            shares[mirrored] = shares[mirrored][:, :, ::-1]
        return shares.reshape(len(positions), -1)

    def _opened(self, name: str, page: int) -> Area:
        reading = self._source.reading
        raster = open_image(name, os.path.join(self._source.root, name), reading, page)
        return Area(read_map(str(reading.where), name), raster.height, raster.width)
