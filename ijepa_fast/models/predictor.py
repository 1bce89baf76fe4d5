"""The predictor: a narrow ViT over each target block's context and mask tokens.

Shapes: T context tokens, S = all predictor tokens, R = M*C*B*K mask tokens, D encoder width, Dp predictor width.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import nn

from ijepa_fast.kernels.masked_gather import masked_gather
from ijepa_fast.kernels.predictor_tokens import predictor_readout, predictor_tokens
from ijepa_fast.masks.packing import MaskDraw
from ijepa_fast.models.blocks import EPS, Block, LayerNorm, Linear, run_blocks
from ijepa_fast.models.layouts import Packed, Rows
from ijepa_fast.models.positions import sincos_2d


class Predictor(nn.Module):
    """From context tokens to the features of the masked patches. State-dict names are the published code's.

    Args:
        grid: (rows, columns) of patches.
        encoder_dim: D; dim: Dp; depth, heads, mlp_ratio: the architecture (heads are the encoder's).
        out_dim: width of a prediction; encoder_dim unless given.
        recompute: keep only each block's input for the backward pass.
    """

    positions: torch.Tensor  # (N, Dp)

    def __init__(
        self,
        grid: tuple[int, int],
        encoder_dim: int,
        dim: int,
        depth: int,
        heads: int,
        mlp_ratio: float = 4.0,
        out_dim: int | None = None,
        recompute: bool = False,
    ):
        super().__init__()
        if dim % heads:
            raise ValueError(
                f"model.heads={heads} does not divide model.predictor_dim={dim}: choose a width that is a multiple"
            )
        self.recompute = recompute
        self.predictor_embed = Linear(encoder_dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.register_buffer("positions", sincos_2d(dim, grid), persistent=False)
        self.predictor_blocks = nn.ModuleList([Block(dim, heads, mlp_ratio) for _ in range(depth)])
        self.predictor_norm = LayerNorm(dim, eps=EPS)
        self.predictor_proj = Linear(dim, out_dim or encoder_dim)

    def forward(self, context: torch.Tensor, draw: MaskDraw) -> torch.Tensor:
        """`context` (T, D) in packed order -> predictions (R, out_dim), rows ordered (m, c, b, k).

        The last block computes queries, attention output and MLP for the mask tokens alone. With a loss on visible
        tokens it computes all, and behind the predictions there are those of `draw.visible_rows`.
        """
        positions = self.positions.to(context.dtype)
        tokens = predictor_tokens(self.predictor_embed(context), self.mask_token.view(-1), positions, draw)
        sequences = Packed(draw.predictor_cu_seqlens, draw.predictor_max_seqlen)
        pick, last = partial(predictor_readout, draw=draw), None
        if draw.visible_rows is None:
            last = replace(sequences, rows=Rows(pick, draw.predictor_query_cu_seqlens, draw.target_size))
        x = run_blocks(
            self.predictor_blocks, self.predictor_norm, tokens, None, sequences, last=last, recompute=self.recompute
        )
        if draw.visible_rows is not None:
            x = torch.cat([pick(x), masked_gather(x, draw.visible_rows, unique=True)])
        return self.predictor_proj(x)
