"""Opening files as images: what Pillow reads, TIFF, and arrays in NPY, NPZ, HDF5 and Zarr.

A file holds one image or a stack of them: `count` says how many, `open_image` opens one. Packages that not everybody
needs are imported when a file asks for them.
"""

from __future__ import annotations

import functools
import importlib
import io
import json
import os
import sys
import threading
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from ijepa_fast.data.headers import BadImage
from ijepa_fast.data.kinds import kind_of_file
from ijepa_fast.data.reading import Raster, Reading

DALI = (".jpg", ".jpeg", ".png", ".webp")
PILLOW = (".gif", ".bmp", ".ppm", ".pgm", ".avif")
TIFF = (".tif", ".tiff")
STACKS = (".npy", ".npz", ".h5", ".hdf5", ".zarr")
EXTENSIONS = (*DALI, *PILLOW, *TIFF, *STACKS)
IN_PLACE = (*TIFF, *STACKS)  # of which windows are read where they lie

_FEW = 32  # channels: a longer axis counts images
_WHOLE = 1 << 26  # bytes of a TIFF image that is read whole; of a larger one only the tiles under a window are
_OPEN = 16  # files of which windows are read
_LABELS = ("labels", "label", "targets", "target", "y")  # arrays beside the images that are labels


def needs(package: str, what: str) -> ModuleType:
    """An optional package. Raises ImportError, in a sentence, where it is not installed."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise ImportError(
            f"{what} needs the package {package}, which is not installed; pip install ijepa_fast[science]"
        ) from None


def extension(name: str) -> str:
    """The extension of a file's name, in small letters."""
    return os.path.splitext(name)[1].lower()


def is_dali(name: str) -> bool:
    """Whether DALI reads a file of this name."""
    return name.lower().endswith(DALI)


def open_image(name: str, data: bytes | str, reading: Reading, page: int = 0) -> Raster:
    """Open one image. Raises BadImage, OSError, and ImportError for a package that is missing.

    name: of the file, for its extension. data: its bytes, or its path. page: which of its images, where it has several.
    """
    kind = extension(name)
    try:
        if kind in TIFF:
            return _tiff(data, reading, page)
        if kind in STACKS:
            return open_stack(data, kind, reading).raster(page)
        return _pillow(data, reading)
    except (BadImage, ImportError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:  # storage's, not a decoder's
            raise
        raise BadImage(f"cannot be decoded: {str(error) or type(error).__name__}") from None


def count(path: str, reading: Reading) -> int:
    """How many images the file at `path` holds. Raises ValueError naming it, ImportError."""
    kind = extension(path)
    try:
        if kind in STACKS:
            return open_stack(path, kind, reading).count
        if kind in TIFF and reading.page == "each":
            with _tifffile().TiffFile(path) as tiff:
                return len(tiff.pages)
    except ImportError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:  # storage's
            raise
        raise ValueError(f"{path}: {_why(path, error)}") from None
    return 1


# What libraries say of files of arrays, and what it means.
_MEANING = {
    "mmap length": "it is cut short",
    "truncated file": "it is cut short",
    "pickle": "it holds Python objects, which may be code and are not read, or it is damaged",
    "Python objects": "it holds Python objects, which may be code and are not read",
    "file signature": "expected an HDF5 file, got other bytes",
    "not a zip file": "expected an NPZ file, got other bytes, or one that is cut short",
    "found in store": "expected a Zarr array or group, found none",
}


def _why(path: str, error: Exception) -> str:
    """Why a file of arrays cannot be opened, in words."""
    what, text = kind_of_file(path), str(error) or type(error).__name__
    if what and not isinstance(error, BadImage) and not what.startswith(("a zip", "an HDF5", "a NumPy", "a TIFF")):
        return f"expected an array ({extension(path)}), got {what}"
    if isinstance(error, json.JSONDecodeError):
        return f"its description in JSON is damaged: {text}"
    return next((meaning for words, meaning in _MEANING.items() if words in text), text)


def labels(path: str, reading: Reading) -> tuple[np.ndarray | None, str]:
    """The labels in a file of arrays, one for each of its images, None where it has none; and what is wrong."""
    if extension(path) not in STACKS:
        return None, ""
    stack = open_stack(path, extension(path), reading)
    return stack.labels, stack.problem


# Pillow


def _pillow(data: bytes | str, reading: Reading) -> Raster:
    if reading.depth == "uint16" and _is_deep_png(data):
        codecs = needs("imagecodecs", "a PNG file of 16 bits and several channels")
        return Raster.of(codecs.png_decode(data if isinstance(data, bytes) else _bytes(data)))
    with (
        warnings.catch_warnings(action="ignore"),
        Image.open(io.BytesIO(data) if isinstance(data, bytes) else data) as image,
    ):
        if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
            _say_frames_once()
        height, width = image.height, image.width
        turned = ImageOps.exif_transpose(image)
        mode = turned.mode
        if reading.plain:
            turned = turned.convert("RGB")
        elif mode == "P":
            turned = turned.convert("RGBA" if "transparency" in turned.info else "RGB")
        elif mode in ("CMYK", "YCbCr", "LAB", "HSV"):
            turned = turned.convert("RGB")
        array = np.array(turned)
    if array.dtype.byteorder == ">":
        array = array.astype(array.dtype.newbyteorder("="))
    if mode == "I":  # 16 bits, which Pillow opens so in some files
        array = array.astype(np.uint16) if array.min() >= 0 and array.max() < 1 << 16 else array
    assert array.size >= height * width
    return Raster.of(array if array.ndim == 3 else array[..., None])


@functools.cache
def _say_frames_once() -> None:
    print("of images of several frames the first is read", file=sys.stderr)


def _is_deep_png(data: bytes | str) -> bool:
    head = data[:26] if isinstance(data, bytes) else _bytes(data, 26)
    return head[:8] == b"\x89PNG\r\n\x1a\n" and head[24:26] not in (b"\x10\x00",) and head[24:25] == b"\x10"


def _bytes(path: str, count: int = -1) -> bytes:
    with open(path, "rb") as file:
        return file.read(count)


# TIFF


def _tifffile() -> ModuleType:
    import logging

    module = needs("tifffile", "a TIFF file")
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # what matters is raised
    return module


def _tiff(data: bytes | str, reading: Reading, page: int) -> Raster:
    if isinstance(data, str) and (reading.window or os.path.getsize(data) > _WHOLE):
        return _large_tiff(data, reading, page)
    with _tifffile().TiffFile(io.BytesIO(data) if isinstance(data, bytes) else data) as tiff:
        pages, axes, shape = _pages(tiff, reading, page)
        try:
            array = np.stack([one.asarray() for one in pages]) if len(pages) > 1 else pages[0].asarray()
        except ValueError as error:
            if "imagecodecs" in str(error):
                needs("imagecodecs", "this TIFF file's compression")
            raise
    return Raster.of(_channels_last(array.reshape(shape), axes))


def _pages(tiff: Any, reading: Reading, page: int) -> tuple[list, str, tuple[int, ...]]:
    """The pages that an image lies on, the axes of them together, of Y, X and one other, and their shape."""
    chosen = page if reading.page == "each" else reading.page
    if isinstance(chosen, int):
        if not 0 <= chosen < len(tiff.pages):
            raise BadImage(f"expected page {chosen}, found {len(tiff.pages)} pages; change data.page")
        pages = [tiff.pages[chosen]]
        axes, shape = pages[0].axes, pages[0].shape
    else:
        series = tiff.series[0].levels[0]
        pages, axes, shape = list(series.pages), series.axes, series.shape
    kept = [(letter, size) for letter, size in zip(axes, shape) if size > 1 or letter in "YX"]
    axes, shape = "".join(letter for letter, _ in kept), tuple(size for _, size in kept)
    if len(axes) > 3 or any(one is None for one in pages):
        raise BadImage(
            f"expected an image of rows, columns and channels, found axes {axes} of {shape}; choose a page: "
            'data.page=0, or "each"'
        )
    return pages, axes, shape


def _channels_last(array: np.ndarray, axes: str) -> np.ndarray:
    if array.ndim == 2:
        return array[..., None]
    place = next(i for i, letter in enumerate(axes) if letter not in "YX")
    return np.ascontiguousarray(np.moveaxis(array, place, -1))


@functools.lru_cache(_OPEN)
def _large_tiff(path: str, reading: Reading, page: int) -> Raster:
    """A raster that reads the tiles or strips under a window."""
    tiff = _tifffile().TiffFile(path)
    pages, axes, shape = _pages(tiff, reading, page)
    sizes = dict(zip(axes, shape))
    if len(pages) == 1 and len(axes) == 3 and pages[0].planarconfig == 1 and axes[-1] not in "YX":
        channels = shape[-1]
    else:
        channels = int(np.prod([size for letter, size in sizes.items() if letter not in "YX"]))
    dtype, lock = np.dtype(pages[0].dtype), threading.Lock()

    def read(y: int, x: int, height: int, width: int) -> np.ndarray:
        out = np.zeros((height, width, channels), dtype)
        for first, one in enumerate(pages):
            _segments(path, one, out, first if len(pages) > 1 else 0, (y, x), lock)
        return out

    return Raster(sizes["Y"], sizes["X"], channels, dtype, read)


def _segments(path: str, page: Any, out: np.ndarray, channel: int, corner: tuple[int, int], lock: Any) -> None:
    """Fill `out`, a window at `corner`, with the tiles or strips of `page` that it touches."""
    height, width = out.shape[:2]
    if page.is_tiled:
        rows, columns = page.tilelength, page.tilewidth
        across = -(-page.imagewidth // columns)
    else:
        rows, columns, across = page.rowsperstrip, page.imagewidth, 1
    down = -(-page.imagelength // rows)
    planes = len(page.dataoffsets) // (down * across)
    y0, x0 = corner
    numbers = [
        (plane * down + row) * across + column
        for plane in range(planes)
        for row in range(y0 // rows, (y0 + height - 1) // rows + 1)
        for column in range(x0 // columns, (x0 + width - 1) // columns + 1)
    ]
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        tables = {"jpegtables": page.jpegtables} if page.jpegtables else {}
        for number in numbers:
            data = os.pread(file, page.databytecounts[number], page.dataoffsets[number])
            with lock:
                decode = page.decode
            segment, where, _ = decode(data if data else None, number, **tables)
            if segment is None:
                continue
            plane, _, top, left, _ = where
            part = segment[0]
            first = channel + plane
            a, b = max(top, y0), min(top + part.shape[0], y0 + height)
            c, d = max(left, x0), min(left + part.shape[1], x0 + width)
            if a < b and c < d:
                out[a - y0 : b - y0, c - x0 : d - x0, first : first + part.shape[2]] = part[
                    a - top : b - top, c - left : d - left
                ]
    finally:
        os.close(file)


# Arrays


class Stack:
    """An array in a file, of one image or many. array: sliced as NumPy's. axes: one letter for each of its axes."""

    def __init__(self, array: Any, axes: str, labels: np.ndarray | None = None):
        self.array, self.axes = array, axes
        self.count = int(array.shape[axes.index("N")]) if "N" in axes else 1
        self.labels = labels if labels is not None and labels.shape == (self.count,) else None
        wrong = labels is not None and self.labels is None
        self.problem = f"{len(labels)} labels for {self.count} images" if wrong and labels is not None else ""

    def raster(self, page: int) -> Raster:
        """Image number `page`. Raises BadImage where there is none."""
        if not 0 <= page < self.count:
            raise BadImage(f"expected page {page}, found {self.count} images in the array")
        sizes = dict(zip(self.axes, self.array.shape))
        array, letters = self.array, self.axes
        order = [letters.replace("N", "").index(letter) for letter in "HWC" if letter in letters]

        def read(y: int, x: int, height: int, width: int) -> np.ndarray:
            part = {"N": page, "H": slice(y, y + height), "W": slice(x, x + width), "C": slice(None)}
            window = np.asarray(array[tuple(part[letter] for letter in letters)]).transpose(order)
            return window if window.ndim == 3 else window[..., None]

        return Raster(sizes["H"], sizes["W"], sizes.get("C", 1), np.dtype(array.dtype), read)


@functools.lru_cache(_OPEN)
def _kept(path: str, kind: str, reading: Reading, _state: tuple) -> Stack:
    return _OPENERS[kind](path, reading)


def open_stack(data: bytes | str, kind: str, reading: Reading) -> Stack:
    """The array in a file of the extension `kind`: its bytes, or its path, which stays open."""
    if isinstance(data, bytes):
        if kind not in (".npy", ".npz"):
            raise BadImage(f"a {kind} file is read where it lies on a disk, not inside an archive; unpack it")
        return _numpy(io.BytesIO(data), reading)
    status = os.stat(data)
    return _kept(data, kind, reading, (status.st_mtime_ns, status.st_size))


def _numpy(file: Any, reading: Reading) -> Stack:
    mapped: Any = "r" if isinstance(file, str) and file.endswith(".npy") else None
    found = np.load(file, mmap_mode=mapped, allow_pickle=False)
    if isinstance(found, np.ndarray):
        return Stack(found, _axes(found.shape, reading))
    name, beside = _choose({key: found[key].shape for key in found.files}, reading)
    return Stack(found[name], _axes(found[name].shape, reading), None if beside is None else found[beside])


def _hdf5(path: str, reading: Reading) -> Stack:
    h5py = needs("h5py", "an HDF5 file")
    found: dict[str, Any] = {}
    file = h5py.File(path, "r")
    file.visititems(lambda name, item: found.update({name: item}) if isinstance(item, h5py.Dataset) else None)
    name, beside = _choose({key: item.shape for key, item in found.items()}, reading)
    return Stack(found[name], _axes(found[name].shape, reading), None if beside is None else found[beside][:])


def _zarr(path: str, reading: Reading) -> Stack:
    zarr = needs("zarr", "a Zarr array")
    root: Any = zarr.open(path, mode="r")
    if not hasattr(root, "members"):
        return Stack(root, _axes(root.shape, reading))
    attributes: Any = root.attrs.asdict()
    scales = attributes.get("multiscales") or attributes.get("ome", {}).get("multiscales")
    if scales and reading.key is None:  # OME-Zarr: the first is the full resolution
        array = root[scales[0]["datasets"][0]["path"]]
        names = [axis["name"] if isinstance(axis, dict) else axis for axis in scales[0].get("axes", ())]
        return _ome(array, names, reading)
    found = {name: item for name, item in root.members(max_depth=None) if hasattr(item, "shape")}
    name, beside = _choose({key: item.shape for key, item in found.items()}, reading)
    return Stack(found[name], _axes(found[name].shape, reading), None if beside is None else found[beside][:])


def _ome(array: Any, names: list[str], reading: Reading) -> Stack:
    """The array of an OME-Zarr image, whose axes t and z, where they are longer than one, count images."""
    letters = {"y": "H", "x": "W", "c": "C"}
    if not names:
        return Stack(array, _axes(array.shape, reading))
    if len([1 for name, size in zip(names, array.shape) if name in "tz" and size > 1]) > 1:
        raise BadImage(f"expected one of the axes t and z, found both, in {array.shape}; choose an array: data.array")
    axes, drop = "", []
    for name, size in zip(names, array.shape):
        drop.append(name in "tz" and size == 1)
        axes += "" if drop[-1] else letters.get(name, "N")
    return Stack(_Squeezed(array, drop) if any(drop) else array, axes)


class _Squeezed:
    """An array without some of its axes, of length one."""

    def __init__(self, array: Any, drop: list[bool]):
        self.array, self.drop, self.dtype = array, drop, array.dtype
        self.shape = tuple(size for size, gone in zip(array.shape, drop) if not gone)

    def __getitem__(self, key: tuple) -> Any:
        parts = iter(key)
        return self.array[tuple(0 if gone else next(parts) for gone in self.drop)]


_OPENERS: dict[str, Callable[[str, Reading], Stack]] = {
    ".npy": _numpy,
    ".npz": _numpy,
    ".h5": _hdf5,
    ".hdf5": _hdf5,
    ".zarr": _zarr,
}


def _choose(shapes: dict[str, tuple[int, ...]], reading: Reading) -> tuple[str, str | None]:
    """The name of the array of images among these, and of that of their labels."""
    beside = next((name for name in shapes if name.rpartition("/")[2] in _LABELS and len(shapes[name]) == 1), None)
    if reading.key is not None:
        if reading.key.strip("/") not in shapes:
            raise BadImage(f"expected an array {reading.key!r}, found {', '.join(shapes) or 'none'}; change data.array")
        return reading.key.strip("/"), beside
    fitting = [name for name, shape in shapes.items() if len(shape) >= 2]
    if len(fitting) != 1:
        found = ", ".join(f"{name} {shape}" for name, shape in shapes.items()) or "none"
        raise BadImage(f"expected one array of images, found {found}; choose one: data.array=NAME")
    return fitting[0], beside


def _axes(shape: tuple[int, ...], reading: Reading) -> str:
    """The letters of an array's axes: data.axes, or what the number of channels tells."""
    if reading.axes is not None:
        if len(reading.axes) != len(shape):
            raise BadImage(f"expected axes {reading.axes}, found an array of shape {shape}; change data.axes")
        return reading.axes
    channels = None if reading.bands is not None or not reading.channels else reading.channels
    if len(shape) == 2:
        return "HW"
    if len(shape) in (3, 4):
        stack = "N" * (len(shape) - 3)
        for place, letters in ((-1, "HWC"), (-3, "CHW")):
            if shape[place] == channels:
                return stack + letters
        if len(shape) == 3 and channels == 1:
            return "NHW"
        if channels is None:
            if len(shape) == 3 and min(shape[-1], shape[-3]) > _FEW:
                return "NHW"
            return stack + ("HWC" if shape[-1] < shape[-3] else "CHW")
    wanted = f"{reading.channels} channels" if reading.channels else "images, such as (N, H, W, C)"
    raise BadImage(
        f"expected {wanted}, found an array of shape {shape}; set data.channels, or say what its axes are, as in "
        "data.axes=NHWC"
    )


def as_ppm(raster: Raster) -> bytes:
    """An RGB image of eight bits as bytes that DALI reads, uncompressed."""
    pixels = raster.read(0, 0, raster.height, raster.width)
    return b"P6\n%d %d\n255\n" % (raster.width, raster.height) + np.ascontiguousarray(pixels).tobytes()
