"""Where each rank's share of the optimiser lies, by ZeRO stage, and how the EMA gets from there into the averages.

DeepSpeed hands the optimiser whole parameters (stage 0), one flat fp32 slice per parameter group (stages 1 and 2), or
one flat fp32 slice per sub-group of parameters, each cut into equal shares (stage 3). A `Partition` says which elements
of which parameters such a tensor holds, so that checkpoints are written and read by parameter, whatever the stage and
the number of ranks. Written against DeepSpeed 0.19.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ijepa_fast.engine.optim import AdamWEMA


@dataclass(frozen=True)
class Fragment:
    """Elements [start, stop) of the flattened parameter `name`, at `offset` of a partition's tensor."""

    name: str
    start: int
    stop: int
    offset: int


@dataclass(frozen=True)
class Partition:
    """A tensor that the optimiser updates on this rank: fp32 weights `master`, of any shape, and what they are."""

    master: torch.Tensor
    fragments: list[Fragment]
    ema: bool
    clip: bool = True


@dataclass(frozen=True)
class Gradients:
    """Gradients of a group's parameters side by side, and what this rank updates with them.

    whole: (n,), all of them. parts: each in its parameter's shape, by name. updates: (fp32 weights, as in a Partition;
    their gradient, in `whole`; where the model computes with them, if that is elsewhere).
    """

    whole: torch.Tensor
    parts: dict[str, torch.Tensor]
    updates: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]


class Whole:
    """Stage 0: every rank updates whole parameters."""

    replicated = True

    def __init__(self, engine: Any, optimizer: AdamWEMA, groups: list[dict]):
        self._optimizer, self._groups = optimizer, groups
        self._weights: list[torch.Tensor] = []
        self.partitions: list[Partition] = []
        masters = getattr(engine.optimizer, "fp32_groups", None) or [group["params"] for group in groups]
        for group, owned in zip(groups, masters, strict=True):
            for name, weight, master in zip(group["names"], group["params"], owned, strict=True):
                whole = Fragment(name, 0, weight.numel(), 0)
                self.partitions.append(Partition(master, [whole], group["ema"], group["clip"]))
                self._weights.append(weight)

    def tie(self, targets: dict[str, torch.Tensor]) -> None:
        """Let the averages' parameters, by name, hold the EMA."""
        for partition in self.partitions:
            if partition.ema:
                self._optimizer.tie(partition.master, targets[partition.fragments[0].name].data)

    def clipped(self) -> list[torch.Tensor]:
        """Gradients that clipping counts, when a step of the optimiser begins."""
        return [p.master.grad for p in self.partitions if p.clip and p.master.grad is not None]

    def gather(self) -> None:
        """Bring all ranks' EMA into the averages: here it is there already."""

    def gradients(self) -> list[Gradients]:
        """Rooms for the gradients, zero."""
        found, partitions = [], iter(self.partitions)
        for group in self._groups:
            sizes = [_aligned(p.numel()) for p in group["params"]]
            whole = group["params"][0].new_zeros(sum(sizes), requires_grad=False)
            pieces = zip(group["names"], group["params"], whole.split(sizes), strict=True)
            parts = {name: piece[: p.numel()].view(p.shape) for name, p, piece in pieces}
            updates: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]] = []
            for name, weight in zip(group["names"], group["params"], strict=True):
                master = next(partitions).master
                updates.append((master, parts[name], None if master is weight else weight.data))
            found.append(Gradients(whole, parts, updates))
        return found

    def share_weights(self) -> None:
        """Bring what each rank updated to all others: here all updated the same."""

    @torch.no_grad()
    def publish(self) -> None:
        """Copy the masters into the weights the model computes with."""
        for weight, partition in zip(self._weights, self.partitions, strict=True):
            if partition.master is not weight:
                weight.copy_(partition.master)


class Flat:
    """Stages 1 and 2: a rank updates an equal slice of each group's concatenated parameters."""

    replicated = False

    def __init__(self, engine: Any, optimizer: AdamWEMA, groups: list[dict]):
        self._zero, self._optimizer, self._groups = engine.optimizer, optimizer, groups
        self._rank = _rank()
        self.partitions: list[Partition] = []
        self._offsets: list[dict[str, int]] = []
        self._averages: list[tuple[torch.Tensor, torch.Tensor]] = []
        for i, group in enumerate(groups):
            master = self._zero.single_partition_of_fp32_groups[i]
            first = self._zero.bit16_groups_flat[i].data_ptr()
            offsets, fragments = {}, []
            for name, weight in zip(group["names"], group["params"], strict=True):
                offsets[name] = (weight.data_ptr() - first) // weight.element_size()
                begin = offsets[name] - self._rank * master.numel()
                start, stop = max(0, -begin), min(weight.numel(), master.numel() - begin)
                if start < stop:
                    fragments.append(Fragment(name, start, stop, begin + start))
            self._offsets.append(offsets)
            self.partitions.append(Partition(master, fragments, group["ema"], group["clip"]))

    def tie(self, targets: dict[str, torch.Tensor]) -> None:
        """Lay the averages' parameters out as the networks' are, and let this rank's slices hold its EMA."""
        for i, partition in enumerate(self.partitions):
            if not partition.ema:
                continue
            sample = targets[self._groups[i]["names"][0]]
            whole = torch.zeros(self._zero.bit16_groups_flat[i].numel(), dtype=sample.dtype, device=sample.device)
            for name, offset in self._offsets[i].items():
                place = whole[offset : offset + targets[name].numel()].view_as(targets[name])
                place.copy_(targets[name].data)
                targets[name].data = place
            mine = whole[self._rank * partition.master.numel() :][: partition.master.numel()]
            self._optimizer.tie(partition.master, mine)
            self._averages.append((whole, mine))

    def clipped(self) -> list[torch.Tensor]:
        """This rank's gradients that clipping counts, when the first of them is to be clipped."""
        return _due(self._zero, self.partitions)

    def gather(self) -> None:
        """One all-gather per group, in place."""
        for whole, mine in self._averages:
            _all_gather(whole, mine)

    def gradients(self) -> list[Gradients]:
        """Rooms for the gradients, zero, laid out as the weights are."""
        found = []
        for i, (group, partition) in enumerate(zip(self._groups, self.partitions, strict=True)):
            whole = torch.zeros_like(self._zero.bit16_groups_flat[i])
            offsets = self._offsets[i]
            pairs = zip(group["names"], group["params"], strict=True)
            parts = {name: whole[offsets[name] :][: p.numel()].view(p.shape) for name, p in pairs}
            mine = whole.view(-1, partition.master.numel())[self._rank]
            found.append(Gradients(whole, parts, [(partition.master, mine, self._mine(i).data)]))
        return found

    def share_weights(self) -> None:
        """Bring what each rank updated to all others."""
        for i, whole in enumerate(self._zero.bit16_groups_flat):
            _all_gather(whole, self._mine(i))

    @torch.no_grad()
    def publish(self) -> None:
        """Copy the masters into the weights the model computes with, on every rank."""
        for i, partition in enumerate(self.partitions):
            self._mine(i).data.copy_(partition.master)
        self.share_weights()

    def _mine(self, group: int) -> torch.Tensor:
        """This rank's slice of the weights that the model computes with."""
        return self._zero.parallel_partitioned_bit16_groups[group][self._rank]


class Sharded:
    """Stage 3: parameters are cut into equal shares; a rank updates its shares of a sub-group of them, side by side."""

    replicated = False

    def __init__(self, engine: Any, optimizer: AdamWEMA, groups: list[dict]):
        self._zero, self._optimizer = engine.optimizer, optimizer
        self._rank = _rank()
        names = {id(p): name for group in groups for name, p in zip(group["names"], group["params"], strict=True)}
        self.partitions: list[Partition] = []
        self._shares: list[list[tuple[str, int, int]]] = []  # by sub-group: (name, offset, elements of a share)
        self._averages: list[tuple[torch.Tensor, list[tuple[torch.Tensor, int, int]]]] = []
        for i, params in enumerate(self._zero.fp16_groups):
            offset, shares, fragments = 0, [], []
            for param in params:
                name, share = names[id(param)], param.partition_numel()
                start, stop = self._rank * share, min((self._rank + 1) * share, param.ds_numel)
                if start < stop:
                    fragments.append(Fragment(name, start, stop, offset))
                shares.append((name, offset, share))
                offset += share
            master, group = self._zero.fp32_partitioned_groups_flat[i], groups[self._zero.sub_group_to_group_id[i]]
            self.partitions.append(Partition(master, fragments, group["ema"], group["clip"]))
            self._shares.append(shares)

    def tie(self, targets: dict[str, torch.Tensor]) -> None:
        """Let a buffer of all ranks' shares hold the EMA; the averages keep whole parameters."""
        for partition, shares in zip(self.partitions, self._shares, strict=True):
            if not partition.ema:
                continue
            sample = targets[shares[0][0]]
            ranks = torch.distributed.get_world_size()
            whole = torch.zeros(ranks, partition.master.numel(), dtype=sample.dtype, device=sample.device)
            for fragment in partition.fragments:
                values = targets[fragment.name].data.view(-1)[fragment.start : fragment.stop]
                whole[self._rank, fragment.offset : fragment.offset + values.numel()] = values
            self._optimizer.tie(partition.master, whole[self._rank])
            self._averages.append((whole, [(targets[name].data, offset, n) for name, offset, n in shares]))

    def clipped(self) -> list[torch.Tensor]:
        """This rank's gradients that clipping counts, when the first of them is to be clipped."""
        return _due(self._zero, self.partitions)

    def gather(self) -> None:
        """One all-gather per sub-group, then a copy of each parameter's shares into the averages."""
        for whole, pieces in self._averages:
            _all_gather(whole.view(-1), whole[self._rank])
            for target, offset, share in pieces:
                target.copy_(whole[:, offset : offset + share].reshape(-1)[: target.numel()].view_as(target))

    @torch.no_grad()
    def publish(self) -> None:
        """Copy the masters into the shares the model's weights are gathered from."""
        for i, partition in enumerate(self.partitions):
            self._zero.fp16_partitioned_groups_flat[i].data.copy_(partition.master)
        persistent = self._zero.persistent_parameters
        if persistent:
            persistent[0].partition(persistent)
            persistent[0].all_gather(persistent)


LAYOUTS: dict[int, type[Whole | Flat | Sharded]] = {0: Whole, 1: Flat, 2: Flat, 3: Sharded}


def _due(zero: Any, partitions: list[Partition]) -> list[torch.Tensor]:
    """Gradients of clipped partitions: DeepSpeed hands them to the optimiser one after the other."""
    found: list[torch.Tensor] = []
    for i, partition in enumerate(partitions):
        if partition.clip:
            held, mine = zero.averaged_gradients.get(i), partition.master.grad
            found += held if held is not None else [] if mine is None else [mine]
    return found


def _aligned(elements: int) -> int:
    return -(-elements // 64) * 64


def _rank() -> int:
    return torch.distributed.get_rank()


def _all_gather(whole: torch.Tensor, mine: torch.Tensor) -> None:
    if torch.distributed.get_world_size() > 1:
        torch.distributed.all_gather_into_tensor(whole, mine)
