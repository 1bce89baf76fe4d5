"""predictor_tokens and predictor_readout: checks, dispatch, autograd and registration."""

from __future__ import annotations

from typing import Protocol

import torch

from ijepa_fast.kernels.common.checks import check_index, check_sequences, check_tensor
from ijepa_fast.kernels.common.dispatch import runs_triton
from ijepa_fast.kernels.common.library import register
from ijepa_fast.kernels.predictor_tokens import cpu, reference


class Layout(Protocol):
    """What the ops read of a step's masks: `ijepa_fast.masks.packing.MaskDraw` has it."""

    @property
    def images(self) -> int:
        """B."""

    @property
    def patches(self) -> int:
        """N, of an image."""

    @property
    def targets(self) -> int:
        """M, target blocks per image."""

    @property
    def target_size(self) -> int:
        """K, patches of a target block."""

    @property
    def sequences(self) -> int:
        """C*B, contexts of the batch."""

    @property
    def context_index(self) -> torch.Tensor:
        """(T,) int32, rows image * N + patch."""

    @property
    def context_cu_seqlens(self) -> torch.Tensor:
        """(C*B + 1,) int32, or longer: what is behind is padding."""

    @property
    def context_max_seqlen(self) -> int:
        """no context is longer."""

    @property
    def target_index(self) -> torch.Tensor:
        """(M, B, K) int32, rows as above."""


def predictor_tokens(
    context: torch.Tensor, mask_token: torch.Tensor, positions: torch.Tensor, draw: Layout
) -> torch.Tensor:
    """The predictor's input: for every target block, the context tokens and the block's mask tokens, with positions.

    Args:
        context: (T, D) floating point, in the order of `draw.context_index`.
        mask_token: (D,) floating point.
        positions: (N, D) floating point, fixed: no gradient flows to them.
        draw: the step's masks (`ijepa_fast.masks.packing.MaskDraw`), on context's device.

    Returns:
        (S, D) in context's dtype, S = M*(T + C*B*K), laid out by `draw.predictor_cu_seqlens`; T counts padding. The
        backward sums the M copies of each context row, and all mask rows, in a fixed order.

    Raises:
        ValueError: for a wrong dtype, shape, device or layout, or positions that require a gradient; on the CPU and in
            debug mode for a context_cu_seqlens that does not end at T; in debug mode for indices outside the batch.
    """
    width, device = context.shape[-1], context.device
    check_tensor("predictor_tokens", "context", context, (draw.context_index.shape[0], None))
    check_tensor("predictor_tokens", "mask_token", mask_token, (width,), device=device)
    check_tensor("predictor_tokens", "positions", positions, (draw.patches, width), device=device)
    if positions.requires_grad:
        raise ValueError(
            "predictor_tokens: positions: expected a fixed table, got a tensor that requires a gradient; detach it"
        )
    _check_draw("predictor_tokens", draw, device)
    layout = (draw.context_index, draw.context_cu_seqlens, draw.target_index, draw.sequences)
    if not runs_triton("predictor_tokens", context):
        return reference.predictor_tokens(context, mask_token, positions, *layout, draw.patches)
    return _Tokens.apply(context, mask_token, positions, *layout, draw.context_max_seqlen, draw.patches)


def predictor_readout(tokens: torch.Tensor, draw: Layout) -> torch.Tensor:
    """The rows of the mask tokens.

    Args:
        tokens: (S, D) floating point, laid out as by `predictor_tokens`.
        draw: as for `predictor_tokens`, on tokens' device.

    Returns:
        (M*C*B*K, D), rows ordered (m, c, b, k), bit for bit; the backward writes zeros to the other rows.

    Raises:
        ValueError: for a wrong dtype, shape, device or layout.
    """
    rows = draw.targets * (draw.context_index.shape[0] + draw.sequences * draw.target_size)
    check_tensor("predictor_readout", "tokens", tokens, (rows, None))
    _check_draw("predictor_readout", draw, tokens.device)
    layout = (draw.context_cu_seqlens, draw.targets, draw.sequences, draw.target_size)
    if not runs_triton("predictor_tokens", tokens):
        return reference.predictor_readout(tokens, *layout)
    return _Readout.apply(tokens, *layout, draw.context_max_seqlen)


def _check_draw(op: str, draw: Layout, device: torch.device) -> None:
    target_shape = (draw.targets, draw.images, draw.target_size)
    check_tensor(op, "draw.context_index", draw.context_index, (None,), torch.int32, device)
    check_tensor(op, "draw.context_cu_seqlens", draw.context_cu_seqlens, (None,), torch.int32, device)
    if draw.context_cu_seqlens.shape[0] <= draw.sequences:
        raise ValueError(
            f"{op}: draw.context_cu_seqlens: expected at least {draw.sequences + 1} values, got "
            f"{draw.context_cu_seqlens.shape[0]}"
        )
    check_tensor(op, "draw.target_index", draw.target_index, target_shape, torch.int32, device)
    check_index(op, "draw.context_index", draw.context_index, draw.images * draw.patches)
    check_index(op, "draw.target_index", draw.target_index, draw.images * draw.patches)
    check_sequences(
        op,
        "draw.context_cu_seqlens",
        draw.context_cu_seqlens,
        draw.context_index.shape[0],
        "draw.context_max_seqlen",
        draw.context_max_seqlen,
    )


class _Tokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx, context, mask_token, positions, context_index, cu_seqlens, target_index, *sizes):
        ctx.save_for_backward(mask_token, cu_seqlens)
        targets, _, size = target_index.shape
        sequences, max_seqlen, _ = sizes
        ctx.sizes = (context.shape[0], targets, sequences, size, max_seqlen)
        return _fwd(context, mask_token, positions, context_index, cu_seqlens, target_index, *sizes)

    @staticmethod
    def backward(ctx, dtokens):
        gradients = _bwd(dtokens.contiguous(), *ctx.saved_tensors, *ctx.sizes)
        return *gradients, None, None, None, None, None, None, None


class _Readout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tokens, cu_seqlens, targets, sequences, size, max_seqlen):
        ctx.save_for_backward(cu_seqlens)
        ctx.sizes = (tokens.shape[0], targets, sequences, size, max_seqlen)
        return _readout_fwd(tokens, cu_seqlens, targets, sequences, size)

    @staticmethod
    def backward(ctx, dout):
        return _readout_bwd(dout.contiguous(), *ctx.saved_tensors, *ctx.sizes), None, None, None, None, None


def _fwd_fake(context, mask_token, positions, context_index, cu_seqlens, target_index, sequences, *_):
    targets, _, size = target_index.shape
    return context.new_empty((targets * (context.shape[0] + sequences * size), context.shape[1]))


_fwd = register(
    "predictor_tokens_fwd(Tensor context, Tensor mask_token, Tensor positions, Tensor context_index, Tensor cu_seqlens,"
    " Tensor target_index, SymInt sequences, SymInt max_seqlen, SymInt patches) -> Tensor",
    cpu,
    fake=_fwd_fake,
)
_bwd = register(
    "predictor_tokens_bwd(Tensor dtokens, Tensor mask_token, Tensor cu_seqlens, SymInt tokens, SymInt targets, "
    "SymInt sequences, SymInt size, SymInt max_seqlen) -> (Tensor dcontext, Tensor dmask_token)",
    cpu,
    fake=lambda dtokens, mask_token, cu_seqlens, tokens, *_: (
        dtokens.new_empty((tokens, dtokens.shape[1])),
        torch.empty_like(mask_token),
    ),
)
_readout_fwd = register(
    "predictor_readout_fwd(Tensor tokens, Tensor cu_seqlens, SymInt targets, SymInt sequences, SymInt size) -> Tensor",
    cpu,
    fake=lambda tokens, cu_seqlens, targets, sequences, size: tokens.new_empty(
        (targets * sequences * size, tokens.shape[1])
    ),
)
_readout_bwd = register(
    "predictor_readout_bwd(Tensor dout, Tensor cu_seqlens, SymInt rows, SymInt targets, SymInt sequences, SymInt size, "
    "SymInt max_seqlen) -> Tensor",
    cpu,
    fake=lambda dout, cu_seqlens, rows, *_: dout.new_empty((rows, dout.shape[1])),
)
