"""The registered ops in PyTorch on a CPU."""

from __future__ import annotations

import torch

from ijepa_fast.kernels.predictor_tokens import reference
from ijepa_fast.kernels.predictor_tokens.reference import predictor_readout as predictor_readout_fwd

__all__ = ["predictor_readout_bwd", "predictor_readout_fwd", "predictor_tokens_bwd", "predictor_tokens_fwd"]


def predictor_tokens_fwd(
    context: torch.Tensor,
    mask_token: torch.Tensor,
    positions: torch.Tensor,
    context_index: torch.Tensor,
    cu_seqlens: torch.Tensor,
    target_index: torch.Tensor,
    sequences: int,
    max_seqlen: int,
    patches: int,
) -> torch.Tensor:
    """As `reference.predictor_tokens`, which has no use for max_seqlen."""
    layout = (context_index, cu_seqlens, target_index, sequences)
    return reference.predictor_tokens(context, mask_token, positions, *layout, patches)


def predictor_tokens_bwd(
    dtokens: torch.Tensor,
    mask_token: torch.Tensor,
    cu_seqlens: torch.Tensor,
    tokens: int,
    targets: int,
    sequences: int,
    size: int,
    max_seqlen: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of context (T, D) and mask_token (D,)."""
    total = dtokens.unflatten(0, (targets, -1)).float().sum(0)
    dcontext = total[reference.context_rows(cu_seqlens, tokens, sequences, size)]
    dmask_token = total[reference.mask_rows(cu_seqlens, sequences, size)].sum(0)
    return dcontext.to(dtokens.dtype), dmask_token.to(mask_token.dtype)


def predictor_readout_bwd(
    dout: torch.Tensor, cu_seqlens: torch.Tensor, rows: int, targets: int, sequences: int, size: int, max_seqlen: int
) -> torch.Tensor:
    """The gradient of tokens (rows, D)."""
    dtokens = dout.new_zeros((targets, rows // targets, dout.shape[1]))
    dtokens[:, reference.mask_rows(cu_seqlens, sequences, size)] = dout.unflatten(0, (targets, -1))
    return dtokens.flatten(0, 1)
