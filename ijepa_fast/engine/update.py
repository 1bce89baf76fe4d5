"""A step whose gradients lie side by side: reduced, read where they lie by one pass of the optimiser, and shared.

With CUDA graphs a backward pass is one launch, in which no hook of DeepSpeed's can run; so what its hooks and its step
would do, each gradient copied four times, is done here on the same partitions: the trajectory is the same.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ijepa_fast.engine.graphs import Graphs, Recorder, Repeated
from ijepa_fast.engine.optim import AdamWEMA
from ijepa_fast.engine.partitions import Flat, Whole
from ijepa_fast.masks.draw import Draw
from ijepa_fast.methods.method import Method


class GraphStep:
    """Micro-steps and updates of a method, captured where they can be.

    Args:
        method, optimizer: on their device; layout: of ZeRO 0, 1 or 2.
        accumulation: micro-batches of a step.
        say, recorder: see `Graphs`. fp8: whether the method makes fp8 weights from its averages.
    """

    def __init__(
        self,
        method: Method,
        optimizer: AdamWEMA,
        layout: Whole | Flat,
        accumulation: int,
        say: Callable[[str], object],
        recorder: Recorder,
        fp8: bool = False,
    ):
        self.optimizer, self.layout, self.accumulation = optimizer, layout, accumulation
        self.rooms = layout.gradients()
        parts = {name: part for room in self.rooms for name, part in room.parts.items()}
        written = [room.whole for room in self.rooms]
        # Of several micro-batches the graphs write into another buffer, which is added up.
        self._totals = written if accumulation > 1 else []
        if accumulation > 1:
            self._written = [torch.zeros_like(whole) for whole in written]
            parts = {
                name: torch.as_strided(fresh, part.shape, part.stride(), part.storage_offset())
                for fresh, room in zip(self._written, self.rooms, strict=True)
                for name, part in room.parts.items()
            }
        names = [name for name, p in method.named_parameters() if p.requires_grad]
        self.graphs = Graphs(method, [parts[name] for name in names], 1 / accumulation, say, recorder)
        self._done = 0  # micro-batches of this step
        self._apply = Repeated(self._update, self.graphs)
        # Without fp8 weights of an average there is nothing to do, and no graph of that.
        refreshed = fp8 and method.averaged
        self._refresh = Repeated(method.average_changed, self.graphs) if refreshed else method.average_changed
        self._updates = [(i, *update) for i, room in enumerate(self.rooms) for update in room.updates]

    def backward(self, images: torch.Tensor, draw: Draw) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """As Engine.backward."""
        loss, terms = self.graphs(images, draw)
        if self.accumulation > 1:
            change = torch._foreach_copy_ if self._done == 0 else torch._foreach_add_
            change(self._totals, self._written)
        self._done += 1
        return loss, terms

    @property
    def at_boundary(self) -> bool:
        """Whether all micro-batches of a step are done."""
        return self._done == self.accumulation

    @torch.no_grad()
    def step(self) -> None:
        """Update weights and averages; the hyperparameters are those of the optimiser's groups."""
        self._done = 0
        self._reduce()
        if self.optimizer.squares is not None:
            norms = torch._foreach_norm([gradient for _, _, gradient, _ in self._updates], dtype=torch.float32)
            self.optimizer.squares += torch.stack(norms).double().square().sum()
        self.optimizer.advance(self._updates)
        self._apply()
        self.layout.share_weights()
        self.layout.gather()
        self._refresh()

    def _update(self) -> None:
        self.optimizer.apply(self._updates)

    def _reduce(self) -> None:
        """The mean over ranks: all of it at stage 0, this rank's slice otherwise."""
        ranks = torch.distributed.get_world_size()
        if ranks == 1:
            return
        for room in self.rooms:
            if self.layout.replicated:
                torch.distributed.all_reduce(room.whole)
                room.whole.div_(ranks)
            else:
                ((_, mine, _),) = room.updates
                torch.distributed.reduce_scatter_tensor(mine, room.whole)
                mine.div_(ranks)
