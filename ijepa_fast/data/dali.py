"""The loader for training: endless batches of decoded images.

DALI draws no random numbers. Order, windows, flips and replacements are functions of the seed and the position in the
sample stream, so a run resumes at the exact sample, on any number of ranks. A background thread reads ahead and
decodes; `next` takes finished batches from a queue.
"""

from __future__ import annotations

import atexit
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ijepa_fast.data import Size
from ijepa_fast.data.crops import counter_bits, crop_keys, drawn_crops
from ijepa_fast.data.decode import AnyDecoder, Work, decode_all, hand_over
from ijepa_fast.data.headers import MAX_PIXELS, BadImage
from ijepa_fast.data.order import SampleStream
from ijepa_fast.data.reader import READERS, Reader, make_decoder
from ijepa_fast.data.recover import BadFiles, TooManyBadFiles
from ijepa_fast.data.resident import IN_PLACE, ResidentDecoder
from ijepa_fast.data.sources import Source

_REPLACEMENTS = 100  # samples tried in the place of a bad file
_PATIENCE = 10  # seconds that `close` waits for a read to return

_REPLACE = 1  # the replacement of try t has the stream of random numbers _REPLACE + t, see crops.counter_bits


@dataclass(frozen=True)
class Batch:
    """One rank's images of a step.

    images: (B, H, W, C) of the source's depth, uint8 of three channels for RGB, on the loader's device; of a loader of
    several views, a list with a tensor per view. indices: int64 (B,) sample ids, on the CPU. epoch: the epoch of the
    first image, from 0. draw: what the loader's `draw` returned for this step, with what its `beside` added.
    """

    images: torch.Tensor | list[torch.Tensor]
    indices: torch.Tensor
    epoch: int
    draw: Any = None


class TrainLoader:
    """An endless iterator of random resized crops; `next` returns a Batch.

    Arguments:
        batch_size: images per step on this rank.
        crop: side of the crops, or their height and width, pixels.
        scale, ratio: share of the image's area, and width over height, as in RandomResizedCrop.
        interpolation: bilinear | bicubic.
        flip: mirror half of the images.
        crops_per_image: see crops.crop_keys.
        start_step: the first step. The loader yields from there on what an unbroken one yields.
        threads: how many decode.
        prefetch: batches decoded ahead.
        hw_decoder_load: share of the JPEG files that the GPU's decode engine takes.
        bad_files: a file that lists the samples that cannot be decoded. Another sample takes the place of each.
        max_bad_share: the loader raises TooManyBadFiles when more than this share of the source is bad.
        max_pixels: an image that declares more counts as bad.
        cache_bytes: bytes of encoded samples that are kept in memory.
        memory: decode all samples once, before the first step, and keep them in host memory, or under "device" where
            the crops are wanted, and crop them there; then `cache_bytes` is no bound.
        draw: called with the step, ahead of it and in a reading thread; its result is Batch.draw.
        beside: called with that and the images' crop keys (B,), ahead of the step; what it returns is then Batch.draw.

    Attributes:
        steps_per_epoch: whole global batches per epoch.
        wait_seconds: time spent inside `next` so far.
        replaced: images replaced so far.

    Raises ValueError where the source has too few images for one step, or an argument is out of range. `next` raises
    TooManyBadFiles, and StorageTrouble where storage stays away: no file is listed as bad for that.
    """

    def __init__(
        self,
        source: Source,
        *,
        batch_size: int,
        crop: int | Size,
        scale: tuple[float, float] = (0.3, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        interpolation: str = "bilinear",
        flip: bool = False,
        crops_per_image: int = 0,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        device: str | torch.device = "cpu",
        threads: int = 2,
        prefetch: int = 2,
        start_step: int = 0,
        hw_decoder_load: float = 0.65,
        bad_files: str | Path | None = None,
        max_bad_share: float = 0.01,
        max_pixels: int = MAX_PIXELS,
        cache_bytes: int = 1 << 30,
        memory: bool | str = False,
        draw: Callable[[int], object] | None = None,
        beside: Callable[[Any, np.ndarray], object] | None = None,
    ):
        global_batch = batch_size * world_size
        if len(source) < global_batch:
            raise ValueError(
                f"batch_size: {batch_size} on {world_size} ranks needs {global_batch} images per step, the source has "
                f"{len(source)}; lower batch_size"
            )
        if not 0 < scale[0] <= scale[1] <= 1 or not 0 < ratio[0] <= ratio[1]:
            raise ValueError(
                f"scale, ratio: expected 0 < low <= high, scale at most 1; got scale={scale}, ratio={ratio}"
            )
        self.source, self.batch_size = source, batch_size
        self.steps_per_epoch = len(source) // global_batch
        self.wait_seconds, self.replaced = 0.0, 0
        self.bad_files = BadFiles(len(source), max_bad_share, bad_files)
        self._seed, self._scale, self._ratio, self._flip = seed, scale, ratio, flip
        self._first = start_step * global_batch + rank * batch_size
        self._start_step, self._stride = start_step, global_batch
        self._stream = SampleStream(len(source), seed, source.groups)
        self._stop = threading.Event()
        self._read = Reader(source, max_pixels, cache_bytes, self._stop)
        self._draw, self._prefetch, self._memory, self._count = draw, prefetch, memory, threads
        self._per_image, self._beside = crops_per_image, beside
        self._device = torch.device(device)
        self._decoder = self._make_decoder(
            crop=crop,
            interpolation=interpolation,
            flip=flip,
            device=device,
            threads=threads,
            hw_decoder_load=hw_decoder_load,
        )
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="read")
        self._ready: queue.Queue = queue.Queue(maxsize=prefetch)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="train-loader", daemon=True)
        self._thread.start()
        atexit.register(self.close)  # the thread must not be inside DALI when the interpreter ends

    def __iter__(self) -> TrainLoader:
        return self

    def __next__(self) -> Batch:
        if self._stop.is_set():
            raise self._error or RuntimeError("next: this loader is closed")
        begin = time.perf_counter()
        item = self._ready.get()
        self.wait_seconds += time.perf_counter() - begin
        if isinstance(item, BaseException):
            self._error = item
            self.close()
            raise item
        hand_over(item.images)
        return item

    def close(self) -> None:
        """Stop reading ahead and free the pipeline. A second call does nothing."""
        atexit.unregister(self.close)
        self._stop.set()
        self._thread.join(_PATIENCE)
        self._readers.shutdown(wait=False, cancel_futures=True)
        self._decoder.close()

    def _make_decoder(self, **options: Any) -> AnyDecoder:
        return ResidentDecoder(**options) if self._memory == IN_PLACE else make_decoder(self.source, **options)

    def _work(self) -> None:
        draws: deque[Future | None] = deque()
        try:
            if self._memory:
                self._read.keep_all(self._count, self._stop, self._device if self._memory == IN_PLACE else None)
            works = self._works(draws)
            for work, images in decode_all(self._decoder, works, self._repair, self.batch_size, self._prefetch):
                self.replaced += int((work.ids != self._stream[work.positions]).sum())
                drawing = draws.popleft()
                draw = None if drawing is None else drawing.result()
                if self._beside is not None:
                    draw = self._beside(draw, self._keys(work.positions, work.ids))
                batch = Batch(
                    images=images,
                    indices=torch.from_numpy(work.ids),
                    epoch=int(work.positions[0]) // len(self.source),
                    draw=draw,
                )
                if not self._put(batch):
                    return
        except BaseException as error:
            self._put(error)

    def _put(self, item: object) -> bool:
        while not self._stop.is_set():
            try:
                self._ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def _works(self, draws: deque[Future | None]) -> Iterator[Work]:
        """Batches to decode, in order, with `prefetch` + 1 more being read. They end when the loader is closed."""
        reading: deque[tuple[np.ndarray, list[Future]]] = deque()
        step = 0
        while not self._stop.is_set():
            while len(reading) <= self._prefetch + 1:
                first = self._first + step * self._stride
                positions = np.arange(first, first + self.batch_size)
                parts = np.array_split(np.stack([positions, self._stream[positions]], axis=1), READERS)
                reading.append((positions, [self._readers.submit(self._read_part, part) for part in parts]))
                draws.append(self._draw and self._readers.submit(self._draw, self._start_step + step))
                if step % self.steps_per_epoch == self.steps_per_epoch // 2:
                    # To permute millions of samples takes a second: do so for the next epoch before it begins.
                    self._readers.submit(self._stream.permutation, int(first) // len(self.source) + 1)
                step += 1
            positions, futures = reading.popleft()
            yield self._assemble(positions, [row for future in futures for row in future.result()])

    def _read_part(self, part: np.ndarray) -> list[tuple]:
        return [self._read_one(position, index) for position, index in part.tolist()]

    def _read_one(self, position: int, index: int) -> tuple[int, np.ndarray, int, int]:
        """Read the sample `index`; if it is bad, the first good one of those drawn for this position."""
        for attempt in range(_REPLACEMENTS):
            name = self.source.name(index) if len(self.bad_files) else None
            if name is None or name not in self.bad_files:
                try:
                    return index, *self._read(index)
                except BadImage as error:
                    self.bad_files.add(self.source.name(index), str(error))
            bits = counter_bits(self._seed, np.array([position]), 1, _REPLACE + attempt)
            index = int(bits[0, 0] % np.uint64(len(self.source)))
        raise TooManyBadFiles(
            f"{_REPLACEMENTS} samples drawn at random cannot be decoded, the last is {self.source.name(index)}; "
            "python -m ijepa_fast check-data PATH lists them with reasons"
        )

    def _assemble(self, positions: np.ndarray, rows: list[tuple]) -> Work:
        ids, sizes = np.array([row[0] for row in rows]), np.array([row[2:] for row in rows])
        keys = self._keys(positions, ids)
        windows, mirrored = drawn_crops(self._seed, keys, sizes, self._scale, self._ratio)
        return Work(
            ids=ids,
            positions=positions,
            encoded=[row[1] for row in rows],
            windows=windows,
            flip=mirrored.astype(np.int32) if self._flip else None,
        )

    def _keys(self, positions: np.ndarray, ids: np.ndarray) -> np.ndarray:
        return crop_keys(positions, ids, len(self.source), self._per_image)

    def _repair(self, work: Work, reasons: dict[int, str]) -> Work:
        for row, reason in reasons.items():
            self.bad_files.add(self.source.name(int(work.ids[row])), reason)
        # Read every row again: the replacements must not depend on when a file turned out to be bad.
        rows = self._read_part(np.stack([work.positions, self._stream[work.positions]], axis=1))
        return self._assemble(work.positions, rows)
