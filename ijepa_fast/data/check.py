"""`python -m ijepa_fast check-data PATH`: decode every file of a source once and name those that cannot be used."""

from __future__ import annotations

import argparse
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from tqdm import tqdm

from ijepa_fast.command import one_sentence
from ijepa_fast.cores import cores
from ijepa_fast.data.decode import Decoder, Work, decode_all
from ijepa_fast.data.headers import MAX_PIXELS, BadImage, screen
from ijepa_fast.data.sources import Source, open_source

_BATCH = 32


class _Checker(Decoder):
    """Decodes whole images and returns only their shapes."""

    def _graph(self, works: Iterable[tuple]) -> tuple:
        (images,) = self._decoded(works, 0)
        return (images.shape(),)


def find_bad_files(source: Source, threads: int, max_pixels: int = MAX_PIXELS) -> Iterator[tuple[str, str] | None]:
    """Decode every sample, in any order: None for one that decodes, else its name and the reason.

    threads: how many decode; twice as many read. max_pixels: an image that declares more counts as bad.
    """
    found: deque[tuple[str, str] | None] = deque()

    def read_one(index: int) -> tuple | str:
        try:
            data = source.read(index)
            return np.frombuffer(data, np.uint8), *screen(data, max_pixels)
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


def check(path: str, processes: int | None = None, max_pixels: int = MAX_PIXELS) -> int:
    """Print each file of the source at `path` that cannot be used, with the reason. Return 1 if there are any, else 0.

    processes: how many files to decode at a time; None: one per core. max_pixels: an image that declares more counts as
    bad. Raises ValueError for a path that does not exist or holds no image, ImportError without DALI.
    """
    source = open_source(path)
    bad = 0
    results = find_bad_files(source, processes or cores(), max_pixels)
    with tqdm(results, total=len(source), desc="checking", unit=" files", mininterval=1, disable=None) as bar:
        for result in bar:
            if result is not None:
                bad += 1
                bar.write("{}: {}".format(*result))
    print(f"{len(source)} files, {bad} bad" + (f"; left out: {source.left_out}" if source.left_out else ""))
    if source.index.problem:
        print(f"labels cannot be used: {source.index.problem}")
    return int(bad > 0)


@one_sentence(status=2)
def main(argv: list[str] | None = None) -> int:
    """The command line. Return the exit status: 0 all files are good, 1 some are bad, 2 the path cannot be used."""
    parser = argparse.ArgumentParser(prog="ijepa-fast check-data", description=__doc__)
    parser.add_argument("path", help="folder of images, tar shards, or text list of paths")
    parser.add_argument("--processes", type=int, help="files to decode at a time (default: one per core)")
    parser.add_argument("--max-pixels", type=int, default=MAX_PIXELS, help="an image that declares more counts as bad")
    args = parser.parse_args(argv)
    return check(args.path, args.processes, args.max_pixels)
