"""The vision transformer of I-JEPA: one set of weights, run on packed tokens (context) or densely (target).

Shapes: B images, N patches an image, T packed tokens, U rows used, D width, H heads, P patch side, W padded patch row.

A block hands on its residual stream and the branch that is still to be added to it, so that the addition and the next
LayerNorm are one pass over memory. A parameter is used only in the `forward` of its module: ZeRO-3 gathers it there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from ijepa_fast.kernels.bias_gelu import bias_gelu
from ijepa_fast.kernels.layer_norm import layer_norm
from ijepa_fast.kernels.linear import linear, linear_gelu
from ijepa_fast.kernels.masked_gather import masked_gather
from ijepa_fast.kernels.varlen_attention import dense_attention, varlen_attention, varlen_attention_qkv
from ijepa_fast.masks.packing import PackedBatch
from ijepa_fast.models.positions import sincos_2d

# name: (width, depth, heads, MLP ratio), as published
ARCHITECTURES = {
    "vit_tiny": (192, 12, 3, 4.0),
    "vit_small": (384, 12, 6, 4.0),
    "vit_base": (768, 12, 12, 4.0),
    "vit_large": (1024, 24, 16, 4.0),
    "vit_huge": (1280, 32, 16, 4.0),
    "vit_giant": (1408, 40, 16, 48 / 11),
}


@dataclass(frozen=True)
class Sequences:
    """Where the sequences lie in the tokens, and which rows' outputs are wanted.

    cu_seqlens (n+1,) int32 and max_seqlen: packed tokens. images: dense ones, all of equal length.
    select: picks the wanted rows, (T, D) -> (U, D); they lie in sequences of query_cu_seqlens (n+1,), query_max_seqlen.
    """

    cu_seqlens: torch.Tensor | None = None
    max_seqlen: int = 0
    images: int | None = None
    select: Callable[[torch.Tensor], torch.Tensor] | None = None
    query_cu_seqlens: torch.Tensor | None = None
    query_max_seqlen: int = 0


class LayerNorm(nn.LayerNorm):
    """LayerNorm over D, preceded by the residual addition where a branch is given."""

    def forward(self, x: torch.Tensor, branch: torch.Tensor | None = None):
        """`x` (T, D) -> LN(x); with `branch` (T, D) -> (LN(x + branch), x + branch)."""
        return layer_norm(x, self.weight, self.bias, self.eps, branch)


class Linear(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x` (T, I) -> (T, O)."""
        return linear(x, self.weight, self.bias)


class QKV(nn.Linear):
    """The joint projection to queries, keys and values; queries may be asked for on some rows only."""

    def forward(self, x: torch.Tensor, selected: torch.Tensor | None = None):
        """`x` (T, D) -> (T, 3D); with `selected` rows (U, D) -> their queries (U, D), all keys-values (T, 2D)."""
        if selected is None:
            return linear(x, self.weight, self.bias)
        width = x.shape[1]
        queries = linear(selected, self.weight[:width], self.bias[:width])
        return queries, linear(x, self.weight[width:], self.bias[width:])


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = QKV(dim, 3 * dim)
        self.proj = Linear(dim, dim)

    def forward(self, x: torch.Tensor, sequences: Sequences) -> torch.Tensor:
        """`x` (T, D) normalised tokens -> (T, D), or (U, D) when `sequences` asks for some rows only."""
        head_dim = x.shape[1] // self.heads
        if sequences.select is not None:
            queries, keys_values = self.qkv(x, sequences.select(x))
            keys, values = keys_values.view(-1, 2, self.heads, head_dim).unbind(1)
            queries = queries.view(-1, self.heads, head_dim)
            out = varlen_attention(
                queries,
                keys,
                values,
                sequences.query_cu_seqlens,
                sequences.cu_seqlens,
                sequences.query_max_seqlen,
                sequences.max_seqlen,
            )
        elif sequences.images is not None:
            out = dense_attention(self.qkv(x).view(sequences.images, -1, 3, self.heads, head_dim))
        else:
            qkv = self.qkv(x).view(-1, 3, self.heads, head_dim)
            out = varlen_attention_qkv(qkv, sequences.cu_seqlens, sequences.max_seqlen)
        return self.proj(out.reshape(-1, x.shape[1]))


class LinearGELU(nn.Linear):
    """Linear, then exact GELU."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x` (T, D) -> (T, F)."""
        return linear_gelu(x, self.weight, self.bias, bias_gelu)


class MLP(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = LinearGELU(dim, hidden)
        self.fc2 = Linear(hidden, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.fc1(x))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float, eps: float = 1e-6):
        super().__init__()
        self.norm1 = LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, heads)
        self.norm2 = LayerNorm(dim, eps=eps)
        self.mlp = MLP(dim, int(dim * mlp_ratio))

    def forward(self, x: torch.Tensor, branch: torch.Tensor | None, sequences: Sequences):
        """Residual stream `x` (T, D), `branch` (T, D) to add to it -> the same two, (U, D) if rows are selected."""
        normed, x = (self.norm1(x), x) if branch is None else self.norm1(x, branch)
        branch = self.attn(normed, sequences)
        if sequences.select is not None:
            x = sequences.select(x)
        normed, x = self.norm2(x, branch)
        return x, self.mlp(normed)


def run_blocks(blocks, norm, x, branch, sequences, last=None, recompute=False) -> torch.Tensor:
    """All `blocks` and the final `norm`: (T, D) -> (T, D), or (U, D) where `last` describes the last block's rows."""
    for i, block in enumerate(blocks):
        layout = last if last is not None and i == len(blocks) - 1 else sequences
        if recompute and torch.is_grad_enabled():
            # Nothing is random; and a CUDA graph could not capture the reading of the generator's state.
            x, branch = checkpoint(block, x, branch, layout, use_reentrant=False, preserve_rng_state=False)
        else:
            x, branch = block(x, branch, layout)
    return norm(x, branch)[0]


def compile_blocks(*networks: nn.Module, **options) -> None:
    """Let torch.compile take every Block of `networks`, one by one; `options` are its own.

    Blocks of one kind share their code, so depth costs no compilation, and token counts are run-time values. A step has
    eight kinds: first, inner and last block of the target encoder, first and inner of the context encoder, first, inner
    and last of the predictor. Dynamo's limit of eight would send the ninth, of a probe say, back to eager unasked.
    """
    torch._dynamo.config.recompile_limit = max(32, torch._dynamo.config.recompile_limit)
    for network in networks:
        for module in network.modules():
            if isinstance(module, Block):
                module.compile(**{"dynamic": True} | options)


class PatchEmbed(nn.Module):
    """The patch-embedding convolution, stored as one and applied as a matrix product to patches."""

    def __init__(self, patch: int, dim: int):
        super().__init__()
        self.proj = PatchLinear(3, dim, kernel_size=patch, stride=patch)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """`patches` (T, W), W >= 3*P*P with zeros behind -> (T, D)."""
        return self.proj(patches)


class PatchLinear(nn.Conv2d):
    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """See `PatchEmbed.forward`."""
        weight = self.weight.flatten(1)
        padding = patches.shape[1] - weight.shape[1]
        return linear(patches, F.pad(weight, (0, padding)) if padding else weight, self.bias)


class Encoder(nn.Module):
    """ViT without class token and with fixed positions. State-dict names are the published code's.

    Args:
        image_size: side of the square crop, pixels; divisible by `patch`.
        patch: side of a patch, pixels.
        dim, depth, heads, mlp_ratio: the architecture; see ARCHITECTURES.
        recompute: keep only each block's input for the backward pass (activation checkpointing).
    """

    def __init__(self, image_size, patch, dim, depth, heads, mlp_ratio=4.0, recompute=False):
        super().__init__()
        if image_size % patch:
            raise ValueError(
                f"data.crop={image_size} is not divisible by model.patch={patch}; set data.crop to a multiple of it"
            )
        if dim % heads:
            raise ValueError(f"model.heads={heads} does not divide model.dim={dim}: choose a number of heads that does")
        self.image_size, self.patch, self.dim = image_size, patch, dim
        self.grid = (image_size // patch, image_size // patch)
        self.recompute = recompute
        self.patch_embed = PatchEmbed(patch, dim)
        self.register_buffer("positions", sincos_2d(dim, self.grid), persistent=False)
        self.blocks = nn.ModuleList([Block(dim, heads, mlp_ratio) for _ in range(depth)])
        self.norm = LayerNorm(dim, eps=1e-6)

    @property
    def patches(self) -> int:
        """Patches an image, N."""
        return self.grid[0] * self.grid[1]

    def context(self, patches: torch.Tensor, packed: PackedBatch) -> torch.Tensor:
        """Embeds only the kept `patches` (B*N, W) -> context tokens (T, D) in packed order, final norm applied."""
        x = self.patch_embed(masked_gather(patches, packed.context_index))
        positions = masked_gather(self.positions.to(x.dtype), packed.context_index % self.patches)
        sequences = Sequences(packed.context_cu_seqlens, packed.context_max_seqlen)
        return run_blocks(self.blocks, self.norm, x, positions, sequences, recompute=self.recompute)

    def targets(self, patches: torch.Tensor, packed: PackedBatch, inner=None) -> torch.Tensor:
        """Dense encoding of which only the target rows are wanted: `patches` (B*N, W) -> (U, D), order of union_index.

        The last block computes queries, attention output and MLP for those rows alone. `inner` stand in for the blocks
        before it (models/fp8.py).
        """
        images, device = packed.images, patches.device
        last = Sequences(
            cu_seqlens=torch.arange(images + 1, dtype=torch.int32, device=device) * self.patches,
            max_seqlen=self.patches,
            select=partial(masked_gather, index=packed.union_index, unique=True),
            query_cu_seqlens=packed.union_cu_seqlens,
            query_max_seqlen=packed.union_max_seqlen,
        )
        blocks = self.blocks if inner is None else [*inner, self.blocks[-1]]
        return run_blocks(blocks, self.norm, *self._embed(patches, images), Sequences(images=images), last)

    def forward(self, patches: torch.Tensor, images: int) -> torch.Tensor:
        """Dense encoding of whole images: `patches` (B*N, W) -> (B*N, D), final norm applied."""
        return run_blocks(self.blocks, self.norm, *self._embed(patches, images), Sequences(images=images))

    def layers(self, patches: torch.Tensor, images: int, count: int) -> list[torch.Tensor]:
        """Outputs (B*N, D) of the last `count` blocks, without the final norm: what the paper's probe concatenates."""
        x, branch = self._embed(patches, images)
        outputs = []
        for block in self.blocks:
            x, branch = block(x, branch, Sequences(images=images))
            outputs.append(x + branch)
        return outputs[-count:]

    def _embed(self, patches: torch.Tensor, images: int):
        x = self.patch_embed(patches).view(images, self.patches, self.dim) + self.positions.to(patches.dtype)
        return x.view(-1, self.dim), None


INIT_STD = 0.02


def init_weights(module: nn.Module) -> None:
    """Published initialisation: truncated normal .02 for every weight matrix, biases 0, LayerNorm 1 and 0."""
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        nn.init.trunc_normal_(module.weight, std=INIT_STD)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)
