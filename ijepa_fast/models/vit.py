"""The vision transformer of every method: one set of weights, run on packed tokens or on whole images.

Shapes: B images, N patches per image, T packed tokens, U rows used, D width, H heads, P patch side, W padded patch row.

A parameter is used only in the `forward` of its module: ZeRO-3 gathers it there.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ijepa_fast.data import Size, size_of
from ijepa_fast.kernels.masked_gather import masked_gather
from ijepa_fast.masks.blocks import PatchDraw
from ijepa_fast.masks.packing import MaskDraw
from ijepa_fast.models.blocks import EPS, Block, LayerNorm, measure, run_blocks
from ijepa_fast.models.layouts import Biased, Dense, Packed, Rows, keep_branches
from ijepa_fast.models.patch_embed import PatchEmbed
from ijepa_fast.models.positions import sincos_2d
from ijepa_fast.models.relative import RelativePositions


class Encoder(nn.Module):
    """ViT. State-dict names are the published code's.

    Args:
        image_size: side of the square crop, or height and width, pixels; divisible by `patch`.
        patch: side of a patch, pixels.
        dim, depth, heads, mlp_ratio: the architecture; see config.ARCHITECTURES.
        class_token: a learned token before the patches.
        learned_positions: instead of the fixed table, in which the class token's position is zero.
        resampling: what is added to the patches along another crop, for the scale by which learned positions are
            resampled: as DINO and iBOT published it; in MSN nothing.
        relative_positions: a bias on attention scores, shared by all blocks, in place of the fixed table (BEiT). It
            needs a class token.
        mask_token: a learned embedding that stands in for masked patches, see `embed`.
        layer_scale: what learned gains of every branch begin as; 0: there are none.
        key_bias: whether keys have a bias.
        drop_path: share of a branch dropped in the last block, rising linearly from 0 at the first; see `keep`.
        readout: what `forward` gives, "patches" or "class".
        channels: of an image.
        recompute: keep only each block's input for the backward pass (activation checkpointing).
    """

    positions: torch.Tensor  # (N, D), the fixed table, where positions are not learned
    # Where set, an fp32 scalar for the mean square of the last block's output before the final norm, of the last call
    # of `targets`, `some`, `masked_layers` or `class_tokens`.
    measured: torch.Tensor | None = None

    def __init__(
        self,
        image_size: int | Size,
        patch: int,
        dim: int,
        depth: int,
        heads: int,
        mlp_ratio: float = 4.0,
        *,
        class_token: bool = False,
        learned_positions: bool = False,
        resampling: float = 0.1,
        relative_positions: bool = False,
        mask_token: bool = False,
        layer_scale: float = 0.0,
        key_bias: bool = True,
        drop_path: float = 0.0,
        readout: str = "patches",
        channels: int = 3,
        recompute: bool = False,
    ):
        super().__init__()
        size = size_of(image_size)
        if size[0] % patch or size[1] % patch:
            raise ValueError(
                f"data.crop={image_size} is not divisible by model.patch={patch}; set data.crop to a multiple of it"
            )
        if dim % heads:
            raise ValueError(f"model.heads={heads} does not divide model.dim={dim}: choose a number of heads that does")
        if relative_positions and not class_token:
            raise ValueError("relative_positions: expected a class token beside them, got none")
        if readout == "class" and not class_token:
            raise ValueError("readout: expected 'patches', for there is no class token, got 'class'")
        self.image_size, self.patch, self.dim = size, patch, dim
        self.grid = (size[0] // patch, size[1] // patch)  # (rows, columns) of patches
        self.readout, self.drop_path, self.recompute, self.resampling = readout, drop_path, recompute, resampling
        extra = int(class_token)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if class_token else None
        self.pos_embed = nn.Parameter(torch.zeros(1, extra + self.patches, dim)) if learned_positions else None
        self.masked_embed = nn.Parameter(torch.zeros(1, dim)) if mask_token else None
        self.patch_embed = PatchEmbed(patch, dim, channels)
        self.rel_pos_bias = RelativePositions(self.grid, heads) if relative_positions else None
        if not learned_positions and not relative_positions:
            self.register_buffer("positions", sincos_2d(dim, self.grid), persistent=False)
        self.blocks = nn.ModuleList([Block(dim, heads, mlp_ratio, EPS, layer_scale, key_bias) for _ in range(depth)])
        self.norm = LayerNorm(dim, eps=EPS)

    @property
    def kind(self) -> dict[str, Any]:
        """The options of BEiT's kind of encoder that it was made with; of layer_scale only whether there is one."""
        names = {name for name, _ in self.named_parameters()}
        return {
            "relative_positions": self.rel_pos_bias is not None,
            "layer_scale": float("blocks.0.gamma_1" in names),
            "key_bias": "blocks.0.attn.qkv.bias" in names,
        }

    @property
    def patches(self) -> int:
        """Patches per image, N."""
        return self.grid[0] * self.grid[1]

    def context(self, patches: torch.Tensor, draw: MaskDraw) -> torch.Tensor:
        """Embed only the kept `patches` (B*N, W) -> context tokens (T, D) in packed order, final norm applied.

        With a class token each context has one before its patches, and all contexts must be of one length.
        """
        if self.cls_token is not None:
            return self.some(patches, draw.context_index, draw.context_places, draw.sequences)
        x = self.patch_embed(masked_gather(patches, draw.context_index))
        positions = masked_gather(self.positions.to(x.dtype), draw.context_places)
        sequences = Packed(draw.context_cu_seqlens, draw.context_max_seqlen)
        return run_blocks(self.blocks, self.norm, x, positions, sequences, recompute=self.recompute)

    def some(
        self,
        patches: torch.Tensor,
        index: torch.Tensor,
        places: torch.Tensor,
        count: int,
        keep: list[torch.Tensor | None] | None = None,
    ) -> torch.Tensor:
        """Embed only the `patches` (B*N, W) of rows `index` (I*k,) int32, which are at `places` of their images, as
        `count` = I sequences of equal length behind a class token -> (I*(1 + k), D), final norm applied.

        keep: see `keep`.
        """
        x = self.patch_embed(masked_gather(patches, index))
        x = (x + masked_gather(self.positions.to(x.dtype), places)).view(count, -1, self.dim)
        x = self._with_class_token(x).flatten(0, 1)
        return run_blocks(self.blocks, self.norm, x, None, Dense(count), None, self.recompute, keep, self.measured)

    def targets(
        self, patches: torch.Tensor, draw: MaskDraw, inner: Iterable[Callable] | None = None, layers: int = 1
    ) -> torch.Tensor:
        """Dense encoding of which only the target rows are wanted: `patches` (B*N, W) -> (U, D), order of union_index.

        The last block computes queries, attention output and MLP for those rows alone, unless there is a class token.
        `inner` stand in for the blocks before it (models/fp8.py). layers: 1 for the final norm's output; more: the mean
        of so many last blocks' outputs, each normalised without gain and shift.
        """
        pick = partial(masked_gather, index=draw.union_index, unique=True)
        if self.cls_token is not None:
            if layers == 1:
                return pick(self(patches, draw.images, "patches"))
            return mean_of_normal([pick(output) for output in self.layers(patches, draw.images, layers)])
        rows = Rows(pick, draw.union_cu_seqlens, draw.union_max_seqlen)
        last = Packed(draw.dense_cu_seqlens, self.patches, rows)
        blocks: Iterable[Callable] = self.blocks if inner is None else [*inner, self.blocks[-1]]
        if layers == 1:
            embedded, dense = self.embed(patches), Dense(draw.images)
            return run_blocks(blocks, self.norm, embedded, None, dense, last, measured=self.measured)
        x, branch, outputs, depth = self.embed(patches), None, [], len(self.blocks)
        for number, block in enumerate(blocks, start=1):
            x, branch = block(x, branch, last if number == depth else Dense(draw.images))
            if number > depth - layers:
                outputs.append(x + branch if number == depth else pick(x) + pick(branch))
        measure(outputs[-1], self.measured)
        return mean_of_normal(outputs)

    def forward(self, patches: torch.Tensor, images: int, readout: str | None = None) -> torch.Tensor:
        """Whole images, `patches` (B*N, W) -> the read-out, final norm applied: (B*N, D), of a class token (B, D).

        readout: instead of the encoder's own.
        """
        x = self.embed(patches)
        x = run_blocks(self.blocks, self.norm, x, None, self._whole(images), recompute=self.recompute)
        return self._read_out(x, images, readout or self.readout)

    def layers(self, patches: torch.Tensor, images: int, count: int) -> list[torch.Tensor]:
        """Read-outs of the last `count` blocks, without the final norm: what the paper's probe concatenates."""
        x, branch = self.embed(patches), None
        outputs, sequences = [], self._whole(images)
        for block in self.blocks:
            x, branch = block(x, branch, sequences)
            outputs.append(x + branch)
        return [self._read_out(output, images, self.readout) for output in outputs[-count:]]

    def masked(self, patches: torch.Tensor, draw: PatchDraw) -> torch.Tensor:
        """Images whose masked patches are hidden, `patches` (B*N, W) -> features of these (R, D), final norm applied.

        In training the draw's branches are dropped. The last block computes the masked patches alone.
        """
        keep = self.keep(draw.chance) if self.training and draw.chance is not None else None
        whole = Biased(draw.images, self._bias())
        last = replace(whole, rows=draw.rows)
        x = self.embed(patches, mask=draw.mask)
        return run_blocks(self.blocks, self.norm, x, None, whole, last, self.recompute, keep)

    def masked_layers(self, patches: torch.Tensor, draw: PatchDraw, chosen: Collection[int]) -> list[torch.Tensor]:
        """Whole images, nothing hidden -> outputs (R, D) of the `chosen` blocks at masked patches, without final norm.

        What comes after the last of them, and its other rows, is not computed.
        """
        x, branch = self.embed(patches), None
        outputs, whole = [], Biased(draw.images, self._bias())
        wanted = replace(whole, rows=draw.rows)
        for number, block in enumerate(self.blocks[: max(chosen) + 1]):
            final = number == max(chosen)
            x, branch = block(x, branch, wanted if final else whole)
            if number in chosen:
                outputs.append(x + branch if final else wanted.select(x) + wanted.select(branch))
        if max(chosen) + 1 == len(self.blocks):
            measure(outputs[-1], self.measured)
        return outputs

    def _whole(self, images: int) -> Dense | Biased:
        """The layout of whole images."""
        return Dense(images) if self.rel_pos_bias is None else Biased(images, self._bias())

    def _bias(self) -> torch.Tensor | None:
        """The bias (H, n, n) of the attention scores, where there is one."""
        return None if self.rel_pos_bias is None else self.rel_pos_bias()

    def class_tokens(
        self,
        tokens: torch.Tensor,
        cu_seqlens: torch.Tensor,
        max_seqlen: int,
        keep: list[torch.Tensor | None] | None = None,
    ) -> torch.Tensor:
        """Embedded `tokens` (T, D) of I packed sequences -> their class tokens (I, D), final norm applied.

        cu_seqlens: (I + 1,) int32. The last block computes the class tokens alone. keep: see `keep`.
        """
        pick = partial(masked_gather, index=cu_seqlens[:-1], unique=True)
        ends = torch.arange(len(cu_seqlens), dtype=torch.int32, device=cu_seqlens.device)
        sequences = Packed(cu_seqlens, max_seqlen)
        last = replace(sequences, rows=Rows(pick, ends, 1))
        return run_blocks(self.blocks, self.norm, tokens, None, sequences, last, self.recompute, keep, self.measured)

    def embed(
        self,
        patches: torch.Tensor,
        grid: tuple[int, int] | None = None,
        mask: torch.Tensor | None = None,
        kept: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Tokens of crops, with positions: `patches` (I*n, W) -> (I*n, D), or (I*(1 + n), D) with a class token.

        grid: of the crops, where it is not the training's. mask: (I*n,) bool, patches to replace by the mask token.
        kept: (k,) int64 places, where only these patches of every crop are embedded; k stands for n then.
        """
        grid = grid or self.grid
        count = grid[0] * grid[1]
        if kept is not None:
            patches, count = patches.unflatten(0, (-1, count))[:, kept].flatten(0, 1), len(kept)
        x = self.patch_embed(patches)
        if mask is not None:
            x = torch.where(mask[:, None], self.get_parameter("masked_embed").to(x.dtype), x)
        x = self._with_class_token(x.view(-1, count, self.dim))
        if self.pos_embed is None and self.rel_pos_bias is not None:
            return x.flatten(0, 1)
        table = self._positions(grid).to(x.dtype)
        if kept is not None:
            extra = x.shape[1] - count
            table = torch.cat([table[..., :extra, :], table[..., extra:, :].index_select(-2, kept)], dim=-2)
        return (x + table).flatten(0, 1)

    def keep(self, chance: torch.Tensor) -> list[torch.Tensor | None]:
        """`keep_branches` of the blocks."""
        return keep_branches(chance, self.drop_path)

    def _with_class_token(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens (I, n, D) -> (I, 1 + n, D), or the same where there is no class token."""
        if self.cls_token is None:
            return x
        return torch.cat([self.cls_token.to(x.dtype).expand(len(x), -1, -1), x], dim=1)

    def _positions(self, grid: tuple[int, int]) -> torch.Tensor:
        """The table that is added to the tokens of a crop of `grid` patches.

        Learned ones of other crops are resampled, bicubic, by a scale as published.
        """
        if self.pos_embed is None:
            return self.positions if self.cls_token is None else F.pad(self.positions, (0, 0, 1, 0))
        if grid == self.grid:
            return self.pos_embed
        extra = self.pos_embed.shape[1] - self.patches
        table = self.pos_embed[:, extra:].view(1, *self.grid, self.dim).permute(0, 3, 1, 2)
        if self.resampling:
            scale = [(new + self.resampling) / old for new, old in zip(grid, self.grid)]
            table = F.interpolate(table, scale_factor=scale, mode="bicubic")
        else:
            table = F.interpolate(table, size=grid, mode="bicubic")
        return torch.cat([self.pos_embed[:, :extra], table.flatten(2).transpose(1, 2)], dim=1)

    def _read_out(self, x: torch.Tensor, images: int, readout: str) -> torch.Tensor:
        """Tokens of whole images -> patches (B*N, D) or class tokens (B, D)."""
        if self.cls_token is None:
            return x
        x = x.view(images, -1, self.dim)
        return x[:, 0].contiguous() if readout == "class" else x[:, 1:].reshape(-1, self.dim)


def mean_of_normal(outputs: list[torch.Tensor]) -> torch.Tensor:
    """The mean of outputs (U, D), each normalised without gain and shift."""
    total = torch.zeros_like(outputs[0], dtype=torch.float32)
    for output in outputs:  # one at a time, as the mean of all blocks of a large encoder would need much memory at once
        total += F.layer_norm(output.float(), output.shape[1:])
    return (total / len(outputs)).to(outputs[0].dtype)
