"""What reads the samples of a source ahead of their decoding, and keeps in memory what it may."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from ijepa_fast.data.arrays import ArrayDecoder
from ijepa_fast.data.decode import Decoder, Work, decode_all
from ijepa_fast.data.formats import as_ppm
from ijepa_fast.data.headers import MAX_PIXELS, BadImage, screen
from ijepa_fast.data.reading import Raster
from ijepa_fast.data.resident import Room, on_device
from ijepa_fast.data.sources import Source
from ijepa_fast.data.storage import Patience

READERS = 8  # threads that read files
_BATCH = 32  # images decoded at once where all are


class Reader:
    """Reads samples and checks their headers. It keeps those it reads first in memory, up to `cache_bytes` in all."""

    def __init__(self, source: Source, max_pixels: int, cache_bytes: int, stop: threading.Event | None = None):
        self.source, self.max_pixels, self._room = source, max_pixels, cache_bytes
        self._resident = False
        self._patience = Patience(stop)
        self._cache: dict[int, tuple] = {}
        # Where two epochs meet, two threads may want the same sample: the second waits for what the first reads.
        self._locks = [threading.Lock() for _ in range(64)]

    def __call__(self, index: int) -> tuple[Any, int, int]:
        """The encoded bytes of a sample, uint8 (n,), its raster, or it as a tensor; and its height and width in pixels.

        Raises BadImage, and StorageTrouble where storage stays away.
        """
        with self._locks[index % len(self._locks)]:
            return self._row(index)

    def _row(self, index: int) -> tuple[Any, int, int]:
        row = self._cache.get(index)
        if row is None:
            try:
                row, held = self._patience(lambda: opened(self.source, index, self.max_pixels), self._name(index))
            except OSError as error:
                raise BadImage(f"cannot be read: {error.strerror or error}") from error
            if self._resident:
                raise BadImage("cannot be decoded")
            if held <= self._room:
                self._room -= held
                self._cache[index] = row
        return row

    def keep_all(self, threads: int, stop: threading.Event, device: torch.device | None = None) -> None:
        """Decode every sample that can be, and keep it: on `device` as a tensor, else as bytes that need no decoding.

        Raises ValueError where they do not fit.
        """
        room = Room(device or "cpu", len(self.source))
        for index, raster in decoded(self.source, threads, self.max_pixels):
            if stop.is_set():
                return
            room.take(raster.height * raster.width * raster.channels * raster.dtype.itemsize)
            if device is not None:
                pixels = on_device(raster.read(0, 0, raster.height, raster.width), device)
                self._cache[index] = pixels, raster.height, raster.width
            elif self.source.reading.plain:
                self._cache[index] = np.frombuffer(as_ppm(raster), np.uint8), raster.height, raster.width
            else:
                self._cache[index] = raster, raster.height, raster.width
        self._resident = device is not None

    def _name(self, index: int) -> Callable[[], str]:
        return lambda: self.source.name(index)


def opened(source: Source, index: int, max_pixels: int) -> tuple[tuple[Any, int, int], int]:
    """(encoded bytes uint8 (n,), or a raster in memory, height, width) of a sample, and the bytes that it holds.

    Raises OSError, and BadImage for what cannot be used.
    """
    if source.reading.plain:
        data = source.read(index)
        return (np.frombuffer(data, np.uint8), *screen(data, max_pixels)), len(data)
    raster = source.raster(index, max_pixels)
    # All of it, and not what a window needs: else it would depend on the window whether the sample is bad.
    raster = Raster.of(raster.read(0, 0, raster.height, raster.width))
    return (raster, raster.height, raster.width), raster.held


def make_decoder(source: Source, **options: Any) -> Decoder | ArrayDecoder:
    """What decodes the images of `source`. options: of either."""
    return (Decoder if source.reading.plain else ArrayDecoder)(**options)


class _WholeDecoder(Decoder):
    """Decodes whole images: per work a list of rasters."""

    def _graph(self, works: Iterable[tuple]) -> tuple:
        return (self._decoded(works, 0)[0],)

    def _collect(self, outputs: tuple) -> list[Raster]:
        images = outputs[0]
        return [Raster.of(np.array(images[row])) for row in range(len(images))]


def decoded(source: Source, threads: int, max_pixels: int = MAX_PIXELS) -> Iterator[tuple[int, Raster]]:
    """(number, decoded image) of every sample that can be decoded, as training decodes it."""

    def read_one(index: int) -> tuple | None:
        try:
            return index, *opened(source, index, max_pixels)[0]
        except (BadImage, OSError):  # the loader meets it again, and lists it
            return None

    def works() -> Iterator[Work]:
        for first in range(0, len(source), _BATCH):
            rows = [row for row in readers.map(read_one, range(first, min(first + _BATCH, len(source)))) if row]
            if rows:
                sizes = np.array([row[2:] for row in rows], np.int32)
                windows = np.concatenate([0 * sizes, sizes[:, ::-1]], axis=1)
                yield Work(np.array([row[0] for row in rows]), sizes[:, 0], [row[1] for row in rows], windows)

    with ThreadPoolExecutor(READERS) as readers:
        if not source.reading.plain:
            for index in range(len(source)):
                if row := read_one(index):
                    yield index, row[1]
            return
        decoder = _WholeDecoder(crop=1, interpolation="bilinear", flip=False, device="cpu", threads=threads)
        try:
            for work, rasters in decode_all(decoder, works(), lambda work, bad: work.without(bad), _BATCH):
                yield from zip(work.ids.tolist(), rasters)
        finally:
            decoder.close()
