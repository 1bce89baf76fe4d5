"""What bench/aot.py compiles ahead of time: kernels at the shapes of published models, their types by argument name."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

# Of the arguments that kernels have in common; other tensors are bf16, other numbers int32.
TYPES = {"eps": "fp32", "mean_ptr": "*fp32", "rstd_ptr": "*fp32", "partial_ptr": "*fp32", "index_ptr": "*i32"}


@dataclass(frozen=True)
class Case:
    """One kernel to compile.

    constants: values of constexpr arguments, None for a tensor that is not given. types: of arguments that are neither
    in TYPES nor bf16 tensors (named `_ptr`) nor int32, as Triton writes them, ":16" behind a multiple of 16.
    """

    name: str
    kernel: Any
    constants: dict[str, Any]
    warps: int
    stages: int = 3
    types: dict[str, str] = field(default_factory=dict)

    def signature(self) -> dict[str, str]:
        """The type of every argument that is no constant."""
        usual = {name: "*bf16" if name.endswith("_ptr") else "i32" for name in self.kernel.arg_names}
        types = usual | TYPES | self.types
        return {name: types[name] for name in self.kernel.arg_names if name not in self.constants}
