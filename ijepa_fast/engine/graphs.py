"""A method's micro-steps as CUDA graphs: one for every shape of batch that comes again.

A step launches two thousand kernels, and from Python that takes longer than they run. A graph launches them at once,
but only for the shapes it was captured with; so token counts are padded to few buckets (masks/packing.py). The first
batch of a shape runs as it is, which compiles and warms up; the second is captured, and all later ones are replayed.

All of it takes its memory from one pool, the largest batch first, so that the pool is as large as that batch needs.
What lies there is gone with the next micro-step: loss and terms are therefore copied out, what `watch` is given is its
until it returns, and the gradients lie in buffers of their own (engine/update.py).

The first graph of a run is verified: the same batch launched and replayed must give the same. Where it does not, or
anything fails, the run goes on without graphs and says so once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch

from ijepa_fast.masks.draw import Draw
from ijepa_fast.methods.method import Method

MOST = 256  # graphs kept; further shapes run without
FREE = 0.1  # share of the device's memory that no further graph is captured below
# Largest relative differences between a launched and a replayed step: loss, and gradient by parameter.
BOUNDS = {torch.float32: (1e-5, 1e-3), torch.bfloat16: (1e-3, 2e-2)}
T = TypeVar("T")
# Loss, its terms, and what `watch` is given, (U, D), where it is set.
Result = tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor | None]


class Recorder(Protocol):
    """What captures and replays. Tests put an emulation in the place of `CUDARecorder`."""

    def run(self, function: Callable[[], T]) -> T:
        """The result of `function`, launched as it is, from the graphs' memory and on their stream."""

    def capture(self, function: Callable[[], T]) -> tuple[Callable[[], None], T]:
        """(a replay of `function`, its result, which is there after each replay)."""

    def free_share(self) -> float:
        """Share of the device's memory that is free."""

    def reserved(self) -> int:
        """Bytes that the process holds on the device."""


class CUDARecorder:
    """Captures as CUDA graphs, which share one pool of memory and one stream."""

    def __init__(self, device: torch.device):
        self.device, self.stream, self.pool = device, torch.cuda.Stream(device), torch.cuda.MemPool()

    def run(self, function: Callable[[], T]) -> T:
        """See `Recorder`."""
        here = torch.cuda.current_stream()
        self.stream.wait_stream(here)
        # The pool serves this thread alone, so the backward pass must not run in another.
        with (
            torch.cuda.stream(self.stream),
            torch.cuda.use_mem_pool(self.pool),
            torch.autograd.set_multithreading_enabled(False),
        ):
            result = function()
        here.wait_stream(self.stream)
        return result

    def capture(self, function: Callable[[], T]) -> tuple[Callable[[], None], T]:
        """See `Recorder`."""
        graph = torch.cuda.CUDAGraph()
        # Other threads, a decoder's, may allocate meanwhile: only this one's calls are watched.
        options: dict[str, Any] = {"stream": self.stream, "capture_error_mode": "thread_local", "pool": self.pool.id}
        with torch.cuda.graph(graph, **options), torch.autograd.set_multithreading_enabled(False):
            result = function()
        return graph.replay, result

    def free_share(self) -> float:
        """See `Recorder`."""
        free, total = torch.cuda.mem_get_info(self.device)
        held = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return (free + held) / total

    def reserved(self) -> int:
        """See `Recorder`."""
        return torch.cuda.memory_reserved(self.device)


@dataclass
class Captured:
    """The graph of one shape of batch, and the memory it reads and writes."""

    replay: Callable[[], None]
    images: torch.Tensor
    draw: Draw
    result: Result

    def load(self, images: torch.Tensor, draw: Draw) -> None:
        """Bring a batch to where the graph reads it."""
        self.images.copy_(images, non_blocking=True)
        if self.draw.buffer is not None and draw.buffer is not None:
            self.draw.buffer.copy_(draw.buffer, non_blocking=True)
        else:
            torch._foreach_copy_([*self.draw.tensors.values()], [*draw.tensors.values()], non_blocking=True)


class Graphs:
    """Runs micro-steps of a method: (images, draw) -> (scalar loss, its terms), detached.

    Args:
        method: its parameters and those of its averages stay where they are from now on.
        gradients: receive the gradient of each trained parameter, in the order of `method.parameters()`.
        share: of the loss that is differentiated, 1 over the micro-batches of a step.
        say: told once why graphs are not used, where they are not.
        recorder: captures and replays.
    """

    def __init__(
        self,
        method: Method,
        gradients: Sequence[torch.Tensor],
        share: float,
        say: Callable[[str], object],
        recorder: Recorder,
    ):
        self.method, self.gradients, self.say, self.recorder = method, list(gradients), say, recorder
        self.params = [p for p in method.parameters() if p.requires_grad]
        self.seed = self.params[0].new_full((), share, dtype=torch.float32)
        self.captured: dict[tuple, Captured] = {}
        self.off = self.full = False
        self.steps = self.replayed = 0
        self._seen: set[tuple] = set()
        self._images: dict[torch.Size, torch.Tensor] = {}

    def __call__(self, images: torch.Tensor, draw: Draw) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """One micro-step."""
        self.steps += 1
        shape = (images.shape, *draw.shape)
        if not self.off and not self._seen:
            self._reserve(images, draw)
        if self.off:
            result = self._launch(images, draw)
        elif shape not in self.captured and (shape not in self._seen or self._is_full()):
            self._seen.add(shape)
            result = self.recorder.run(lambda: self._launch(images, draw))
        elif shape not in self.captured and not self._capture(shape, images, draw):
            result = self._launch(images, draw)
        else:
            batch = self.captured[shape]
            batch.load(images, draw)
            batch.replay()
            self.replayed += 1
            result = batch.result
        loss, terms, watched = result
        if watched is not None and self.method.watch is not None:
            self.method.watch(watched, draw)
        return loss.clone(), {name: term.clone() for name, term in terms.items()}

    def record(self) -> dict[str, float]:
        """For the log: share of the micro-steps since the last call that were replayed, shapes captured, GB held."""
        share = self.replayed / max(1, self.steps)
        self.steps = self.replayed = 0
        return {"replayed": share, "shapes": len(self.captured), "gigabytes": self.recorder.reserved() / 1e9}

    def give_up(self, why: str) -> None:
        """Launch everything from now on, and say why."""
        self.off = True
        self.captured.clear()
        self.say(f"engine.cuda_graphs: {why}; from now on steps are launched without graphs")

    def _launch(self, images: torch.Tensor, draw: Draw) -> Result:
        # `watch` is called outside: what it keeps must not come from the pool.
        watch, seen = self.method.watch, []
        if watch is not None:
            self.method.watch = lambda features, _: seen.append(features)
        try:
            loss, terms = self.method(images, draw)
        finally:
            self.method.watch = watch
        gradients = torch.autograd.grad(loss, self.params, self.seed, allow_unused=True, materialize_grads=True)
        torch._foreach_copy_(self.gradients, gradients)
        return loss.detach(), terms, seen[0] if seen else None

    def _is_full(self) -> bool:
        if not self.full and (len(self.captured) >= MOST or self.recorder.free_share() < FREE):
            self.full = True
            self.say(
                f"engine.cuda_graphs: {len(self.captured)} shapes are captured, and no more are for want of "
                f"{'room' if len(self.captured) >= MOST else 'memory'}; further ones are launched"
            )
        return self.full

    def _reserve(self, images: torch.Tensor, draw: Draw) -> None:
        """Run a batch as large as they come, so that later ones find their memory."""
        largest = self.method.largest(draw)
        if largest is None:
            return
        try:
            self.recorder.run(lambda: self._launch(images, largest.to(images.device)))
        except torch.OutOfMemoryError:
            self.give_up("the largest batch does not fit into memory")

    def _capture(self, shape: tuple, images: torch.Tensor, draw: Draw) -> bool:
        """Capture this shape of batch; whether that went well."""
        expected = None
        try:
            if not self.captured:
                loss, *_ = self.recorder.run(lambda: self._launch(images, draw))
                expected = [loss.clone(), *(gradient.clone() for gradient in self.gradients)]
            batch = self._captured_batch(images, draw)
            if expected is not None:
                batch.load(images, draw)
                batch.replay()
                if difference := self._difference(expected, [batch.result[0], *self.gradients]):
                    self.give_up(f"a replayed step differs from a launched one, {difference}")
                    return False
        except RuntimeError as error:
            self.give_up(f"a step cannot be captured ({str(error).splitlines()[0]})")
            return False
        self.captured[shape] = batch
        return True

    def _captured_batch(self, images: torch.Tensor, draw: Draw) -> Captured:
        held = draw.packed()
        if images.shape not in self._images:
            self._images[images.shape] = images.clone()
        given = self._images[images.shape]
        replay, result = self.recorder.capture(lambda: self._launch(given, held))
        return Captured(replay, given, held, result)

    def _difference(self, launched: list[torch.Tensor], replayed: list[torch.Tensor]) -> str | None:
        """What differs by more than rounding, or None. Waits for the device."""
        bounds = BOUNDS[self.params[0].dtype]
        apart = [torch.linalg.vector_norm(a - b, dtype=torch.float32) for a, b in zip(launched, replayed, strict=True)]
        sizes = torch._foreach_norm(launched, dtype=torch.float32)
        loss, *others = (torch.stack(apart) / torch.stack(sizes).clamp_min(1e-30)).tolist()
        if not loss <= bounds[0]:
            return f"the loss by {loss:.1e} of it"
        # Of a tensor whose gradient is nothing but rounding, the difference is measured by the whole gradient's.
        whole = float(torch.stack(sizes[1:]).square().mean().sqrt())
        for param_size, relative in zip(torch.stack(sizes[1:]).tolist(), others, strict=True):
            if not relative * param_size <= bounds[1] * max(param_size, 1e-3 * whole):
                return f"a gradient by {relative:.1e} of it"
        return None


class Repeated:
    """A function without arguments that is launched once, captured at its second call and replayed from then on."""

    def __init__(self, function: Callable[[], None], graphs: Graphs):
        self.function, self.graphs, self.calls = function, graphs, 0
        self._replay: Callable[[], None] | None = None

    def __call__(self) -> None:
        """Launch or replay."""
        self.calls += 1
        if self._replay is None and self.calls > 1 and not self.graphs.off:
            try:
                self._replay, _ = self.graphs.recorder.capture(self.function)
            except RuntimeError as error:
                self.graphs.give_up(f"the update cannot be captured ({str(error).splitlines()[0]})")
        self.function() if self._replay is None else self._replay()
