"""A user's own data set: `data.source=module:function`, a function without arguments that gives one of these.

- A map-style torch data set, or anything with a length and items by number.
- A Hugging Face `datasets.Dataset`.
- Anything that is only iterated over, such as a WebDataset pipeline: it is read once, and kept in memory.

An item is an array uint8, uint16 or float (C, H, W) of NumPy or torch, a PIL image, a path, or the bytes of a file; or
a tuple of that and a label; or a mapping with one of these under a name of IMAGES, and maybe a label under one of
LABELS. The order of samples is the engine's, not the data set's, so a resumed run goes on with the exact sample.
"""

from __future__ import annotations

import os
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from PIL import Image

from ijepa_fast.data.formats import IN_PLACE, as_ppm, is_dali, open_image
from ijepa_fast.data.headers import BadImage
from ijepa_fast.data.importing import import_function
from ijepa_fast.data.index import Index, Names
from ijepa_fast.data.reading import Raster, Reading, fit
from ijepa_fast.data.sources import EIGHT_BITS, Source, look, settle
from ijepa_fast.data.storage import read_file
from ijepa_fast.data.tables import add_column

IMAGES = ("image", "images", "img", "pixel_values", "jpg", "jpeg", "png", "webp", "tif", "npy", "path", "file")
LABELS = ("label", "labels", "fine_label", "target", "cls")
_MOST = 1 << 32  # bytes of an iterable that is kept in memory


class DatasetSource(Source):
    """The items of a data set as a source.

    Items are asked for one at a time, since few data sets may be asked by several threads; one that may says so by an
    attribute `thread_safe = True`.
    """

    def __init__(self, name: str, dataset: Any, reading: Reading = EIGHT_BITS):
        index = Index(Names.of(map(str, range(len(dataset)))))
        labels, classes = _labels(dataset)
        if labels is not None:
            add_column(index.labels, index.classes, "class", [classes[i] if classes else str(i) for i in labels])
        super().__init__(name, index, reading=reading)
        self.dataset, self._dtypes = dataset, _dtypes(dataset)
        self._turn: Any = nullcontext() if getattr(dataset, "thread_safe", False) else threading.Lock()

    def name(self, index: int) -> str:
        """The data set's name, and the number of the item."""
        return f"{self.root}[{index}]"

    def read(self, index: int) -> bytes:
        """As Source.read."""
        item = self._item(index)
        if isinstance(item, str | os.PathLike) and is_dali(os.fspath(item)):
            return read_file(os.fspath(item))
        if isinstance(item, bytes):
            return item
        return as_ppm(fit(self._opened(item), self.reading))

    def opened(self, index: int) -> Raster:
        """As Source.opened."""
        return self._opened(self._item(index))

    def content(self, index: int) -> bytes:
        """As Source.content."""
        item = self._item(index)
        if isinstance(item, str | os.PathLike) and not os.fspath(item).lower().endswith(IN_PLACE):
            return read_file(os.fspath(item))
        return item if isinstance(item, bytes) else look(self._opened(item))

    def _item(self, index: int) -> Any:
        with self._turn:
            try:
                return _image(self.dataset[index], self._dtypes)
            except (BadImage, OSError):
                raise
            except Exception as error:  # whatever somebody else's code raises of an item
                raise BadImage(f"the data set raised {type(error).__name__}: {error}") from error

    def _opened(self, item: Any) -> Raster:
        if isinstance(item, str | os.PathLike):
            path = os.fspath(item)
            return open_image(path, read_file(path) if is_dali(path) else path, self.reading)
        if isinstance(item, bytes):
            return open_image("item", item, self.reading)
        if isinstance(item, Image.Image):
            item = np.asarray(item.convert("RGB") if self.reading.plain else item)
            return Raster.of(item if item.ndim == 3 else item[..., None])
        return Raster.of(_channels_last(item, self.reading))


def open_dataset(name: str, reading: Reading) -> Source:
    """The source of what the function `name`, written module:function, gives. Raises ValueError."""
    made = import_function("data.source", name)
    with _named(name):
        dataset = made() if callable(made) and (isinstance(made, type) or not hasattr(made, "__getitem__")) else made
    if isinstance(dataset, Mapping):  # a DatasetDict of Hugging Face, or torch's by phase
        found = ", ".join(map(str, dataset))
        raise ValueError(f"data.source={name}: expected one data set, got several by name ({found}); choose one")
    if not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")) or _is_stream(dataset):
        if not hasattr(dataset, "__iter__"):
            raise ValueError(
                f"data.source={name}: expected a data set with a length and items, or one to iterate over, got a "
                f"{type(dataset).__name__}"
            )
        with _named(name):
            dataset = _kept(name, dataset)
    with _named(name):
        if len(dataset) == 0:
            raise ValueError(f"data.source={name}: expected images, the data set is empty")
        source = DatasetSource(name, dataset, reading)
        first = _image(dataset[0], _dtypes(dataset))
    if isinstance(first, str | os.PathLike) and not os.path.exists(first):
        raise ValueError(f"data.source={name}: item 0 is the path {os.fspath(first)!r}, which does not exist")
    stored = isinstance(first, bytes) or (isinstance(first, str | os.PathLike) and is_dali(os.fspath(first)))
    source.reading = settle(source, reading, rgb=stored or isinstance(first, Image.Image))
    return source


@contextmanager
def _named(name: str) -> Iterator[None]:
    """What somebody else's code raises becomes a ValueError with the data set's name and the line."""
    try:
        yield
    except (ValueError, ImportError, KeyboardInterrupt):
        raise
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{os.path.basename(last.filename)}, line {last.lineno}"
        raise ValueError(f"data.source={name}: {type(error).__name__}: {error} ({where})") from error


def _is_stream(dataset: Any) -> bool:
    return isinstance(dataset, torch.utils.data.IterableDataset)


def _kept(name: str, stream: Any) -> list:
    """All items of a data set that has no numbers. Raises ValueError where they do not fit."""
    items, held = [], 0
    for item in stream:
        image = _image(item)
        held += len(image) if isinstance(image, bytes) else getattr(image, "nbytes", 1 << 10)
        if held > _MOST:
            raise ValueError(
                f"data.source={name}: has no items by number and holds over {_MOST >> 30} GB, so its order cannot be "
                "drawn; give a map-style data set, or name tar shards: data.source='shards-{000..127}.tar'"
            )
        items.append(item)
    print(f"data.source={name}: {len(items)} items are kept in memory, {held >> 20} MB", file=sys.stderr)
    return items


def _dtypes(dataset: Any) -> dict[str, str]:
    """The dtypes of columns of arrays, which Hugging Face gives as lists, or as arrays of 64 bits."""
    features = getattr(dataset, "features", None)
    features = features if isinstance(features, Mapping) else {}
    return {name: feature.dtype for name, feature in features.items() if hasattr(feature, "shape")}


def _image(item: Any, dtypes: Mapping[str, str] | None = None) -> Any:
    """The image of an item. dtypes: of columns of arrays."""
    if isinstance(item, Mapping):
        found = next((key for key in IMAGES if key in item), None)
        if found is None:
            raise BadImage(f"expected an image under one of {', '.join(IMAGES)}, found {', '.join(map(str, item))}")
        image = item[found]
        if isinstance(image, Mapping):  # of datasets, not decoded: {"bytes": ..., "path": ...}
            return image.get("bytes") or image.get("path")
        return np.asarray(image, dtypes[found]) if dtypes and found in dtypes else image
    return item[0] if isinstance(item, tuple | list) else item


def _channels_last(item: Any, reading: Reading) -> np.ndarray:
    array = item.numpy() if isinstance(item, torch.Tensor) else np.asarray(item)
    if array.dtype.kind not in "biuf" or array.ndim not in (2, 3):
        raise BadImage(
            f"expected an array (C, H, W) of numbers, a PIL image, a path or bytes, got {type(item).__name__} of shape "
            f"{array.shape}"
        )
    if array.ndim == 2:
        return array[..., None]
    wanted = reading.channels if reading.bands is None else 0
    last = reading.axes == "HWC" if reading.axes else array.shape[2] == wanted != array.shape[0]
    return array if last else array.transpose(1, 2, 0)


def _labels(dataset: Any) -> tuple[list[int] | None, list[str]]:
    """Labels that are known without opening images, and the names of the classes."""
    features = getattr(dataset, "features", None)
    if isinstance(features, Mapping):
        column = next((key for key in LABELS if key in features), None)
        names = list(getattr(features[column], "names", None) or []) if column else []
        return (list(dataset[column]), names) if column else (None, [])
    targets = getattr(dataset, "targets", None)
    if targets is None and isinstance(dataset, list):  # a stream that is kept
        found = [_label(item) for item in dataset]
        targets = None if any(label is None for label in found) else found
    if targets is None or len(targets) != len(dataset):
        return None, []
    return [int(target) for target in targets], [str(name) for name in getattr(dataset, "classes", [])]


def _label(item: Any) -> Any:
    if isinstance(item, Mapping):
        return next((item[key] for key in LABELS if key in item), None)
    return item[1] if isinstance(item, tuple | list) and len(item) > 1 else None
