"""`python -m ijepa_fast check-data PATH`: decode every file of a source once and name those that cannot be used."""

from __future__ import annotations

import argparse
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from tqdm import tqdm

from ijepa_fast.command import one_sentence, whole
from ijepa_fast.cores import cores
from ijepa_fast.data.arguments import add_arguments, reading_of
from ijepa_fast.data.decode import Decoder, Work, decode_all
from ijepa_fast.data.formats import extension
from ijepa_fast.data.headers import MAX_PIXELS, BadImage, screen
from ijepa_fast.data.reading import Reading
from ijepa_fast.data.sources import AS_THEY_ARE, Source, open_source

_BATCH = 32


class _Checker(Decoder):
    """Decodes whole images and returns only their shapes."""

    def _graph(self, works: Iterable[tuple]) -> tuple:
        (images,) = self._decoded(works, 0)
        return (images.shape(),)


def find_bad_files(
    source: Source, threads: int, max_pixels: int = MAX_PIXELS, seen: Seen | None = None
) -> Iterator[tuple[str, str] | None]:
    """Decode every sample, in any order: None for one that decodes, else its name and the reason.

    threads: how many decode; twice as many read. max_pixels: an image that declares more counts as bad. seen: where
    what is seen of the images is counted.
    """
    if not source.reading.plain:
        yield from _find_bad_arrays(source, threads, max_pixels, seen)
        return
    found: deque[tuple[str, str] | None] = deque()

    def read_one(index: int) -> tuple | str:
        try:
            data = source.read(index)
            size = screen(data, max_pixels)
            if seen is not None:
                seen.add(source.index.names[index], *size)
            return np.frombuffer(data, np.uint8), *size
        except BadImage as error:
            return str(error)
        except OSError as error:
            return f"cannot be read: {error.strerror or error}"

    def works() -> Iterator[Work]:
        reading: deque[tuple[np.ndarray, list]] = deque()
        for first in range(0, len(source) + 2 * _BATCH, _BATCH):
            ids = np.arange(first, min(first + _BATCH, len(source)))
            reading.append((ids, [readers.submit(read_one, index) for index in ids.tolist()]))
            if len(reading) > 2:
                ids, futures = reading.popleft()
                rows = [future.result() for future in futures]
                found.extend((source.name(int(i)), row) for i, row in zip(ids, rows) if isinstance(row, str))
                good = np.array([not isinstance(row, str) for row in rows])
                if good.any():
                    yield whole(ids[good], [row for row in rows if not isinstance(row, str)])

    def whole(ids: np.ndarray, rows: list[tuple]) -> Work:
        windows = np.array([[0, 0, width, height] for _, height, width in rows], np.int32)
        return Work(ids, ids, [data for data, *_ in rows], windows)

    def repair(work: Work, reasons: dict[int, str]) -> Work | None:
        found.extend((source.name(int(work.ids[row])), reason) for row, reason in reasons.items())
        return work.without(reasons)

    decoder = _Checker(crop=1, interpolation="bilinear", flip=False, device="cpu", threads=threads)
    with ThreadPoolExecutor(2 * threads) as readers:
        for work, _ in decode_all(decoder, works(), repair, _BATCH):
            found.extend([None] * len(work.ids))
            while found:
                yield found.popleft()
        yield from found


def _find_bad_arrays(
    source: Source, threads: int, max_pixels: int, seen: Seen | None
) -> Iterator[tuple[str, str] | None]:
    def read_one(index: int) -> tuple[str, str] | None:
        try:
            raster = source.raster(index, max_pixels)
            raster.read(0, 0, raster.height, raster.width)
        except (BadImage, OSError) as error:
            return source.name(index), str(error)
        if seen is not None:
            seen.add(source.index.names[index], raster.height, raster.width)
        return None

    with ThreadPoolExecutor(threads) as pool:
        for first in range(0, len(source), _BATCH):
            yield from pool.map(read_one, range(first, min(first + _BATCH, len(source))))


class Seen:
    """What the images of a source are: how many of each format, and the range of their sizes."""

    def __init__(self) -> None:
        self.formats: Counter[str] = Counter()
        self.low: tuple[int, int] | None = None
        self.high = (0, 0)

    def add(self, name: str, height: int, width: int) -> None:
        """Count an image. Several threads may."""
        self.formats[extension(name)] += 1
        self.low = min(self.low or (height, width), (height, width))
        self.high = max(self.high, (height, width))

    def __str__(self) -> str:
        formats = ", ".join(f"{count} {name}" for name, count in self.formats.most_common())
        low, high = self.low or (0, 0), self.high
        sizes = f"{low[0]} x {low[1]}" + ("" if low == high else f" to {high[0]} x {high[1]}")
        return f"{formats or 'no image'}, {sizes} pixels (height x width)"


def describe(reading: Reading) -> str:
    """Channels and depth of a source's images."""
    return f"{reading.channels} channel{'s' * (reading.channels > 1)} of {reading.depth}"


def check(path: str, processes: int | None = None, max_pixels: int = MAX_PIXELS, reading: Reading = AS_THEY_ARE) -> int:
    """Print each file of the source at `path` that cannot be used, with the reason. Return 1 if there are any, else 0.

    processes: how many files to decode at a time; None: one per core. max_pixels: an image that declares more counts as
    bad. reading: how files become images. Raises ValueError for a path that does not exist or holds no image,
    ImportError without DALI.
    """
    source = open_source(path, reading=reading)
    bad, seen = 0, Seen()
    results = find_bad_files(source, processes or cores(), max_pixels, seen)
    with tqdm(results, total=len(source), desc="checking", unit=" files", mininterval=1, disable=None) as bar:
        for result in bar:
            if result is not None:
                bad += 1
                bar.write("{}: {}".format(*result))
    print(f"{seen}; {describe(source.reading)}")
    print(f"{len(source)} files, {bad} bad" + (f"; left out: {source.left_out}" if source.left_out else ""))
    if source.index.problem:
        print(f"labels cannot be used: {source.index.problem}")
    return int(bad > 0)


@one_sentence(status=2)
def main(argv: list[str] | None = None) -> int:
    """The command line. Return the exit status: 0 all files are good, 1 some are bad, 2 the path cannot be used."""
    parser = argparse.ArgumentParser(prog="ijepa-fast check-data", description=__doc__)
    parser.add_argument("path", help="a folder, archives, a file of arrays, a text list: whatever data.source takes")
    parser.add_argument("--processes", type=whole(), help="files to decode at a time (default: one per core)")
    parser.add_argument(
        "--max-pixels", type=whole(), default=MAX_PIXELS, help="an image that declares more counts as bad"
    )
    add_arguments(parser)
    args = parser.parse_args(argv)
    return check(args.path, args.processes, args.max_pixels, reading_of(args))
