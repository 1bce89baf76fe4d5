"""Batches without files: random images, made once, for measurements of everything but the data."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from ijepa_fast.data import Size, size_of
from ijepa_fast.data.crops import counter_bits
from ijepa_fast.data.dali import Batch


class SyntheticLoader:
    """A loader that returns the same batch of random pixels in every step, and never waits for images.

    It is used like a TrainLoader and has its attributes. count: images per epoch. crop: side of the images, or height
    and width, pixels; with a list of them, Batch.images is a list of views, as a ViewLoader's. draw: called with the
    step, one step ahead of it and in a thread; its result is Batch.draw. Other arguments are TrainLoader's.
    """

    def __init__(
        self,
        *,
        batch_size: int,
        crop: int | Size | list[int | Size],
        channels: int = 3,
        depth: str = "uint8",
        count: int = 1_281_167,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        device: str | torch.device = "cpu",
        start_step: int = 0,
        draw: Callable[[int], object] | None = None,
    ):
        places = np.arange(batch_size) + rank * batch_size  # so that another number of ranks sees the same images

        def images(side: int | Size, view: int = 0) -> torch.Tensor:
            size = (*size_of(side), channels)
            values = size[0] * size[1] * size[2]
            words = counter_bits(seed, places, -(-values // 8), view)
            drawn = torch.from_numpy(words.view(np.uint8)[:, :values].reshape(batch_size, *size))
            if depth != "uint8":
                drawn = drawn / 255 if depth == "float32" else drawn.int().mul(257).to(torch.uint16)
            return drawn.to(device)

        sides = crop if isinstance(crop, list) else [crop]
        made = [images(side, view) for view, side in enumerate(sides)]
        self._images = made if isinstance(crop, list) else made[0]
        self._indices = torch.arange(batch_size) + rank * batch_size
        self._step, self._draw = start_step, draw
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="draw")
        self._next = self._thread.submit(self._make, start_step)
        self.steps_per_epoch = max(count // (batch_size * world_size), 1)
        self.wait_seconds, self.replaced = 0.0, 0

    def __iter__(self) -> SyntheticLoader:
        return self

    def __next__(self) -> Batch:
        step = self._step
        self._step += 1
        draw = self._next.result()
        self._next = self._thread.submit(self._make, self._step)
        return Batch(self._images, self._indices, step // self.steps_per_epoch, draw)

    def _make(self, step: int) -> object:
        return None if self._draw is None else self._draw(step)

    def close(self) -> None:
        """Stop the thread. A second call does nothing."""
        self._thread.shutdown(cancel_futures=True)
