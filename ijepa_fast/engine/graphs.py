"""A method's forward and backward as CUDA graphs: one pair for every shape of batch that comes again.

A step launches two thousand kernels, and from Python that takes longer than they run. A graph launches them at once,
but only for the shapes it was captured with; so token counts are padded to buckets (masks/packing.py), the first batch
of a shape runs as it is, which compiles and warms up, the second is captured, and all later ones are replayed.

Captured graphs share one pool of memory, so that all of them need no more than the largest. What one leaves there is
gone with the next replay: gradients are therefore copied into a buffer of their own, and what `watch` is given too.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ijepa_fast.masks.draw import Draw
from ijepa_fast.methods.method import Method

MOST = 512  # graphs kept; further shapes run without
ALIGNMENT = 64  # elements


@dataclass
class Shared:
    """What all graphs share: the stream of their capture, and memory."""

    stream: torch.cuda.Stream
    images: torch.Tensor
    gradients: torch.Tensor  # of all parameters side by side, see `Graphs.parts`
    seed: torch.Tensor  # (), the gradient of the loss
    pool: Any = None
    features: torch.Tensor | None = None  # (B*N, D), in its first rows what `watch` is given


@dataclass
class Pair:
    """The graphs of one shape of batch, and the memory they read and write."""

    shared: Shared
    draw: Draw
    forward: torch.cuda.CUDAGraph
    backward: torch.cuda.CUDAGraph
    loss: torch.Tensor
    terms: dict[str, torch.Tensor]
    watched: torch.Tensor | None  # (U, D), what `watch` is given

    def load(self, images: torch.Tensor, draw: Draw) -> None:
        """Bring a batch to where the graphs read it."""
        self.shared.images.copy_(images, non_blocking=True)
        torch._foreach_copy_([*self.draw.tensors.values()], [*draw.tensors.values()], non_blocking=True)


class Graphs:
    """Stands in for the `forward` of a method on a GPU: (images, draw) -> (scalar loss, its terms).

    Every backward pass must follow its forward pass, before the next one. The parameters of the method and of its
    averages must be of one dtype and stay where they are.
    """

    def __init__(self, method: Method):
        self.method, self.run = method, method.forward
        self.params = [p for p in method.parameters() if p.requires_grad]
        self.pairs: dict[tuple, Pair] = {}
        self._seen: set[tuple] = set()
        self._shared: Shared | None = None

    def __call__(self, images: torch.Tensor, draw: Draw) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss, with a gradient where gradients are on; see the class."""
        shape = (images.shape, *draw.shape)
        if not torch.is_grad_enabled():
            return self.run(images, draw)
        if shape not in self.pairs:
            if shape not in self._seen or len(self.pairs) >= MOST:
                self._seen.add(shape)
                return self.run(images, draw)
            self.pairs[shape] = self._capture(images, draw)
        pair = self.pairs[shape]
        pair.load(images, draw)
        loss = _Replay.apply(self, pair, *self.params)
        if pair.watched is not None and self.method.watch is not None:
            self.method.watch(pair.watched, draw)
        return loss, {name: term.clone() for name, term in pair.terms.items()}

    def parts(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """Of all gradients side by side, each in its parameter's shape."""
        pieces = flat.split([*map(_room, self.params)])
        return [piece[: p.numel()].view(p.shape) for piece, p in zip(pieces, self.params, strict=True)]

    def backward(self, pair: Pair, dloss: torch.Tensor) -> list[torch.Tensor]:
        """Gradients of the parameters, in memory of their own."""
        pair.shared.seed.copy_(dloss)
        pair.backward.replay()
        return self.parts(pair.shared.gradients.clone())

    def _capture(self, images: torch.Tensor, draw: Draw) -> Pair:
        if self._shared is None:
            flat = self.params[0].new_empty(sum(map(_room, self.params)))
            seed = torch.ones((), device=images.device)
            self._shared = Shared(torch.cuda.Stream(images.device), torch.empty_like(images), flat, seed)
        shared, here = self._shared, torch.cuda.current_stream()
        draw = draw.map(torch.clone)
        shared.images.copy_(images)
        watch, watched = self.method.watch, None
        seen: list[torch.Tensor] = []
        forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        # Other threads, a decoder's, may allocate meanwhile: only this one's calls are watched.
        capture = partial(torch.cuda.graph, stream=shared.stream, capture_error_mode="thread_local")
        try:
            self.method.watch = None if watch is None else lambda features, _: seen.append(features)
            shared.stream.wait_stream(here)
            with torch.cuda.stream(shared.stream):  # the libraries make their workspaces for the stream
                torch.autograd.grad(self.run(shared.images, draw)[0], self.params)
            here.wait_stream(shared.stream)
            if seen:
                watched = room = self._room_for(shared, seen[0], draw)
                self.method.watch = lambda features, _: room.copy_(features)
            with capture(forward, pool=shared.pool):
                loss, terms = self.run(shared.images, draw)
            shared.pool = forward.pool()
            with capture(backward, pool=shared.pool):
                gradients = torch.autograd.grad(loss, self.params, shared.seed)
                torch._foreach_copy_(self.parts(shared.gradients), gradients)
        finally:
            self.method.watch = watch
        return Pair(shared, draw, forward, backward, loss.detach(), terms, watched)

    def _room_for(self, shared: Shared, features: torch.Tensor, draw: Draw) -> torch.Tensor:
        """Where a graph leaves what `watch` is given."""
        if shared.features is None:
            shared.features = features.new_empty((draw.images * self.method.encoder.patches, features.shape[1]))
        return shared.features[: len(features)]


def _room(param: torch.Tensor) -> int:
    """Elements from one gradient's first to the next one's, so that all are aligned."""
    return -(-param.numel() // ALIGNMENT) * ALIGNMENT


class _Replay(torch.autograd.Function):
    """So that gradients arrive at the parameters as from any backward pass, and DeepSpeed's hooks run."""

    @staticmethod
    def forward(ctx: Any, graphs: Graphs, pair: Pair, *params: torch.Tensor) -> torch.Tensor:
        ctx.graphs, ctx.pair = graphs, pair
        pair.forward.replay()
        return pair.loss.clone()

    @staticmethod
    def backward(ctx: Any, dloss: torch.Tensor) -> tuple:
        return None, None, *ctx.graphs.backward(ctx.pair, dloss)
