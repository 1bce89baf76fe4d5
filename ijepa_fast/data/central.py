"""Every image of a source once, its centre, for probes and pictures: no random windows."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ijepa_fast.data import Size, size_of
from ijepa_fast.data.decode import Work, decode_all, hand_over
from ijepa_fast.data.expand import expand
from ijepa_fast.data.headers import MAX_PIXELS, BadImage
from ijepa_fast.data.index import Index, Names
from ijepa_fast.data.reader import READERS, Reader, make_decoder
from ijepa_fast.data.reading import Reading
from ijepa_fast.data.recover import BadFiles, TooManyBadFiles
from ijepa_fast.data.sources import EIGHT_BITS, Source


def eval_batches(
    source: Source,
    *,
    batch_size: int,
    crop: int | Size,
    resize: int | Size,
    device: str | torch.device = "cpu",
    threads: int = 2,
    interpolation: str = "bilinear",
    bad_files: str | Path | None = None,
    max_bad_share: float = 0.01,
    max_pixels: int = MAX_PIXELS,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Every sample once, in order: images (b, crop, crop, C), uint8 or of the source's depth, on `device`, and labels
    int64 (b,) on the CPU.

    Each image is resized so that it just covers `resize` pixels, a side or height and width, and cropped to the central
    `crop`, both in one resampling. A source without labels gives sample ids in their place. The other arguments are
    TrainLoader's. Samples that cannot be decoded are left out, and listed in `bad_files`; more than `max_bad_share` of
    them raise TooManyBadFiles. Raises StorageTrouble, and ValueError for a crop larger than `resize`.
    """
    size, cover = size_of(crop), size_of(resize)
    if not all(0 < side <= most for side, most in zip(size, cover)):
        raise ValueError(f"crop: expected 1 to resize = {resize}, got {crop}")
    bad = BadFiles(len(source), max_bad_share, bad_files)
    read = Reader(source, max_pixels, cache_bytes=0)
    labels = np.arange(len(source)) if source.labels is None else source.labels

    def read_one(index: int) -> tuple | None:
        try:
            return index, *read(index)
        except BadImage as error:
            bad.add(source.name(index), str(error))
            return None

    def works() -> Iterator[Work]:
        reading: deque[list[Future]] = deque()
        for first in range(0, len(source) + 2 * batch_size, batch_size):
            last = min(first + batch_size, len(source))
            reading.append([readers.submit(read_one, index) for index in range(first, last)])
            if len(reading) > 2:
                rows = [row for future in reading.popleft() if (row := future.result()) is not None]
                if rows:
                    yield _central(rows, size, cover)

    def repair(work: Work, reasons: dict[int, str]) -> Work | None:
        for row, reason in reasons.items():
            bad.add(source.name(int(work.ids[row])), reason)
        return work.without(reasons)

    options: dict[str, Any] = {"interpolation": interpolation, "flip": False, "device": device, "threads": threads}
    decoder = make_decoder(source, crop=size, **options)
    with ThreadPoolExecutor(READERS) as readers:
        try:
            for work, images in decode_all(decoder, works(), repair, batch_size):
                yield hand_over(images), torch.from_numpy(labels[work.ids])
        finally:
            decoder.close()


def read_images(
    paths: Iterable[str | Path],
    *,
    crop: int | Size,
    interpolation: str,
    device: str | torch.device = "cpu",
    reading: Reading = EIGHT_BITS,
) -> torch.Tensor:
    """Image files as (n, crop, crop, C) on `device`: the centre of each, decoded as for training with `reading`.

    Where that reads large files by windows, all windows of each file, row by row. Raises ValueError, which names the
    file and the reason, where one cannot be used.
    """
    reading = replace(reading, where=None)  # the map was of the training's images
    index = Index(Names.of(os.fspath(path) for path in paths))
    source = Source("", index if reading.window is None else expand(index, "", reading), reading=reading)
    try:
        options: dict[str, Any] = {"crop": crop, "resize": crop, "interpolation": interpolation, "device": device}
        batches = [images for images, _ in eval_batches(source, batch_size=64, max_bad_share=0, **options)]
    except TooManyBadFiles as error:
        raise BadImage(error.last) from None
    if batches:
        return torch.cat(batches)
    return torch.empty(0, *size_of(crop), reading.channels, dtype=getattr(torch, reading.depth), device=device)


def _central(rows: list[tuple], crop: Size, cover: Size) -> Work:
    """Decode the central part of the aspect of `crop` that it is of an image that just covers `cover`."""
    ids, sizes = np.array([row[0] for row in rows]), np.array([row[2:] for row in rows])
    tight = (sizes / np.array(cover)).argmin(1)  # the axis along which the image just covers it
    shares = np.array(crop)[None] / np.array(cover)[:, None]
    side = sizes[np.arange(len(sizes)), tight][:, None] * shares[tight]
    part = np.maximum(np.rint(side).astype(np.int32), 1)[:, ::-1]
    corner = (sizes[:, ::-1] - part) // 2
    windows = np.concatenate([corner, part], axis=1).astype(np.int32)
    return Work(ids, ids, [row[1] for row in rows], windows)
