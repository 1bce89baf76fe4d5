"""LayerNorm and bias + GELU that write fp8 rows and their scales, in Triton: the bf16 row never reaches memory.

    s = x + residual, y = LN(s)         or         y = gelu(x + bias)         or         y = x
    scale = max |y| / 448 (1 for a row of zeros), values = y / scale in e4m3
A program holds one whole row, because its largest value is needed before the first can be written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ijepa_fast.kernels.common.aot import Case

LARGEST = tl.constexpr(448.0)
ROOT_HALF = tl.constexpr(0.7071067811865476)


@triton.jit
def _write_row(values_ptr, scale_ptr, row, y, columns, mask, D: tl.constexpr):
    """Quantise the fp32 row `y`, zero outside `mask`."""
    largest = tl.max(tl.abs(y), 0)
    scale = tl.where(largest > 0, largest / LARGEST, 1.0)
    values = tl.clamp(y / scale, -LARGEST, LARGEST)
    tl.store(values_ptr + row * D + columns, values.to(values_ptr.dtype.element_ty), mask=mask)
    tl.store(scale_ptr + row, scale)


@triton.jit
def _layer_norm_quantise_kernel(
    x_ptr,  # (T, D)
    residual_ptr,  # (T, D) or None
    weight_ptr,  # (D,)
    bias_ptr,  # (D,)
    values_ptr,  # (T, D) e4m3
    scale_ptr,  # (T,) fp32
    sum_ptr,  # (T, D) or None: x + residual
    eps,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < D
    s = tl.load(x_ptr + row * D + columns, mask=mask, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        s += tl.load(residual_ptr + row * D + columns, mask=mask, other=0.0).to(tl.float32)
        rounded = s.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + row * D + columns, rounded, mask=mask)
        s = rounded.to(tl.float32)
    mean = tl.sum(s, 0) / D
    centred = tl.where(mask, s - mean, 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 0) / D + eps)
    weight = tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    _write_row(values_ptr, scale_ptr, row, centred * rstd * weight + bias, columns, mask, D)


@triton.jit
def _quantise_kernel(
    x_ptr,  # (T, D)
    bias_ptr,  # (D,), to quantise gelu(x + bias), or None
    values_ptr,  # (T, D) e4m3
    scale_ptr,  # (T,) fp32
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < D
    y = tl.load(x_ptr + row * D + columns, mask=mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + columns, mask=mask, other=0.0).to(tl.float32)
        y = 0.5 * y * (1.0 + tl.erf(y * ROOT_HALF))
    _write_row(values_ptr, scale_ptr, row, y, columns, mask, D)


def _warps(width: int) -> int:
    return 4 if width <= 2048 else 8


def _options(width: int) -> dict:
    return {"D": width, "BLOCK": triton.next_power_of_2(width), "num_warps": _warps(width)}


def _outputs(x):
    rows, width = x.shape
    values = torch.empty((rows, width), dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(rows, dtype=torch.float32, device=x.device)
    return values, scale, _options(width)


def fp8_add_layer_norm(x, residual, weight, bias, eps):
    """(values, scale, s) of LN(s), s = x + residual; with residual None s is None."""
    values, scale, options = _outputs(x)
    total = None if residual is None else torch.empty_like(x)
    if x.shape[0]:
        _layer_norm_quantise_kernel[(x.shape[0],)](x, residual, weight, bias, values, scale, total, eps, **options)
    return values, scale, total


def fp8_layer_norm(x, weight, bias, eps):
    """(values, scale) of LN(x)."""
    return fp8_add_layer_norm(x, None, weight, bias, eps)[:2]


def fp8_bias_gelu(x, bias):
    """(values, scale) of gelu(x + bias)."""
    values, scale, options = _outputs(x)
    if x.shape[0]:
        _quantise_kernel[(x.shape[0],)](x, bias, values, scale, **options)
    return values, scale


def fp8_quantise(x, values, scale):
    """Write `values` and `scale` of x."""
    if x.shape[0]:
        _quantise_kernel[(x.shape[0],)](x, None, values, scale, **_options(x.shape[1]))


def aot_cases(capability: int = 9) -> list[Case]:
    """LayerNorm, the MLP's hidden layer and the weights of H/14. e4m3 needs sm_89 or later."""
    if capability < 9:
        return []
    types = {"values_ptr": "*fp8e4nv", "scale_ptr": "*fp32"}
    cases = (
        ("fp8_layer_norm D=1280", _layer_norm_quantise_kernel, 1280, {}),
        ("fp8_bias_gelu D=5120", _quantise_kernel, 5120, {}),
        ("fp8_quantise D=1280", _quantise_kernel, 1280, {"bias_ptr": None}),
    )
    return [
        Case(name, kernel, {"D": width, "BLOCK": triton.next_power_of_2(width), **absent}, _warps(width), types=types)
        for name, kernel, width, absent in cases
    ]
