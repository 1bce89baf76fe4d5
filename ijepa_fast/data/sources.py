"""Collections of images: how many there are, their encoded bytes, and their labels where the layout has any."""

from __future__ import annotations

import functools
import io
import os
from dataclasses import replace
from pathlib import Path

import numpy as np

from ijepa_fast.data.archives import find_shards, inflate
from ijepa_fast.data.expand import expand, is_single
from ijepa_fast.data.formats import EXTENSIONS, IN_PLACE, as_ppm, is_dali, open_image
from ijepa_fast.data.headers import BadImage
from ijepa_fast.data.importing import is_code
from ijepa_fast.data.index import Index, Names, cached, watch
from ijepa_fast.data.kinds import printable
from ijepa_fast.data.reading import Raster, Reading, fit
from ijepa_fast.data.scan import scan_folder, scan_list, scan_shards
from ijepa_fast.data.storage import StorageTrouble, check_size, read_file

AS_THEY_ARE, EIGHT_BITS = Reading(), Reading(depth="uint8")
_TRIED = 10  # images that are opened to find one that can be
_OPEN_SHARDS = 64
_NAMED = 6  # extensions that are named
_LOOK = 512  # pixels, at most, of a side of what is looked at of an array


class Source:
    """A collection of images in a fixed order: loose files, with names relative to `root`.

    labels: int64 (n,), indices into `classes`; None without labels, and where they cannot be used: index.problem says
    why. columns: every label column of the collection, by name. label: the column to use, by default the first one that
    has classes. reading: how its images are read, with a depth that is known. Raises ValueError where it has none.
    """

    def __init__(self, root: str, index: Index, label: str | None = None, reading: Reading = EIGHT_BITS):
        self.root, self.index, self.columns, self.reading = root, index, index.labels, reading
        self.labels: np.ndarray | None = None
        self.classes: list[str] = []
        if label is not None or index.classes:
            chosen = label or next(iter(index.classes))
            if chosen not in index.classes:
                if index.problem:
                    raise ValueError(index.problem)
                raise ValueError(
                    f"label: {root} has no classes {chosen!r}; it has {', '.join(index.classes) or 'none'}"
                )
            self.labels, self.classes = np.asarray(index.labels[chosen]), index.classes[chosen]

    def __len__(self) -> int:
        return len(self.index)

    def name(self, index: int) -> str:
        """The name of sample `index` in messages: its path, without characters that could harm a terminal."""
        return printable(os.path.join(self.root, self.index.names[index])) + self._place(index)

    def read(self, index: int) -> bytes:
        """The bytes of sample `index` in a format of formats.DALI, or as PPM, of images that are RGB of eight bits.

        Raises OSError, and BadImage for what can be no image.
        """
        if is_dali(self.index.names[index]):
            return self.stored(index)
        return as_ppm(self.raster(index))

    def stored(self, index: int) -> bytes:
        """The bytes of the file of sample `index`. Raises OSError, BadImage."""
        return read_file(os.path.join(self.root, self.index.names[index]))

    def raster(self, index: int, max_pixels: int | None = None) -> Raster:
        """Sample `index`, opened, as `reading` says. Raises OSError, ImportError, BadImage that says what to change."""
        return fit(self.opened(index), self.reading, max_pixels)

    def opened(self, index: int) -> Raster:
        """Sample `index` as its file has it. Raises OSError, ImportError, BadImage."""
        name, index_, reading = self.index.names[index], self.index, self.reading
        data = os.path.join(self.root, name) if self._is_in_place(index) else self.stored(index)
        raster = open_image(name, data, reading, int(index_.page[index]) if len(index_.page) else 0)
        if len(index_.y):
            y, x = int(index_.y[index]), int(index_.x[index])
            size = reading.window or 0
            return raster.part(y, x, min(size, raster.height), min(size, raster.width))
        return raster

    def content(self, index: int) -> bytes:
        """What tells sample `index` from others of its name: the bytes of its file, or of a file that is read in place
        pixels of the sample. Raises OSError, ImportError, BadImage.
        """
        return look(self.opened(index)) if self._is_in_place(index) else self.stored(index)

    def _is_in_place(self, index: int) -> bool:
        return self.index.names[index].lower().endswith(IN_PLACE) and not self.index.shards

    def _place(self, index: int) -> str:
        """Where in its file a sample is, for messages."""
        page = f"[{self.index.page[index]}]" if len(self.index.page) else ""
        return page + (f" at y={self.index.y[index]}, x={self.index.x[index]}" if len(self.index.y) else "")

    @property
    def left_out(self) -> str:
        """What of the collection is no sample, in words: "12 .tif, 1 .txt"; "" where there is nothing else."""
        kinds = sorted(self.index.left_out.items(), key=lambda item: -item[1])
        named = [f"{count} {printable(kind)}" for kind, count in kinds[:_NAMED]]
        rest = sum(count for _, count in kinds[_NAMED:])
        return ", ".join([*named, f"{rest} others"] if rest else named)

    @property
    def groups(self) -> np.ndarray | None:
        """The shard of each sample, (n,), for an order that reads few shards at a time; None for loose files."""
        return None


class TarSource(Source):
    """A collection of members of archives, which are read in place."""

    def name(self, index: int) -> str:
        """The shard's path and the member's name."""
        return printable(f"{self.index.shards[self.index.shard[index]]}:{self.index.names[index]}") + self._place(index)

    def stored(self, index: int) -> bytes:
        """The encoded bytes of sample `index`. Raises OSError, and BadImage for one over the bound of bytes."""
        path, size = self.index.shards[self.index.shard[index]], int(self.index.size[index])
        check_size(size)
        try:
            # Held while it is read: one that the cache did not take, or drops, is closed with its last reference.
            shard = _open_shard(path)
            data = os.pread(shard.fileno(), size, int(self.index.start[index]))
        except OSError:
            _open_shard.cache_clear()  # the next try opens the file again: where it was replaced, this one is stale
            raise
        if len(data) < size:
            raise StorageTrouble(f"{path}: is {size - len(data)} bytes shorter than when it was indexed; start again")
        return inflate(data) if len(self.index.packed) and self.index.packed[index] else data

    @property
    def groups(self) -> np.ndarray:
        """The shard of each sample: int32 (n,)."""
        return self.index.shard


def look(raster: Raster) -> bytes:
    """Size, dtype and pixels of a raster; of a large one those in the middle. Raises OSError, BadImage."""
    height, width = min(raster.height, _LOOK), min(raster.width, _LOOK)
    pixels = raster.read((raster.height - height) // 2, (raster.width - width) // 2, height, width)
    return f"{raster.height} {raster.width} {raster.dtype} ".encode() + pixels.tobytes()


@functools.lru_cache(_OPEN_SHARDS)
def _open_shard(path: str) -> io.FileIO:
    # A shard is closed when it leaves the cache and its last reader is done with it.
    return open(path, "rb", buffering=0)


def open_source(
    path: str | Path,
    label: str | None = None,
    cache: str | Path | None = None,
    reading: Reading = AS_THEY_ARE,
) -> Source:
    """The images at `path`, which is one of these:

    - a folder of images, flat or nested (then the first level names the classes), with an optional labels.csv (its
      columns: file, then one per label);
    - archives: tar shards, a folder of them, one, or a pattern with `*`, `{000..127}` and `{a,b}`; also tar files of
      tar files, .tar.gz and .zip;
    - one file with many images, or a large one: TIFF, NPY, NPZ, HDF5, Zarr;
    - a text list of paths;
    - module:function, see datasets.py.

    label: the label column, by default the first. cache: a folder to keep the index in. reading: how files become
    images. Raises ValueError for a path that does not exist or holds no image, for a folder with tar shards and folders
    of images, for an archive that is damaged or cut short, and where the first image is not as `reading` says. Labels
    that cannot be used raise nothing unless `label` asks for them.
    """
    return _open(os.fspath(path), label, cache, reading)


def _open(path: str, label: str | None, cache: str | Path | None, reading: Reading) -> Source:
    if is_code(path):
        from ijepa_fast.data.datasets import open_dataset  # which is made of sources

        return open_dataset(path, reading)
    shards = find_shards(path)
    how = "" if reading == AS_THEY_ARE else repr(reading)
    kind: type[Source] = Source
    root = path

    def build() -> Index:
        if shards:
            index = scan_shards(shards, path if os.path.isdir(path) else None, cache)
        elif single:
            index = Index(Names.of([os.path.basename(path)]), watched={path: watch(path)})
        else:
            index = scan_folder(path) if os.path.isdir(path) else scan_list(path)
        return expand(index, root, reading)

    single = not shards and is_single(path)
    if shards:
        kind = TarSource
    elif single:
        path = path.rstrip("/")
        root = os.path.dirname(path)
    elif os.path.isfile(path):
        root = os.path.dirname(path)
    elif not os.path.isdir(path):
        found = "is neither a folder nor a file" if os.path.exists(path) else "does not exist"
        found = "is an address: fetch it first" if "://" in path else found
        raise ValueError(f"data path {path!r} {found}; expected a folder of images, archives, arrays or a list")
    source = kind(root, cached(path, cache, build, how), label)
    if not len(source):
        held = f"files named {', '.join('*' + extension for extension in EXTENSIONS)}, loose or in *.tar"
        found = f"; found {source.left_out}" if source.left_out else ""
        raise ValueError(f"data path {path!r} holds no image; expected {held}{found}")
    source.reading = settle(source, reading, rgb=is_dali(source.index.names[0]))
    return source


def settle(source: Source, reading: Reading, rgb: bool = False) -> Reading:
    """The reading with the depth of the first image that can be opened. Raises ValueError where it does not fit.

    rgb: whether images are kept in a format that is decoded as RGB of eight bits, unless the reading says otherwise.
    """
    if rgb and replace(reading, channels=reading.channels or 3).plain:
        return replace(reading, depth="uint8", channels=3)
    source.reading = replace(reading, depth="float32") if reading.depth == "auto" else reading
    error: BadImage | OSError | None = None
    for number in range(min(len(source), _TRIED)):
        try:
            first = source.opened(number)
        except (BadImage, OSError) as problem:
            error = error or problem
            continue
        try:
            settled = reading.of(first)
            fit(first, settled)
        except BadImage as problem:
            raise ValueError(f"{source.name(number)}: {problem}") from None
        return settled
    raise ValueError(f"{source.name(0)}: {error}")
