"""CUDA graphs on a CPU: a tape of dispatched ops stands in for a graph, and freezes what a real one freezes.

What is emulated. A capture computes nothing that stays: what it wrote into memory from outside is undone, and what it
made is poisoned. A replay runs the ops in their order on the same addresses; numbers, shapes and all that Python did
are those of the capture. Memory from outside must be there still. Memory of the pool, of all tapes and of runs outside
of them, is anybody's: it is poisoned before every replay, capture and run. Reading a value, and bringing in a tensor
that was made on the host, are errors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

aten = torch.ops.aten
READS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.is_nonzero.default, aten.equal.default}
EMPTY = ("aten::empty", "aten::new_empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty_strided")
HOST = ("aten::lift_fresh", "aten::lift", "aten::from_file")


@dataclass(frozen=True)
class Held:
    """A tensor by its address, shape and strides. Memory of the tape is kept; memory from outside is not."""

    owner: torch.UntypedStorage | None
    outside: StorageWeakRef | None
    dtype: torch.dtype
    layout: tuple

    def tensor(self) -> torch.Tensor:
        storage = self.owner
        if storage is None:
            assert self.outside is not None
            if self.outside.expired():
                raise RuntimeError("emulated graph: it reads memory that was freed")
            storage = torch.UntypedStorage._new_with_weak_ptr(self.outside.cdata)
        return torch.empty(0, dtype=self.dtype).set_(storage, *self.layout)


@dataclass
class Call:
    func: Callable
    args: tuple
    kwargs: dict
    fresh: list[tuple[int, Held]]  # place among the results, and where it is written


class Tape(TorchDispatchMode):
    """Runs and records. Use `finish` after it."""

    def __init__(self):
        super().__init__()
        self.calls: list[Call] = []
        self.owned: dict[int, torch.UntypedStorage] = {}
        self.before: dict[int, tuple[StorageWeakRef, torch.UntypedStorage]] = {}

    def held(self, tensor: torch.Tensor) -> Held:
        storage = tensor.untyped_storage()
        layout = (tensor.storage_offset(), tensor.size(), tensor.stride())
        if storage._cdata in self.owned:
            return Held(self.owned[storage._cdata], None, tensor.dtype, layout)
        return Held(None, StorageWeakRef(storage), tensor.dtype, layout)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name
        if func in READS or name in HOST:
            raise RuntimeError(f"emulated graph: {name} is not permitted in a capture")
        inputs = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
        for place, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                given = args[place] if place < len(args) else kwargs.get(argument.name)
                for tensor in tree_flatten(given)[0]:
                    self._remember(tensor)
        held = tree_map_only(torch.Tensor, self.held, (args, kwargs))
        out = func(*args, **kwargs)
        known = {x.untyped_storage()._cdata for x in inputs}
        fresh = []
        for place, result in enumerate(tree_flatten(out)[0]):
            if isinstance(result, torch.Tensor) and result.untyped_storage()._cdata not in known:
                storage = result.untyped_storage()
                self.owned[storage._cdata] = storage
                fresh.append((place, self.held(result)))
        writes = any(a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments)
        if (fresh or writes) and name not in EMPTY:
            self.calls.append(Call(func, *held, fresh))
        return out

    def _remember(self, tensor) -> None:
        if isinstance(tensor, torch.Tensor):
            storage = tensor.untyped_storage()
            if storage._cdata not in self.owned and storage._cdata not in self.before:
                self.before[storage._cdata] = (StorageWeakRef(storage), storage.clone())

    def finish(self) -> None:
        """Undo what was written into memory from outside."""
        for reference, content in self.before.values():
            if not reference.expired():
                torch.UntypedStorage._new_with_weak_ptr(reference.cdata).copy_(content)
        self.before.clear()

    def replay(self) -> None:
        with torch.no_grad():
            for call in self.calls:
                args, kwargs = tree_map_only(Held, Held.tensor, (call.args, call.kwargs))
                results = tree_flatten(call.func(*args, **kwargs))[0]
                for place, held in call.fresh:
                    held.tensor().copy_(results[place])


class Pooled(TorchDispatchMode):
    """Notes what a run outside of a tape takes from the pool."""

    def __init__(self, pool: dict[int, StorageWeakRef]):
        super().__init__()
        self.pool = pool

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {x.untyped_storage()._cdata for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for result in tree_flatten(out)[0]:
            if isinstance(result, torch.Tensor) and result.untyped_storage()._cdata not in known:
                self.pool[result.untyped_storage()._cdata] = StorageWeakRef(result.untyped_storage())
        return out


@dataclass
class EmulatedRecorder:
    """Stands in for engine.graphs.CUDARecorder."""

    tapes: list[Tape] = field(default_factory=list)
    pool: dict[int, StorageWeakRef] = field(default_factory=dict)
    free: float = 1.0
    replays: int = 0

    def poison(self) -> None:
        """Every byte of the pool: not a number in any float, an index that is none."""
        for tape in self.tapes:
            for storage in tape.owned.values():
                storage.fill_(255)
        for reference in self.pool.values():
            if not reference.expired():
                torch.UntypedStorage._new_with_weak_ptr(reference.cdata).fill_(255)
        self.pool = {key: reference for key, reference in self.pool.items() if not reference.expired()}

    def run(self, function):
        self.poison()
        with Pooled(self.pool):
            return function()

    def capture(self, function):
        self.poison()
        tape = Tape()
        try:
            with tape:
                result = function()
        finally:
            tape.finish()
        self.tapes.append(tape)
        self.poison()

        def replay():
            self.replays += 1
            self.poison()
            tape.replay()

        return replay, result

    def free_share(self) -> float:
        return self.free

    def reserved(self) -> int:
        return 0
