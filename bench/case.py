"""A case of bench/registry.py: one use of an op, and everyone who can do it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch


@dataclass
class Case:
    """One use of an op. Functions take `args` and return a tensor or several; gradients go to args that ask for one."""

    part: str
    shape: str
    args: tuple
    eager: Callable
    own: dict[str, Callable] = field(default_factory=dict)
    libraries: dict[str, Callable] = field(default_factory=dict)
    compiles: bool = True
    comparable: bool = True  # False: works in place, so that outputs cannot be compared
    bytes: tuple[int, int] = (0, 0)  # forward, backward
    flops: tuple[int, int] = (0, 0)

    @property
    def providers(self) -> dict[str, Callable]:
        """Everyone who can do it, by name."""
        compiled = {}
        if self.compiles:
            compiled["compiled"] = torch.compile(self.eager, dynamic=False)
        return {"eager": self.eager, **compiled, **self.libraries, **self.own}
