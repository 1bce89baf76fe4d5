"""What a step draws on the host beside its images: index tensors, and whatever else is a function of the step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch

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
        """The same draw with its tensors on `device`."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """The same draw with its tensors in pinned host memory."""
        return self.map(torch.Tensor.pin_memory)
