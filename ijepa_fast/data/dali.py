"""Batches of decoded images from DALI: one graph for the CPU and the GPU, fed with bytes and crop windows from here.

DALI decides nothing at random. Order, windows and flips are functions of (seed, position in the sample stream), so a run
resumes at the exact sample, on any number of ranks. A background thread reads ahead and owns the pipeline; `next` takes
finished batches from a queue.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from ijepa_fast.data.crops import TRIES, counter_uniform, random_resized_crop
from ijepa_fast.data.headers import MAX_PIXELS, read_header
from ijepa_fast.data.order import SampleStream
from ijepa_fast.data.sources import Source

INTERPOLATIONS = {"bilinear": "INTERP_LINEAR", "bicubic": "INTERP_CUBIC"}


@dataclass(frozen=True)
class Batch:
    """images: uint8 (B, H, W, 3) on the loader's device. indices: int64 (B,) sample ids on the CPU. epoch: of the first."""

    images: torch.Tensor
    indices: torch.Tensor
    epoch: int


def import_dali():
    """The module nvidia.dali. Raises ImportError naming the package where it is not installed."""
    try:
        import nvidia.dali as dali
        import nvidia.dali.fn
        import nvidia.dali.types
    except ImportError as error:
        raise ImportError(
            "decoding images needs the package nvidia-dali-cuda130, which is not installed (it also runs without a GPU); "
            "pip install nvidia-dali-cuda130"
        ) from error
    return dali


class _Pipeline:
    """A decode graph fed by an iterator: yields one uint8 (B, H, W, 3) tensor per item of `inputs`, in order.

    An item is a tuple of batches (lists of arrays or arrays with a leading batch dimension), one for each name of the
    graph. Up to `depth` items are taken ahead. Used by one thread.
    """

    def __init__(self, graph, inputs: Iterator[tuple], batch_size: int, device: torch.device, threads: int, depth: int):
        dali = import_dali()
        on_gpu = device.type == "cuda"
        self.device = device
        self._pipe = dali.Pipeline(
            batch_size, threads, (device.index or 0) if on_gpu else None, prefetch_queue_depth=depth
        )
        with self._pipe:
            self._pipe.set_outputs(graph(dali, inputs, "mixed" if on_gpu else "cpu"))
        self._pipe.build()
        self._pipe.schedule_run()

    def __iter__(self) -> _Pipeline:
        return self

    def __next__(self) -> torch.Tensor:
        (images,) = self._pipe.share_outputs()
        dense = images.as_tensor()
        if self.device.type == "cuda":
            from nvidia.dali.plugin.pytorch import feed_ndarray

            out = torch.empty(dense.shape(), dtype=torch.uint8, device=self.device)
            feed_ndarray(dense, out, cuda_stream=torch.cuda.current_stream(self.device))
        else:
            out = torch.from_numpy(np.array(dense))
        self._pipe.release_outputs()
        self._pipe.schedule_run()
        return out


def _train_graph(crop: int, interpolation: str, hw_decoder_load: float):
    def graph(dali, inputs, decoder_device):
        fn, types = dali.fn, dali.types
        encoded, start, shape, flip = fn.external_source(inputs, num_outputs=4)
        options = {"hw_decoder_load": hw_decoder_load} if decoder_device == "mixed" else {}
        images = fn.decoders.image_slice(encoded, start, shape, device=decoder_device, **options)
        interp = getattr(types, INTERPOLATIONS[interpolation])
        images = fn.resize(images, size=[crop, crop], interp_type=interp, antialias=True)
        return fn.flip(images, horizontal=flip)

    return graph


class TrainLoader:
    """An endless iterator of random resized crops; `next` gives a Batch.

    batch_size is per rank. scale and ratio are those of RandomResizedCrop; flip mirrors half of the images. A loader made
    with start_step=s yields what the unbroken one yields from step s on. wait_seconds is the time spent inside `next`.
    """

    def __init__(
        self,
        source: Source,
        *,
        batch_size: int,
        crop: int,
        scale: tuple[float, float] = (0.3, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        interpolation: str = "bilinear",
        flip: bool = False,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        device: str | torch.device = "cpu",
        threads: int = 2,
        prefetch: int = 2,
        start_step: int = 0,
        hw_decoder_load: float = 0.65,
    ):
        if interpolation not in INTERPOLATIONS:
            raise ValueError(f"interpolation: expected one of {', '.join(INTERPOLATIONS)}, got {interpolation!r}")
        if len(source) < batch_size * world_size:
            raise ValueError(
                f"batch_size: {batch_size} on {world_size} ranks needs at least {batch_size * world_size} images, "
                f"the source has {len(source)}; lower batch_size"
            )
        self.source, self.batch_size = source, batch_size
        self.rank, self.world_size = rank, world_size
        self.steps_per_epoch = len(source) // (batch_size * world_size)
        self.wait_seconds = 0.0
        self._seed, self._scale, self._ratio, self._flip = seed, scale, ratio, flip
        self._stream = SampleStream(len(source), seed)
        self._step = start_step
        self._readers = ThreadPoolExecutor(max(2, threads), thread_name_prefix="read")
        device = torch.device(device)
        graph = _train_graph(crop, interpolation, hw_decoder_load)
        self._make = lambda inputs: _Pipeline(graph, inputs, batch_size, device, threads, prefetch)
        self._prefetch = prefetch
        self._ready: queue.Queue = queue.Queue(maxsize=prefetch)
        self._stop = threading.Event()
        import_dali()
        self._thread = threading.Thread(target=self._work, name="train-loader", daemon=True)
        self._thread.start()

    def __iter__(self) -> TrainLoader:
        return self

    def __next__(self) -> Batch:
        begin = time.perf_counter()
        batch = self._ready.get()
        self.wait_seconds += time.perf_counter() - begin
        if isinstance(batch, BaseException):
            raise batch
        return batch

    def close(self) -> None:
        """Stop reading ahead and free the pipeline; harmless when called twice."""
        self._stop.set()
        while self._thread.is_alive():
            try:
                self._ready.get(timeout=0.05)
            except queue.Empty:
                continue
        self._readers.shutdown(cancel_futures=True)

    def _work(self) -> None:
        try:
            in_flight = deque()
            for images in self._make(self._inputs(in_flight)):
                positions, ids = in_flight.popleft()
                self._put(Batch(images, torch.from_numpy(ids), int(positions[0] // len(self.source))))
                if self._stop.is_set():
                    return
        except BaseException as error:
            self._put(error)

    def _inputs(self, in_flight: deque) -> Iterator[tuple]:
        reading = deque()
        while True:
            while len(reading) < self._prefetch + 1:
                reading.append(self._read_ahead())
            positions, ids, futures = reading.popleft()
            in_flight.append((positions, ids))
            yield self._assemble(positions, futures)

    def _put(self, item) -> None:
        while not self._stop.is_set():
            try:
                return self._ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def _read_ahead(self) -> tuple[np.ndarray, list[Future]]:
        first = (self._step * self.world_size + self.rank) * self.batch_size
        positions = np.arange(first, first + self.batch_size)
        self._step += 1
        return positions, self._stream[positions], self._read(self._stream[positions])

    def _read(self, ids: np.ndarray) -> list[Future]:
        return [self._readers.submit(self._read_some, part) for part in np.array_split(ids, 4)]

    def _read_some(self, ids: np.ndarray) -> list[tuple]:
        out = []
        for index in ids.tolist():
            data = self.source.read(index)
            header = read_header(data, MAX_PIXELS)
            out.append((np.frombuffer(data, np.uint8), header.height, header.width))
        return out

    def _assemble(self, positions, futures) -> tuple:
        rows = [row for future in futures for row in future.result()]
        sizes = np.array([row[1:] for row in rows])
        uniform = counter_uniform(self._seed, positions, 2 * TRIES + 3)
        windows = random_resized_crop(sizes, uniform[:, :-1], self._scale, self._ratio)
        flip = (uniform[:, -1] < 0.5 * self._flip).astype(np.int32)
        return [row[0] for row in rows], windows[:, :2].copy(), windows[:, 2:].copy(), flip


def _eval_graph(crop: int, interpolation: str):
    def graph(dali, inputs, decoder_device):
        fn, types = dali.fn, dali.types
        encoded, start, end = fn.external_source(inputs, num_outputs=3)
        images = fn.decoders.image(encoded, device=decoder_device)
        interp = getattr(types, INTERPOLATIONS[interpolation])
        return fn.resize(images, size=[crop, crop], roi_start=start, roi_end=end, interp_type=interp, antialias=True)

    return graph


def eval_batches(
    source: Source,
    *,
    batch_size: int,
    crop: int,
    resize: int,
    device: str | torch.device = "cpu",
    threads: int = 2,
    interpolation: str = "bilinear",
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Every sample once, in order: images uint8 (b, H, W, 3) and labels int64 (b,), the last batch smaller.

    The shorter side is resized to `resize`, then the central `crop` x `crop` is cut; one resampling does both. Without
    labels in the source, the labels are the sample ids.
    """
    if not 0 < crop <= resize:
        raise ValueError(f"crop: expected at most resize = {resize}, got {crop}")
    device = torch.device(device)
    labels = np.arange(len(source)) if source.labels is None else source.labels

    def inputs() -> Iterator[tuple]:
        for first in range(0, len(source), batch_size):
            data = [source.read(i) for i in range(first, min(first + batch_size, len(source)))]
            sizes = np.array([read_header(d)[:2] for d in data], np.float32)
            half = sizes.min(1, keepdims=True) * np.float32(crop / resize / 2)
            yield [np.frombuffer(d, np.uint8) for d in data], sizes / 2 - half, sizes / 2 + half

    done = 0
    for images in _Pipeline(_eval_graph(crop, interpolation), inputs(), batch_size, device, threads, 2):
        yield images, torch.from_numpy(labels[done : done + len(images)])
        done += len(images)
