"""Several augmented views of each image: large and small crops, as self-distillation wants them.

Shapes: B images, V views.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ijepa_fast.data import size_of
from ijepa_fast.data.arrays import ArrayViewDecoder
from ijepa_fast.data.crops import TRIES, View, counter_uniform, random_resized_crop
from ijepa_fast.data.dali import TrainLoader
from ijepa_fast.data.decode import INTERPOLATIONS, AnyDecoder, Decoder, Work
from ijepa_fast.data.sources import Source

_COLOURS = ("brightness", "contrast", "saturation", "hue")
_NO_BLUR = 0.05  # standard deviation in pixels that changes nothing: DALI's filter needs one above 0

_STREAM = 1 << 32  # first stream of random numbers of the views, far from the loader's own (crops.counter_bits)


@dataclass
class ViewWork(Work):
    """A batch to decode into several views.

    windows: the smallest window that holds those of all views. parameters: per view float32 (B, 11): top, left, bottom
    and right of its window, relative to `windows`; mirroring, brightness, contrast, saturation, hue, standard deviation
    of the blur, solarisation.
    """

    parameters: tuple[np.ndarray, ...] = ()

    def inputs(self, first: int = 0, last: int | None = None) -> tuple:
        """The inputs of the DALI graph, for the rows from `first` to `last`."""
        return (*super().inputs(first, last), *(values[first:last] for values in self.parameters))


class ViewDecoder(Decoder):
    """A Decoder that decodes each image once and makes all its views in the graph, on the CPU or a GPU."""

    def __init__(self, views: Sequence[View], **options: Any):
        super().__init__(**options)
        self.views = views

    def _graph(self, works: Iterable[tuple]) -> tuple:
        images, *parameters = self._decoded(works, len(self.views))
        return tuple(self._view(images, view, values) for view, values in zip(self.views, parameters))

    def _view(self, images: Any, view: View, values: Any) -> Any:
        fn, types = self.dali.fn, self.dali.types
        filter_type = getattr(types, INTERPOLATIONS[self.interpolation])
        window = {"roi_start": values[0:2], "roi_end": values[2:4]}
        out = fn.resize(images, size=list(size_of(view.crop)), interp_type=filter_type, antialias=True, **window)
        out = fn.flip(out, horizontal=fn.cast(values[4], dtype=types.INT32))
        colours = {name: values[5 + place] for place, name in enumerate(_COLOURS)}
        out = fn.gaussian_blur(fn.color_twist(out, **colours), sigma=values[9])
        if view.solarise == 0:
            return out
        solarise = fn.cast(values[10], dtype=types.INT16)
        wide = fn.cast(out, dtype=types.INT16)
        inverted = (255 - 2 * wide) * (wide >= 128) * (solarise.gpu() if self.on_gpu else solarise)
        return fn.cast(wide + inverted, dtype=types.UINT8)

    def _collect(self, outputs: tuple) -> list[torch.Tensor]:
        return [self._copy(images) for images in outputs]


class ViewLoader(TrainLoader):
    """A TrainLoader whose Batch.images is a list, with a tensor uint8 (B, crop, crop, 3) per view.

    views: how each is made. Other arguments are TrainLoader's, without `crop`.
    """

    def __init__(self, source: Source, *, views: Sequence[View], interpolation: str = "bicubic", **options: Any):
        self.views = tuple(views)
        super().__init__(source, crop=self.views[0].crop, interpolation=interpolation, **options)

    def _make_decoder(self, **options: Any) -> AnyDecoder:
        kind = ViewDecoder if self.source.reading.plain else ArrayViewDecoder
        return kind(self.views, **options)

    def _assemble(self, positions: np.ndarray, rows: list[tuple]) -> ViewWork:
        ids, sizes = np.array([row[0] for row in rows]), np.array([row[2:] for row in rows])
        keys = self._keys(positions, ids)
        streams = [_STREAM + (number if view.like is None else view.like) for number, view in enumerate(self.views)]
        draws = [
            _draw(view, sizes, counter_uniform(self._seed, keys, 2 * TRIES + 12, stream), self._ratio)
            for view, stream in zip(self.views, streams)
        ]
        parameters = np.stack(draws)  # (V, B, 11)
        low, high = parameters[:, :, 0:2].min(0), parameters[:, :, 2:4].max(0)
        parameters[:, :, 0:2] -= low
        parameters[:, :, 2:4] -= low
        return ViewWork(
            ids=ids,
            positions=positions,
            encoded=[row[1] for row in rows],
            windows=np.concatenate([low[:, ::-1], (high - low)[:, ::-1]], axis=1).astype(np.int32),
            parameters=tuple(parameters),
        )


def _draw(view: View, sizes: np.ndarray, uniform: np.ndarray, ratio: tuple[float, float]) -> np.ndarray:
    """Draw a view's parameters, (B, 11), see ViewWork. sizes: (B, 2) of the images. uniform: (B, 2 * TRIES + 12)."""
    windows = random_resized_crop(sizes, uniform[:, : 2 * TRIES + 2], view.scale, ratio)
    x, y, w, h = windows.T
    mirror, jitter, brightness, contrast, saturation, hue, grey, blur, sigma, solarise = uniform[:, 2 * TRIES + 2 :].T
    jittered = (jitter < view.jitter).astype(float)
    by = dict(zip(_COLOURS, (jittered * strength for strength in view.strengths), strict=True))
    columns = [
        *(y, x, y + h, x + w),
        mirror < 0.5,
        1 + by["brightness"] * (2 * brightness - 1),
        1 + by["contrast"] * (2 * contrast - 1),
        np.where(grey < view.grey, 0, 1 + by["saturation"] * (2 * saturation - 1)),
        360 * by["hue"] * (2 * hue - 1),
        np.where(blur < view.blur, view.sigma[0] + (view.sigma[1] - view.sigma[0]) * sigma, _NO_BLUR),
        solarise < view.solarise,
    ]
    return np.stack(columns, axis=1).astype(np.float32)
