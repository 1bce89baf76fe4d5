"""Repairs of Triton's interpreter (3.6 at least), which runs the kernels on CPU tensors.

- A loop to a number known at run time makes an int of a one-element array, which numpy >= 2.4 refuses.
- fp32 is truncated to bf16, where a GPU rounds to nearest even.
- `tl.dot` multiplies the bit patterns of bf16 operands as integers.
- fp32 that rounds up to a power of two becomes half of it in fp8.
"""

from __future__ import annotations

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def repair() -> None:
    """Install the repairs, once per process."""
    patch_lang_tensor, cast, dot, to_fp = (
        interpreter._patch_lang_tensor,
        InterpreterBuilder.cast_impl,
        InterpreterBuilder.create_dot,
        InterpreterBuilder.create_fp_to_fp,
    )

    def patch_lang_tensor_for_loops(tensor, scope):
        patch_lang_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def cast_rounding(self, source, to):
        if (source.dtype.scalar, to.scalar) == (tl.float32, tl.bfloat16):
            return TensorHandle(_bf16_bits(source.data), tl.bfloat16)
        if (source.dtype.scalar, to.scalar) == (tl.bfloat16, tl.float32):
            return TensorHandle(_fp32(source.data), tl.float32)
        return cast(self, source, to)

    def dot_of_values(self, a, b, *rest):
        a, b = (TensorHandle(_fp32(x.data), tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return dot(self, a, b, *rest)

    def fp_to_fp_rounding(self, source, to, *rest):
        if (source.dtype.scalar, to.scalar) == (tl.float32, tl.float8e4nv):
            values = torch.from_numpy(np.ascontiguousarray(source.data)).to(torch.float8_e4m3fn)
            return TensorHandle(values.view(torch.uint8).numpy(), to.scalar)
        return to_fp(self, source, to, *rest)

    interpreter._patch_lang_tensor = patch_lang_tensor_for_loops
    InterpreterBuilder.cast_impl = cast_rounding
    InterpreterBuilder.create_dot = dot_of_values
    InterpreterBuilder.create_fp_to_fp = fp_to_fp_rounding


def _bf16_bits(values: np.ndarray) -> np.ndarray:
    bits = values.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def _fp32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)
