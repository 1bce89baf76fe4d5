"""What a step draws on the host beside its images: index tensors, and whatever else is a function of the step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import numpy as np
import torch

ALIGNMENT = 16  # bytes
VARIES = {"varies": True}  # metadata of a field that no kernel of the step is launched with


@dataclass(frozen=True)
class Draw:
    """The draw of one micro-batch of B images. Kinds of draw add their fields: tensors, or plain values."""

    images: int  # B

    @property
    def tokens(self) -> int:
        """Tokens that pass through the networks, without padding."""
        raise NotImplementedError

    @property
    def shape(self) -> tuple:
        """All that the step's kernels are launched with, apart from the values in tensors."""
        values = (getattr(self, f.name) for f in fields(self) if not f.metadata.get("varies"))
        return tuple(x.shape if isinstance(x, torch.Tensor) else x for x in values)

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors by name."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        """The same draw with `change` made to every tensor."""
        changed: dict[str, Any] = {name: change(tensor) for name, tensor in self.tensors.items()}
        return replace(self, **changed)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """The same draw with its tensors on `device`; to another than the CPU in one copy."""
        if torch.device(device).type == "cpu":
            return self.map(lambda tensor: tensor.to(device))
        whole = self if self.buffer is not None else self.packed()
        assert whole.buffer is not None
        return whole._in(whole.buffer.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """The same draw with its tensors in pinned host memory, side by side."""
        whole = self.packed()
        assert whole.buffer is not None
        return whole._in(whole.buffer.pin_memory())

    def packed(self) -> Self:
        """A copy whose tensors lie side by side in one `buffer`."""
        tensors = self.tensors
        device = next(iter(tensors.values())).device if tensors else None
        copy = self._in(torch.zeros(sum(map(_room, tensors.values())), dtype=torch.uint8, device=device))
        for name, tensor in tensors.items():
            getattr(copy, name).copy_(tensor)
        return copy

    @property
    def buffer(self) -> torch.Tensor | None:
        """The bytes of all tensors, (n,) uint8, where they lie as `packed` lays them; else None."""
        tensors, end = [*self.tensors.values()], 0
        for tensor in tensors:
            place = tensor.storage_offset() * tensor.element_size()
            same = tensor.untyped_storage().data_ptr() == tensors[0].untyped_storage().data_ptr()
            if not (same and tensor.is_contiguous() and place == end):
                return None
            end += _room(tensor)
        if not tensors or tensors[0].untyped_storage().nbytes() != end:
            return None
        return torch.empty(0, dtype=torch.uint8, device=tensors[0].device).set_(tensors[0].untyped_storage())

    def _in(self, buffer: torch.Tensor) -> Self:
        """The draw whose tensors lie in `buffer`, with what is there."""
        views: dict[str, Any] = {}
        for (name, tensor), piece in zip(
            self.tensors.items(), buffer.split([*map(_room, self.tensors.values())]), strict=True
        ):
            views[name] = piece[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        return replace(self, **views)


def _room(tensor: torch.Tensor) -> int:
    """Bytes from one tensor's first to the next one's, so that all are aligned."""
    return -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT


def generators(images: int, seed: int, step: int, first: int) -> list[np.random.Generator]:
    """Of each image its own, by the image's place in the step: the first has the place `first`."""
    return [np.random.default_rng([seed, step, first + image]) for image in range(images)]


def chances(own: list[np.random.Generator], depth: int, sequences: int = 1) -> np.ndarray:
    """What decides whether a block's branch is dropped: uniform, (blocks, 2, sequences x B) fp32.

    own: the generator of each image.
    """
    drawn = [rng.random((depth, 2, sequences), dtype=np.float32) for rng in own]
    return np.stack(drawn, axis=-1).reshape(depth, 2, -1)


def int32(values: np.ndarray) -> torch.Tensor:
    """What kernels index with."""
    return torch.from_numpy(values.astype(np.int32))
