"""Checkpoints are written beside training: the loop waits for a copy of the state, and for the last one's writer."""

from __future__ import annotations

import datetime
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch

from ijepa_fast.engine.engine import Engine
from ijepa_fast.run.checkpoint import CheckpointError, Snapshot, snapshot


class Saver:
    """Saves an engine's state in a thread. Used by every rank alike; a context, which ends when all is written.

    write: writes a snapshot, given the group by which the ranks' threads agree; it raises the same on all ranks.
    timeout: seconds that a thread waits for those of the other ranks.
    """

    def __init__(self, engine: Engine, write: Callable[[Snapshot, Any], object], timeout: int):
        self._engine, self._write = engine, write
        self._group = torch.distributed.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout))
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.wait()
        except Exception as failure:
            if error is None:
                raise
            if isinstance(failure, CheckpointError) and torch.distributed.get_rank() == 0:
                print(f"and before that: {failure}", file=sys.stderr)

    def save(self, step: int) -> float:
        """Begin to write the state after `step` steps. Returns the seconds that the caller was held up.

        Raises as `wait` does.
        """
        begin = time.perf_counter()
        self.wait()
        taken = snapshot(self._engine, step)
        self._thread = threading.Thread(target=self._work, args=(taken,), name="checkpoint", daemon=True)
        self._thread.start()
        return time.perf_counter() - begin

    @property
    def failed(self) -> bool:
        """Whether `wait` would raise."""
        return self._error is not None

    def wait(self) -> None:
        """Return when the last checkpoint is whole. Raises what writing it raised, on all ranks."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _work(self, taken: Snapshot) -> None:
        try:
            self._write(taken, self._group)
        except BaseException as error:
            self._error = error
