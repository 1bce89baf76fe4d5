"""Masks made and packed ahead of the step, in a thread."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict

import torch

from ijepa_fast.config import Config
from ijepa_fast.masks import make_sampler
from ijepa_fast.packing import PackedBatch, pack

AHEAD = 2


class MaskQueue:
    """An endless iterator of this rank's PackedBatches on `device`, from micro-step `first` on.

    Masks are a function of (seed, micro-step, rank), so a resumed run draws what the unbroken one would have drawn.
    """

    def __init__(self, config: Config, device: torch.device, rank: int, ranks: int, first: int):
        options = asdict(config.mask)
        self._strategy = options.pop("strategy")
        self._policy, self._budget = options.pop("policy"), options.pop("budget")
        side = config.data.crop // config.model.patch
        self._sampler = make_sampler(self._strategy, (side, side), **options)
        self._batch = config.batch_size // (ranks * config.engine.accumulation)
        self._seed, self._rank, self._device, self._next = config.seed, rank, device, first
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="masks")
        self._made: deque[Future[PackedBatch]] = deque()

    def __iter__(self) -> MaskQueue:
        return self

    def __next__(self) -> PackedBatch:
        while len(self._made) <= AHEAD:
            self._made.append(self._thread.submit(self._make, self._next))
            self._next += 1
        packed = self._made.popleft().result()
        return packed.to(self._device, non_blocking=True) if self._device.type == "cuda" else packed

    def close(self) -> None:
        """Stop the thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _make(self, step: int) -> PackedBatch:
        packed = pack(self._sampler(self._batch, self._seed, step, self._rank), self._policy, self._budget)
        return packed.pin_memory() if self._device.type == "cuda" else packed
