"""Ways to do one thing timed side by side where a run begins, to take the fastest."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch

ROUNDS, CALLS = 3, 5


def seconds(runs: Mapping[str, Callable[[], object]], device: torch.device) -> dict[str, float]:
    """Of a call of each of `runs`, the shortest of a few rounds in which they take turns; each has run once before."""
    found = dict.fromkeys(runs, float("inf"))
    for _ in range(ROUNDS):
        for name, run in runs.items():
            _wait(device)
            begin = time.perf_counter()
            for _ in range(CALLS):
                run()
            _wait(device)
            found[name] = min(found[name], (time.perf_counter() - begin) / CALLS)
    return found


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
