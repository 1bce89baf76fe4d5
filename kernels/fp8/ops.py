"""fp8: checks, dispatch and registration. No backward: what runs in fp8 is not trained.

The products are torch._scaled_mm's on a GPU, cuBLASLt or CUTLASS with one scale per row of either operand.
"""

from __future__ import annotations

import torch

from ijepa_fast.kernels.common.checks import check_tensor
from ijepa_fast.kernels.common.dispatch import runs_triton
from ijepa_fast.kernels.common.library import register
from ijepa_fast.kernels.fp8 import cpu, reference
from ijepa_fast.kernels.fp8.reference import FP8

Quantised = tuple[torch.Tensor, torch.Tensor]


def quantise(x: torch.Tensor, out: Quantised | None = None) -> Quantised:
    """Rows in fp8, each with its scale.

    Args:
        x: (T, D) floating point.
        out: written and returned, where given: memory of an earlier result's shapes, dtypes and device.

    Returns:
        (values (T, D) float8_e4m3fn, scale (T,) fp32), x ~ scale * values; a row's largest magnitude becomes 448.

    Raises:
        ValueError: for a wrong dtype, shape, device or layout.
    """
    check_tensor("fp8.quantise", "x", x, (None, None))
    values, scale = out or _empty(x)
    check_tensor("fp8.quantise", "out's values", values, tuple(x.shape), FP8, x.device)
    check_tensor("fp8.quantise", "out's scale", scale, (x.shape[0],), torch.float32, x.device)
    (_quantise if runs_triton("fp8", x) else cpu.fp8_quantise)(x, values, scale)
    return values, scale


def layer_norm_quantise(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor, eps: float = 1e-6
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Residual add, LayerNorm and quantisation in one pass.

    Args:
        x: (T, D) floating point.
        residual: (T, D) in x's dtype, or None.
        weight: (D,) gain.
        bias: (D,) shift.
        eps: added to the variance.

    Returns:
        (values (T, D) float8_e4m3fn, scale (T,) fp32) of LN(s), and s = x + residual (T, D) in x's dtype.

    Raises:
        ValueError: for a wrong dtype, shape, device or layout.
    """
    check_tensor("fp8.layer_norm_quantise", "x", x, (None, None))
    for name, parameter in (("weight", weight), ("bias", bias)):
        check_tensor("fp8.layer_norm_quantise", name, parameter, (x.shape[1],), device=x.device)
    if residual is not None:
        check_tensor("fp8.layer_norm_quantise", "residual", residual, tuple(x.shape), x.dtype, x.device)
    if not runs_triton("fp8", x):
        return reference.layer_norm_quantise(x, residual, weight, bias, eps)
    if residual is None:
        return *_layer_norm(x, weight, bias, eps), x
    return _add_layer_norm(x, residual, weight, bias, eps)


def bias_gelu_quantise(x: torch.Tensor, bias: torch.Tensor) -> Quantised:
    """gelu(x + bias), the exact form, quantised in the same pass: x (T, F), bias (F,) -> as `quantise`.

    Raises ValueError for a wrong dtype, shape, device or layout.
    """
    check_tensor("fp8.bias_gelu_quantise", "x", x, (None, None))
    check_tensor("fp8.bias_gelu_quantise", "bias", bias, (x.shape[1],), device=x.device)
    return _bias_gelu(x, bias) if runs_triton("fp8", x) else reference.bias_gelu_quantise(x, bias)


def scaled_linear(
    x: Quantised, weight: Quantised, bias: torch.Tensor | None = None, dtype: torch.dtype = torch.bfloat16
) -> torch.Tensor:
    """The product of quantised rows with a quantised weight, summed in fp32.

    Args:
        x: (T, I) values and (T,) scales; I a multiple of 16.
        weight: (O, I) values and (O,) scales; O a multiple of 16.
        bias: (O,) or None, added by the product.
        dtype: of the result; bfloat16 on a GPU.

    Returns:
        (T, O).

    Raises:
        ValueError: for a wrong dtype, shape, device or layout, and sizes that are not multiples of 16.
    """
    (values, scale), (w, w_scale) = x, weight
    check_tensor("fp8.scaled_linear", "x", values, (None, None), FP8)
    check_tensor("fp8.scaled_linear", "weight", w, (None, values.shape[1]), FP8, values.device)
    check_tensor("fp8.scaled_linear", "x's scale", scale, (values.shape[0],), torch.float32, values.device)
    check_tensor("fp8.scaled_linear", "weight's scale", w_scale, (w.shape[0],), torch.float32, values.device)
    if w.shape[0] % 16 or w.shape[1] % 16:
        raise ValueError(f"fp8.scaled_linear: weight: expected sizes that are multiples of 16, got {tuple(w.shape)}")
    if not values.is_cuda:
        return reference.scaled_linear(values, scale, w, w_scale, bias, dtype)
    bias = None if bias is None else bias.to(dtype)
    return torch._scaled_mm(
        values, w.t(), scale[:, None], w_scale[None, :], bias=bias, out_dtype=dtype, use_fast_accum=True
    )


def _empty(x):
    return torch.empty_like(x, dtype=FP8), x.new_empty(x.shape[0], dtype=torch.float32)


_quantise = register(
    "fp8_quantise(Tensor x, Tensor(a!) values, Tensor(b!) scale) -> ()",
    cpu,
    fake=lambda x, values, scale: None,
)
_bias_gelu = register(
    "fp8_bias_gelu(Tensor x, Tensor bias) -> (Tensor values, Tensor scale)",
    cpu,
    fake=lambda x, bias: _empty(x),
)
_layer_norm = register(
    "fp8_layer_norm(Tensor x, Tensor weight, Tensor bias, float eps) -> (Tensor values, Tensor scale)",
    cpu,
    fake=lambda x, weight, bias, eps: _empty(x),
)
_add_layer_norm = register(
    "fp8_add_layer_norm(Tensor x, Tensor residual, Tensor weight, Tensor bias, float eps)"
    " -> (Tensor values, Tensor scale, Tensor s)",
    cpu,
    fake=lambda x, residual, weight, bias, eps: (*_empty(x), torch.empty_like(x)),
)
