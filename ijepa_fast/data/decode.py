"""Decoding: from encoded bytes and crop windows to uint8 images of one size, on the CPU or on a GPU.

DALI decodes only the rows and columns of the window. The resize is antialiased, like Pillow's. On a GPU, DALI does it;
on the CPU `resize.py` does, which is many times as fast there. When DALI meets a file that it cannot decode, it raises
an error and its pipeline is of no more use: `decode_all` finds the file, lets the caller replace it, and goes on with a
new pipeline.
"""

from __future__ import annotations

import io
import itertools
from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import ModuleType
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image

from ijepa_fast.data import Size, size_of
from ijepa_fast.data.arrays import INTERPOLATIONS as FILTERS
from ijepa_fast.data.arrays import ArrayDecoder
from ijepa_fast.data.headers import pillow_complaint
from ijepa_fast.data.resident import ResidentDecoder
from ijepa_fast.data.resize import resize_

Images = TypeVar("Images", torch.Tensor, list[torch.Tensor])

# Up to this width of the output, DALI resizes on the CPU too: a call from Python per image would cost more than it
# saves.
_SMALL = 64

# On a GPU: upsample chroma as on the CPU, so that the pixels are the same; and pin no thread to a core, since the other
# ranks would pin theirs to the same cores.
_MIXED = {"device": "mixed", "jpeg_fancy_upsampling": True, "affine": False}

# The names of the filters here, and in DALI.
INTERPOLATIONS = dict(zip(FILTERS, ("INTERP_LINEAR", "INTERP_CUBIC")))


def import_dali() -> ModuleType:
    """The module nvidia.dali. Raises ImportError, which names the package, where it is not installed."""
    try:
        import nvidia.dali as dali
    except ImportError as error:
        raise ImportError(
            "decoding images needs the package nvidia-dali-cuda130, which is not installed; "
            "pip install nvidia-dali-cuda130 (it runs without a GPU too)"
        ) from error
    return dali


@dataclass
class Work:
    """A batch to decode.

    ids: int64 (B,), the samples. positions: int64 (B,), their places in the sample stream. encoded: B uint8 arrays, or
    for arrays.ArrayDecoder opened rasters. windows: int32 (B, 4), x, y, width, height in pixels. flip: int32 (B,), 1 to
    mirror; None: mirror none.
    """

    ids: np.ndarray
    positions: np.ndarray
    encoded: list[Any]
    windows: np.ndarray
    flip: np.ndarray | None = None

    def inputs(self, first: int = 0, last: int | None = None) -> tuple:
        """The inputs of the DALI graph, for the rows from `first` to `last`."""
        rows = slice(first, last)
        windows = self.windows[rows]
        start, shape = np.ascontiguousarray(windows[:, :2]), np.ascontiguousarray(windows[:, 2:])
        inputs = self.encoded[rows], start, shape
        return inputs if self.flip is None else (*inputs, self.flip[rows])

    def without(self, rows: Container[int]) -> Work | None:
        """The same work without some rows; None where no row is left."""
        kept = [row for row in range(len(self.ids)) if row not in rows]
        if not kept:
            return None
        encoded = [self.encoded[row] for row in kept]
        flip = None if self.flip is None else self.flip[kept]
        return Work(self.ids[kept], self.positions[kept], encoded, self.windows[kept], flip)


class Decoder:
    """Makes DALI pipelines, all of one graph.

    crop: side of the images, or their height and width, pixels. interpolation: bilinear | bicubic. flip: whether works
    say which images to mirror. threads: how many decode; on the CPU as many resize. hw_decoder_load: share of the JPEG
    files that the GPU's decode engine takes. Raises ValueError for an unknown interpolation, ImportError without DALI.
    """

    def __init__(
        self,
        *,
        crop: int | Size,
        interpolation: str,
        flip: bool,
        device: str | torch.device,
        threads: int,
        hw_decoder_load: float = 0.65,
    ):
        if interpolation not in INTERPOLATIONS:
            raise ValueError(f"interpolation: expected one of {', '.join(INTERPOLATIONS)}, got {interpolation!r}")
        self.dali = import_dali()
        self.crop, self.interpolation, self.flip, self.threads = size_of(crop), interpolation, flip, threads
        self.device = torch.device(device)
        self.on_gpu = self.device.type == "cuda"
        self.decode_options = _MIXED | {"hw_decoder_load": hw_decoder_load} if self.on_gpu else {}
        self.resize_in_graph = self.on_gpu or max(self.crop) <= _SMALL
        self.stream = torch.cuda.Stream(self.device) if self.on_gpu else None
        self._resizers = ThreadPoolExecutor(threads, thread_name_prefix="resize")  # starts none until it is used

    def run(self, works: Iterable[tuple], batch_size: int, depth: int = 2) -> Iterator[Any]:
        """Decode in a new pipeline: per work a tensor, uint8 (b, crop, crop, 3), of which `depth` are made ahead."""
        pipe = self._pipeline(batch_size, depth)
        # DALI does not copy its inputs. As an attribute of the pipeline they live as long as its threads do.
        pipe.held = deque()
        with pipe:
            pipe.set_outputs(*self._graph(_holding(works, pipe.held)))
        pipe.build()
        pipe.schedule_run()
        while True:
            try:
                outputs = pipe.share_outputs()
            except StopIteration:
                return
            result = self._collect(outputs)
            pipe.held.popleft()
            pipe.release_outputs()
            pipe.schedule_run()
            yield result

    def healthy(self) -> bool:
        """Whether an image that is certainly whole can be decoded. If not, the device is at fault and no file is."""
        file = io.BytesIO()
        Image.new("RGB", (16, 16)).save(file, "JPEG")
        fn = self.dali.fn
        pipe = self._pipeline(1, 1)
        with pipe:
            encoded = fn.external_source(lambda: [np.frombuffer(file.getvalue(), np.uint8)])
            pipe.set_outputs(fn.decoders.image(encoded, **self.decode_options))
        try:
            pipe.run()
        except RuntimeError:
            return False
        return True

    def reason(self, error: RuntimeError, encoded: np.ndarray) -> str:
        """Why an image cannot be decoded: in Pillow's words if it fails too, since DALI's say little."""
        text = (str(error).partition("encountered:")[2] or str(error)).partition("C++ context")[0].strip()
        return pillow_complaint(encoded.tobytes()) or text.splitlines()[0]

    def close(self) -> None:
        """Stop the resizing threads."""
        self._resizers.shutdown(cancel_futures=True)

    def _pipeline(self, batch_size: int, depth: int) -> Any:
        device_id = (self.device.index or 0) if self.on_gpu else None
        return self.dali.Pipeline(batch_size, self.threads, device_id, prefetch_queue_depth=depth)

    def _decoded(self, works: Iterable[tuple], others: int) -> tuple:
        """The graph's nodes for the decoded windows of works, and for their `others` further inputs."""
        fn = self.dali.fn
        encoded, start, shape, *rest = fn.external_source(works, num_outputs=3 + others, no_copy=True)
        return fn.decoders.image_slice(encoded, start, shape, **self.decode_options), *rest

    def _graph(self, works: Iterable[tuple]) -> tuple:
        fn, types = self.dali.fn, self.dali.types
        images, *flip = self._decoded(works, int(self.flip))
        if self.resize_in_graph:
            filter_type = getattr(types, INTERPOLATIONS[self.interpolation])
            images = fn.resize(images, size=list(self.crop), interp_type=filter_type, antialias=True)
        return (fn.flip(images, horizontal=flip[0]) if self.flip else images,)

    def _collect(self, outputs: tuple) -> Any:
        return self._copy(outputs[0]) if self.resize_in_graph else self._resize(outputs[0])

    def _copy(self, images: Any) -> torch.Tensor:
        dense = images.as_tensor()
        if self.stream is None:
            return torch.from_numpy(np.array(dense))
        from nvidia.dali.plugin.pytorch import feed_ndarray

        with torch.cuda.stream(self.stream):
            out = torch.empty(dense.shape(), dtype=torch.uint8, device=self.device)
            feed_ndarray(dense, out, cuda_stream=self.stream)
        self.stream.synchronize()  # only this thread waits; the next batches are decoded meanwhile
        return out

    def _resize(self, images: Any) -> torch.Tensor:
        out = np.empty((len(images), *self.crop, 3), np.uint8)

        def part(rows: slice) -> None:
            resize_(out[rows], [np.asarray(images[row]) for row in range(rows.start, rows.stop)], self.interpolation)

        bounds = np.linspace(0, len(images), self.threads + 1).astype(int).tolist()
        list(self._resizers.map(part, itertools.starmap(slice, itertools.pairwise(bounds))))
        return torch.from_numpy(out)


AnyDecoder = Decoder | ArrayDecoder | ResidentDecoder


def hand_over(images: Images) -> Images:
    """Return `images` for use on the caller's CUDA stream; to be called in the thread that uses them.

    They were allocated on the decoder's stream. Without this call, a later batch would get their memory as soon as the
    caller drops them, though the caller's kernels may not have run yet.
    """
    for tensor in images if isinstance(images, list) else [images]:
        if tensor.is_cuda:
            tensor.record_stream(torch.cuda.current_stream(tensor.device))
    return images


def decode_all(
    decoder: AnyDecoder,
    works: Iterable[Work],
    repair: Callable[[Work, dict[int, str]], Work | None],
    batch_size: int,
    depth: int = 2,
) -> Iterator[tuple[Work, Any]]:
    """Every work with its images, in order.

    repair: called with a work of which some rows cannot be decoded, and the reason for each of these rows; it returns
    the work to decode instead, or None. batch_size: rows of the largest work. depth: batches decoded ahead. Raises the
    pipeline's RuntimeError where no file is at fault.
    """
    works = iter(works)
    redo: list[Work] = []
    while True:
        in_flight: deque[Work] = deque()
        try:
            for images in decoder.run(_feed(itertools.chain(redo, works), in_flight), batch_size, depth):
                yield in_flight.popleft(), images
            return
        except RuntimeError as error:
            redo = list(in_flight)
            for place, work in enumerate(redo):
                if reasons := _find_bad(decoder, work):
                    if len(reasons) == len(work.ids) and not decoder.healthy():
                        raise
                    repaired = repair(work, reasons)
                    redo[place : place + 1] = [] if repaired is None else [repaired]
                    break
            else:
                raise error


def _holding(works: Iterable[tuple], held: deque) -> Iterator[tuple]:
    for inputs in works:
        held.append(inputs)
        yield inputs


def _feed(works: Iterable[Work], in_flight: deque[Work]) -> Iterator[tuple]:
    for work in works:
        in_flight.append(work)
        yield work.inputs()


def _find_bad(decoder: AnyDecoder, work: Work) -> dict[int, str]:
    """The rows that cannot be decoded by themselves, each with the reason."""
    reasons: dict[int, str] = {}
    row, count = 0, len(work.ids)
    while row < count:
        singles = (work.inputs(single, single + 1) for single in range(row, count))
        try:
            for _ in decoder.run(singles, 1, depth=1):
                row += 1
        except RuntimeError as error:
            reasons[row] = decoder.reason(error, work.encoded[row])
            row += 1
    return reasons
