"""How images are read that are not simply RGB of eight bits: channels, depth, and which part of a file is an image.

A `Raster` is an image that has been opened: its size is known, and windows of it are read when they are asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from ijepa_fast.data import DEPTHS
from ijepa_fast.data.headers import BadImage


@dataclass(frozen=True)
class Reading:
    """How the files of a source become images.

    channels: of an image; 0: as the first has them. depth: of DEPTHS; auto: as the first image has it, other numbers
    than bytes and 16-bit words becoming float32. bands: the channels of the files to take, from 0; None: all. axes: of
    arrays, one letter each: N images, H, W, C. key: the array in a file of several. page: of a TIFF file or a stack;
    "each": every page is an image. nodata: pixels of this value, and not-a-number, are filled with `fill`; None: there
    are none. fill: of each channel, in units of the depth's range. window: large images are read by squares of so many
    pixels; None: whole. where: a map of where windows may lie, a file, or a folder with one for each image.
    """

    channels: int = 3
    depth: str = "auto"
    bands: tuple[int, ...] | None = None
    axes: str | None = None
    key: str | None = None
    page: int | str | None = None
    nodata: float | None = None
    fill: tuple[float, ...] = ()
    window: int | None = None
    where: str | None = None

    @property
    def plain(self) -> bool:
        """Whether images are RGB of eight bits, which DALI reads."""
        special = (self.bands, self.nodata, self.window)
        return self.channels == 3 and self.depth in ("auto", "uint8") and all(value is None for value in special)

    def of(self, raster: Raster) -> Reading:
        """The same reading with the depth of `raster` for "auto", and its channels for 0."""
        depth = depth_of(raster.dtype) if self.depth == "auto" else self.depth
        return replace(self, depth=depth, channels=self.channels or raster.channels)


@dataclass
class Raster:
    """An opened image.

    height, width: pixels. channels, dtype: of the file. read: (y, x, height, width) -> array (height, width, channels).
    held: bytes of memory that it holds.
    """

    height: int
    width: int
    channels: int
    dtype: np.dtype
    read: Callable[[int, int, int, int], np.ndarray]
    held: int = 0

    @classmethod
    def of(cls, array: np.ndarray) -> Raster:
        """Of an array (H, W, C)."""
        height, width, channels = array.shape
        return cls(height, width, channels, array.dtype, lambda y, x, h, w: array[y : y + h, x : x + w], array.nbytes)

    def part(self, y: int, x: int, height: int, width: int) -> Raster:
        """A window of it as a raster of its own."""
        read = self.read
        return Raster(
            height, width, self.channels, self.dtype, lambda top, left, h, w: read(y + top, x + left, h, w), self.held
        )


def depth_of(dtype: np.dtype) -> str:
    """The depth that images stored as `dtype` have. Raises BadImage for what is no number."""
    if dtype == np.uint8 or dtype == np.bool_:
        return "uint8"
    if dtype.kind == "u" and dtype.itemsize == 2:
        return "uint16"
    if dtype.kind in "iuf":
        return "float32"
    raise BadImage(f"expected pixels that are numbers, found {dtype}; convert the file")


def fit(raster: Raster, reading: Reading, max_pixels: int | None = None) -> Raster:
    """The raster as `reading` wants it: its channels, in its depth. Raises BadImage, saying what to change.

    reading.depth must not be "auto". max_pixels: a larger image is refused.
    """
    if raster.height < 1 or raster.width < 1:
        raise BadImage(f"expected an image, found {raster.height} x {raster.width} pixels")
    if max_pixels is not None and raster.height * raster.width > max_pixels:
        raise BadImage(
            f"declares {raster.width} x {raster.height} pixels, over the bound of {max_pixels}; raise data.max_pixels, "
            "or read it by windows: data.window"
        )
    bands = reading.bands
    if bands is not None:
        if strange := [band for band in bands if not 0 <= band < raster.channels]:
            raise BadImage(
                f"expected bands 0 to {raster.channels - 1}, which the file has, found {strange[0]} in data.bands; "
                "change data.bands"
            )
    elif raster.channels != reading.channels:
        raise BadImage(
            f"expected {reading.channels} channels, found {raster.channels}; set data.channels={raster.channels}, or "
            "choose of them with data.bands"
        )
    found, wanted = depth_of(raster.dtype), reading.depth
    if found != wanted and wanted != "float32":
        raise BadImage(
            f"expected {wanted}, found {raster.dtype}; convert the files to one depth, or set data.depth=float32, "
            "which takes values as they are stored"
        )

    def read(y: int, x: int, height: int, width: int) -> np.ndarray:
        pixels = raster.read(y, x, height, width)
        if pixels.shape != (height, width, raster.channels):
            expected = (height, width, raster.channels)
            raise BadImage(f"expected pixels of shape {expected}, found {pixels.shape}; is the file cut short?")
        if bands is not None:
            pixels = pixels[..., list(bands)]
        if pixels.dtype == np.bool_:
            pixels = pixels.view(np.uint8) * np.uint8(255)
        with np.errstate(over="ignore"):  # what float32 does not hold is infinite, and refused as such
            pixels = np.ascontiguousarray(pixels, dtype=np.dtype(wanted))
        return _filled(pixels, reading)

    channels = raster.channels if bands is None else len(bands)
    return Raster(raster.height, raster.width, channels, np.dtype(wanted), read, raster.held)


def _filled(pixels: np.ndarray, reading: Reading) -> np.ndarray:
    """The pixels with `fill` where there are no data. Raises BadImage for NaN where none are meant."""
    lost = ~np.isfinite(pixels) if pixels.dtype.kind == "f" else None
    if reading.nodata is None:
        if lost is not None and lost.any():
            raise BadImage(
                f"expected finite pixels, found {int(lost.sum())} of {lost.size} that are NaN or infinite; set "
                "data.nodata, to a value that does not occur, to fill them with data.mean"
            )
        return pixels
    empty = pixels == reading.nodata
    lost = empty if lost is None else empty | lost
    if lost.any():
        fill = np.asarray(reading.fill or [0.0] * pixels.shape[-1]) * DEPTHS[reading.depth]
        pixels = np.where(lost, (fill if pixels.dtype.kind == "f" else np.rint(fill)).astype(pixels.dtype), pixels)
    return pixels
