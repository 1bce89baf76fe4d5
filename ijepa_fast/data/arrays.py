"""Crops of images that DALI does not decode: any number of channels, 8 bits, 16 bits or floats, windows of large files.

`ArrayDecoder` stands where `decode.Decoder` does, and decodes with NumPy and PyTorch in threads. Works are the same,
but that `Work.encoded` holds opened rasters in the place of encoded bytes.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ijepa_fast.data import Size, size_of
from ijepa_fast.data.crops import View
from ijepa_fast.data.headers import BadImage
from ijepa_fast.data.reading import Raster
from ijepa_fast.data.resize import resize_

INTERPOLATIONS = ("bilinear", "bicubic")


class CannotDecode(RuntimeError):
    """An image of a batch cannot be decoded, as a pipeline of DALI says it."""


class ArrayDecoder:
    """Makes crops of rasters on the CPU. Arguments and methods are decode.Decoder's."""

    def __init__(
        self,
        *,
        crop: int | Size,
        interpolation: str,
        flip: bool,
        device: str | torch.device,
        threads: int,
        hw_decoder_load: float = 0.0,
    ):
        if interpolation not in INTERPOLATIONS:
            raise ValueError(f"interpolation: expected one of {', '.join(INTERPOLATIONS)}, got {interpolation!r}")
        self.crop, self.interpolation, self.flip = size_of(crop), interpolation, flip
        self.device = torch.device(device)
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="decode")

    def run(self, works: Iterable[tuple], batch_size: int, depth: int = 2) -> Iterator[Any]:
        """Per work a tensor (b, H, W, C) of the images' depth, of which `depth` are made ahead."""
        ahead: deque[list] = deque()
        works = iter(works)
        while True:
            for inputs in itertools.islice(works, depth - len(ahead)):
                ahead.append([self._threads.submit(self._row, *row) for row in zip(*inputs)])
            if not ahead:
                return
            try:
                rows = [future.result() for future in ahead.popleft()]
            except (BadImage, OSError) as error:
                raise CannotDecode(str(error)) from error
            yield self._collect(rows)

    def reason(self, error: RuntimeError, encoded: Raster) -> str:
        """Why an image cannot be decoded."""
        return str(error)

    def healthy(self) -> bool:
        """Whether an image that is certainly whole can be decoded."""
        return True

    def close(self) -> None:
        """Stop the threads."""
        self._threads.shutdown(cancel_futures=True)

    def _row(self, raster: Raster, start: np.ndarray, shape: np.ndarray, mirror: np.ndarray | None = None) -> Any:
        pixels = resized(self._read(raster, start, shape), self.crop, self.interpolation)
        return np.ascontiguousarray(pixels[:, ::-1]) if mirror is not None and mirror else pixels

    def _read(self, raster: Raster, start: np.ndarray, shape: np.ndarray) -> np.ndarray:
        (x, y), (width, height) = start.tolist(), shape.tolist()
        return raster.read(y, x, height, width)

    def _collect(self, rows: list) -> Any:
        return self._place(rows)

    def _place(self, rows: list[np.ndarray]) -> torch.Tensor:
        images = torch.from_numpy(np.stack(rows))
        return images if self.device.type == "cpu" else images.pin_memory().to(self.device, non_blocking=True)


class ArrayViewDecoder(ArrayDecoder):
    """An ArrayDecoder that makes several views of each image, as views.ViewDecoder does.

    Brightness and contrast change all channels alike; saturation and hue, which belong to colours, change nothing.
    """

    def __init__(self, views: Sequence[View], **options: Any):
        super().__init__(**options)
        self.views = views

    def _row(self, raster: Raster, start: np.ndarray, shape: np.ndarray, *parameters: Any) -> list[np.ndarray]:
        pixels = self._read(raster, start, shape)
        return [self._view(pixels, view, values) for view, values in zip(self.views, parameters)]

    def _view(self, pixels: np.ndarray, view: View, values: np.ndarray) -> np.ndarray:
        top, left, bottom, right = np.rint(values[:4]).astype(int).tolist()
        out = resized(pixels[top:bottom, left:right], size_of(view.crop), self.interpolation)
        mirror, brightness, contrast, _, _, sigma, solarise = values[4:].tolist()
        most = _most(out.dtype)
        x = torch.from_numpy(np.ascontiguousarray(out[:, ::-1] if mirror else out)).permute(2, 0, 1).float()
        middle = x.mean() if most is None else most / 2
        x = _blurred((x * brightness - middle) * contrast + middle, sigma)
        if solarise:
            low, high = (0, most) if most is not None else (float(x.min()), float(x.max()))
            x = torch.where(x >= (low + high) / 2, low + high - x, x)
        return _as(x.permute(1, 2, 0), out.dtype)

    def _collect(self, rows: list[list[np.ndarray]]) -> list[torch.Tensor]:
        return [self._place(list(view)) for view in zip(*rows)]


def centre(raster: Raster, size: Size, interpolation: str) -> np.ndarray:
    """The centre of an image as (H, W, C) of `size`: the largest part of its aspect."""
    share = min(raster.height / size[0], raster.width / size[1])
    height, width = (max(1, round(side * share)) for side in size)
    pixels = raster.read((raster.height - height) // 2, (raster.width - width) // 2, height, width)
    return resized(pixels, size, interpolation)


def resized(pixels: np.ndarray, size: Size, interpolation: str) -> np.ndarray:
    """An image (h, w, C) as (H, W, C) of the same depth, antialiased; of bytes and three channels as Pillow does it."""
    if pixels.shape[:2] == size:
        return pixels
    out = np.empty((1, *size, pixels.shape[2]), pixels.dtype)
    resize_(out, [np.require(pixels, requirements=["C", "W"])], interpolation)
    return out[0]


def _most(dtype: np.dtype) -> int | None:
    return int(np.iinfo(dtype).max) if dtype.kind == "u" else None


def _as(x: torch.Tensor, dtype: np.dtype) -> np.ndarray:
    """fp32 as numbers of `dtype`, rounded and within its range where it is one of integers."""
    most = _most(dtype)
    x = x if most is None else x.round_().clamp_(0, most)
    return np.ascontiguousarray(x.numpy().astype(dtype))


def _blurred(x: torch.Tensor, sigma: float) -> torch.Tensor:
    """(C, H, W) blurred by a Gaussian of `sigma` pixels, whose border is mirrored."""
    reach = min(round(3 * sigma), min(x.shape[1:]) - 1)
    if reach < 1:
        return x
    offsets = torch.arange(-reach, reach + 1, dtype=torch.float32)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel /= kernel.sum()
    x = F.pad(x[:, None], (reach, reach, reach, reach), mode="reflect")
    return F.conv2d(F.conv2d(x, kernel.view(1, 1, 1, -1)), kernel.view(1, 1, -1, 1))[:, 0]
