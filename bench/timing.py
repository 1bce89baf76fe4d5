"""Functions timed side by side: they take turns, from a cold cache, so that a busy or warm machine is so for all."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch

# Below this the host may take longer than the kernels do (.3 ms an op, seen beside an H100), so CUDA graphs launch.
GRAPH_BELOW = 1e-3
CPU_CACHE = 64 << 20  # bytes written before each call on a CPU; more than a last-level cache has
MIN_ROUNDS, MAX_ROUNDS = 5, 200


@dataclass
class Work:
    """What is timed: `forward()`, and after it, on what it returned, `backward(outputs)` where there is one."""

    forward: Callable
    backward: Callable | None = None


@dataclass
class Times:
    """Seconds of each round (rounds,), backward's NaN where there is none, and whether CUDA graphs launched them."""

    forward: np.ndarray
    backward: np.ndarray
    graph: bool

    @property
    def both(self) -> np.ndarray:
        """Forward and backward, (rounds,)."""
        return self.forward + self.backward


def synchronise(device: torch.device | str) -> None:
    """Wait for the device."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def interleave(
    works: dict[str, Work], device: torch.device, seconds: float = 0.5, rounds: int | None = None
) -> dict[str, Times]:
    """Time every work once a round; `rounds`, or as many as fit into `seconds`, within limits.

    On a GPU all run on one side stream. If anything takes less than GRAPH_BELOW, every work is captured into CUDA
    graphs, so that launches count for all or for none; one that cannot be captured is launched as it is, and says so.
    """
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    synchronise(device)
    with torch.cuda.stream(stream) if stream else nullcontext():
        cold = _flusher(device)
        timer = _Timer(device)
        once = {}
        for name, work in works.items():
            for _ in range(2):  # the first call compiles
                once[name] = timer.seconds(_round(work, cold, timer))
        graphs = {}
        if stream and np.nanmin(list(once.values())) < GRAPH_BELOW:
            graphs = {name: graph for name, work in works.items() if (graph := _capture(work, stream)) is not None}
        total = sum(np.nansum(times) for times in once.values())
        rounds = rounds or int(np.clip(seconds / total, MIN_ROUNDS, MAX_ROUNDS))
        measured = {name: [] for name in works}
        for _ in range(rounds):
            marks = {name: _round(graphs.get(name, work), cold, timer) for name, work in works.items()}
            for name, mark in marks.items():
                measured[name].append(timer.seconds(mark))
    synchronise(device)
    columns = {name: np.array(pairs).T for name, pairs in measured.items()}
    return {name: Times(forward, backward, name in graphs) for name, (forward, backward) in columns.items()}


def peak_memory(work: Work, device: torch.device) -> int | None:
    """Bytes that forward and backward hold at once beyond what was held before; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    outputs = work.forward()
    gradients = work.backward(outputs) if work.backward else None
    torch.cuda.synchronize(device)
    del outputs, gradients
    return torch.cuda.max_memory_allocated(device) - before


class _Timer:
    """Marks in time: events of the current stream, or the clock."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"

    def mark(self):
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, marks) -> tuple[float, float]:
        """(forward, backward) of the marks of one round; waits for them."""
        return tuple(np.nan if pair is None else self._between(*pair) for pair in marks)

    def _between(self, start, end) -> float:
        if not self.cuda:
            return end - start
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def _round(work: Work, cold: Callable, timer: _Timer):
    """One forward and one backward, each from a cold cache -> the marks around each."""
    cold()
    forward = timer.mark()
    outputs = work.forward()
    forward = forward, timer.mark()
    if work.backward is None:
        return forward, None
    cold()
    backward = timer.mark()
    work.backward(outputs)
    return forward, (backward, timer.mark())


def _flusher(device: torch.device) -> Callable:
    """A function that drives everything else out of the last-level cache."""
    size = CPU_CACHE
    if device.type == "cuda":
        size = max(256 << 20, 2 * torch.cuda.get_device_properties(device).L2_cache_size)
    return torch.empty(size, dtype=torch.int8, device=device).zero_


def _capture(work: Work, stream: torch.cuda.Stream) -> Work | None:
    """The work as CUDA graphs, or None where it cannot be captured: where it waits for the device, say."""
    graphs, kept = [torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()], []
    try:
        with torch.cuda.graph(graphs[0], stream=stream):
            kept.append(work.forward())
        if work.backward is not None:
            with torch.cuda.graph(graphs[1], stream=stream, pool=graphs[0].pool()):
                kept.append(work.backward(kept[0]))
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    # The graphs write into the memory of what they returned when captured, so that must live as long as they do.
    replay = [lambda graph=graph, _kept=kept: graph.replay() for graph in graphs]
    return Work(replay[0], (lambda _: replay[1]()) if work.backward else None)
