"""CAE's latent regressor: mask tokens look at what the encoder made of the visible patches, and at each other.

Shapes: B images of N patches, V of them visible and K masked; D encoder width, E regressor width, H heads.
"""

from __future__ import annotations

import torch
from torch import nn

from ijepa_fast.kernels.linear import linear
from ijepa_fast.kernels.varlen_attention import varlen_attention
from ijepa_fast.models.blocks import EPS, MLP, LayerNorm, Linear
from ijepa_fast.models.layouts import Dense
from ijepa_fast.models.positions import sincos_2d


class Product(nn.Linear):
    """A linear layer without a bias of its own."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """`x` (T, I), `bias` (O,) -> (T, O)."""
        return linear(x, self.weight, bias)


class CrossAttention(nn.Module):
    """Attention of queries to other tokens. Keys have no bias."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))
        self.q, self.k, self.v = Product(dim, dim), Product(dim, dim), Product(dim, dim)
        self.proj = Linear(dim, dim)

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        ends: tuple[torch.Tensor, torch.Tensor],
        gain: torch.Tensor,
    ) -> torch.Tensor:
        """Normalised `q` (B*K, E), `k` and `v` (B*N, E) -> (B*K, E) times `gain` (E,).

        ends: (B + 1,) int32 of the queries' and of the keys' sequences, which are of equal length.
        """
        count = len(ends[0]) - 1
        queries, keys, values = (
            product(x, bias).view(len(x), self.heads, -1)
            for product, x, bias in ((self.q, q, self.q_bias), (self.k, k, None), (self.v, v, self.v_bias))
        )
        out = varlen_attention(queries, keys, values, ends[0], ends[1], len(q) // count, len(k) // count)
        return self.proj(out.reshape(len(q), -1), gain)


class CrossBlock(nn.Module):
    """Cross-attention, then an MLP of what a norm makes of the stream: the norm takes the stream's place."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float, layer_scale: float):
        super().__init__()
        self.gamma_1_cross = nn.Parameter(torch.full((dim,), layer_scale))
        self.gamma_2_cross = nn.Parameter(torch.full((dim,), layer_scale))
        self.norm1_q, self.norm1_k, self.norm1_v, self.norm2_cross = (LayerNorm(dim, eps=EPS) for _ in range(4))
        self.cross_attn = CrossAttention(dim, heads)
        self.mlp_cross = MLP(dim, int(dim * mlp_ratio))

    def forward(
        self,
        x: torch.Tensor,
        visible: torch.Tensor,
        positions: tuple[torch.Tensor, torch.Tensor],
        ends: tuple[torch.Tensor, torch.Tensor],
        masked: Dense,
    ) -> torch.Tensor:
        """Masked tokens `x` (B*K, E), `visible` ones (B*V, E) -> (B*K, E).

        positions: of the masked ones (B*K, E), and of visible and masked ones of each image (B*N, E). They are added to
        queries and keys. ends: as in CrossAttention. masked: the layout of the masked ones.
        """
        both = join(visible, x, masked.count)
        queries, keys = self.norm1_q(x, positions[0])[0], self.norm1_k(both, positions[1])[0]
        branch = self.cross_attn(queries, keys, self.norm1_v(both), ends, self.gamma_1_cross)
        x = self.norm2_cross(x, masked.scale(branch, 0))[0]
        return x + masked.scale(self.mlp_cross(x, self.gamma_2_cross), 1)


class Regressor(nn.Module):
    """From the encoder's visible patches to latents of the masked ones.

    Args:
        grid: (rows, columns) of patches.
        encoder_dim: D; dim: E; depth, heads, mlp_ratio: the architecture.
        layer_scale: what the branches' gains begin as.
    """

    positions: torch.Tensor  # (N, E), of the decoder too

    def __init__(
        self,
        grid: tuple[int, int],
        encoder_dim: int,
        dim: int,
        depth: int,
        heads: int,
        mlp_ratio: float = 4.0,
        layer_scale: float = 0.1,
    ):
        super().__init__()
        narrows = dim != encoder_dim
        self.embed = Linear(encoder_dim, dim) if narrows else None
        self.embed_norm = LayerNorm(dim, eps=EPS) if narrows else None
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.register_buffer("positions", sincos_2d(dim, grid, row_first=True), persistent=False)
        self.regressor_blocks = nn.ModuleList([CrossBlock(dim, heads, mlp_ratio, layer_scale) for _ in range(depth)])
        self.norm = LayerNorm(dim, eps=EPS)

    def narrowed(self, x: torch.Tensor) -> torch.Tensor:
        """What the encoder gave (T, D) -> (T, E)."""
        return x if self.embed is None or self.embed_norm is None else self.embed_norm(self.embed(x))

    def forward(
        self,
        visible: torch.Tensor,
        positions: tuple[torch.Tensor, torch.Tensor],
        ends: tuple[torch.Tensor, torch.Tensor],
        keep: list[torch.Tensor | None] | None = None,
    ) -> torch.Tensor:
        """`visible` (B*V, E), narrowed -> latents (B*K, E) of the masked patches, final norm applied.

        positions, ends: as in CrossBlock. keep: of each block.
        """
        images = len(ends[0]) - 1
        x = self.mask_token[0].to(visible.dtype).repeat(len(positions[0]), 1)
        for number, block in enumerate(self.regressor_blocks):
            x = block(x, visible, positions, ends, Dense(images, None if keep is None else keep[number]))
        return self.norm(x)


def join(first: torch.Tensor, second: torch.Tensor, count: int) -> torch.Tensor:
    """Sequences `first` (I*n, D) and `second` (I*m, D), `count` = I of each, one behind the other: (I*(n + m), D)."""
    parts = [x.view(count, -1, x.shape[1]) for x in (first, second)]
    return torch.cat(parts, dim=1).flatten(0, 1)
