"""MAE (He et al. 2022): an encoder of the visible patches, a narrow decoder, and pixels as targets.

Masks are those of the strategy "random": the context is what the encoder sees, the one target block what it does not.
There is no average: what a run leaves is the encoder that was trained.
What makes it fast here, exactly: only visible patches are embedded, the decoder's tokens are never put back into image
order, and its last block, norm and projection compute only the masked patches, whose loss is all there is.
Shapes: B images, N patches, V visible and K masked patches of one, D and Dd widths, P patch size, R = B*K.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ijepa_fast.config import ConfigError, key
from ijepa_fast.kernels.masked_gather import masked_gather
from ijepa_fast.kernels.target_loss import target_loss
from ijepa_fast.masks.packing import MaskDraw, cu_seqlens, pack
from ijepa_fast.masks.samplers import Masks, make_sampler
from ijepa_fast.methods.method import Method, Setup
from ijepa_fast.models import flops
from ijepa_fast.models.blocks import EPS, Block, LayerNorm, run_blocks
from ijepa_fast.models.flops import Transformer, Work
from ijepa_fast.models.initial import INIT_STD, init_xavier
from ijepa_fast.models.layouts import Dense, Packed, Rows
from ijepa_fast.models.positions import sincos_2d
from ijepa_fast.models.vit import Encoder

MASKED_SHARE = 0.75
PIXEL_EPS = 1e-6  # beside the variance of a patch's pixels
HEAD_DIM = 32  # of the decoder
VIEW = {"scale": (0.2, 1.0), "interpolation": "bicubic", "flip": True}  # the published one, as arguments of a loader


@dataclass
class Options:
    """MAE's options; the values here are the published ones. The decoder has predictor_dim and predictor_depth."""

    masked: float = key(MASKED_SHARE, "share of the patches", above=0, most=1)
    normalise: bool = key(True, "compare with pixels normalised patch by patch (norm_pix_loss), the better target")


@dataclass(frozen=True)
class MAEDraw(MaskDraw):
    """Masks of one context and one target block per image, and the decoder's layout: visible, then masked patches."""

    decoder_places: torch.Tensor  # (B*N,) places of the decoder's patches
    decoder_cu_seqlens: torch.Tensor  # (B + 1,) with the class token
    masked_cu_seqlens: torch.Tensor  # (B + 1,) of the masked patches alone

    @property
    def tokens(self) -> int:
        """Tokens that pass through a network: encoder and decoder, each with a class token."""
        return self.images * (1 + self.context_max_seqlen + 1 + self.patches)


def pack_visible(masks: Masks) -> MAEDraw:
    """Pack masks; ValueError unless they have one target block and one context, of equal length in all images."""
    return with_decoder(pack(masks))


def with_decoder(draw: MaskDraw) -> MAEDraw:
    """The same draw with the decoder's layout; see `pack_visible`."""
    if draw.targets * draw.contexts != 1 or len(draw.context_index) != draw.images * draw.context_max_seqlen:
        raise ValueError(
            f"masks: expected one target block and one context of equal length in every image, got "
            f"{draw.targets} and {draw.contexts}; draw them with the strategy random"
        )
    images, size = draw.images, draw.target_size
    places = [draw.context_places.view(images, -1), draw.target_index[0] % draw.patches]
    length = 1 + places[0].shape[1] + size
    return MAEDraw(
        **vars(draw),
        decoder_places=torch.cat(places, dim=1).flatten(),
        decoder_cu_seqlens=cu_seqlens(np.full(images, length)),
        masked_cu_seqlens=cu_seqlens(np.full(images, size)),
    )


class MAE(Method[MAEDraw]):
    """Masked autoencoder: `encoder` with a class token, and `decoder`."""

    Options = Options
    capabilities = frozenset({"graphs"})
    former_names: ClassVar = {"predictor.": "decoder."}

    @classmethod
    def check(cls, options: Any, setup: Setup) -> None:
        """Some patches are masked and some are not; the decoder's width suits its heads."""
        patches, width = setup.grid[0] * setup.grid[1], setup.model.predictor_dim
        if not 0 < round(patches * options.masked) < patches:
            raise ConfigError(
                f"objective.options.masked: expected a share that leaves masked and visible ones of {patches} patches, "
                f"got {options.masked}"
            )
        if width % 4 or width % max(1, width // HEAD_DIM):
            raise ConfigError(
                f"model.predictor_dim={width}: expected a multiple of {HEAD_DIM}, the width of the decoder's heads"
            )

    def __init__(self, setup: Setup):
        super().__init__(setup)
        model = setup.model
        self.sampler = make_sampler("random", setup.grid, target_scale=(self.options.masked,) * 2)
        self.encoder = Encoder(**setup.encoder_sizes, class_token=True)
        self.decoder = Decoder(
            self.encoder.grid,
            model.patch,
            model.dim,
            model.predictor_dim,
            model.predictor_depth,
            channels=setup.data.channels,
            heads=max(1, model.predictor_dim // HEAD_DIM),
            recompute=model.recompute,
        )
        self.apply(init_xavier)
        nn.init.normal_(self.get_parameter("encoder.cls_token"), std=INIT_STD)
        nn.init.normal_(self.decoder.mask_token, std=INIT_STD)

    def draw(self, images: int, seed: int, step: int, first: int = 0, batch: int | None = None) -> MAEDraw:
        """The masks of a micro-batch, packed."""
        return pack_visible(self.sampler(images, seed, step, first))

    def forward(self, images: torch.Tensor, draw: MAEDraw) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """`images` (B, H, W, C) and their masks -> scalar fp32 loss."""
        return self.loss_of_patches(self.patchify(images), draw), {}

    def loss_of_patches(self, patches: torch.Tensor, draw: MAEDraw) -> torch.Tensor:
        """The loss from `patches` (B*N, W): mean squared error over masked patches."""
        predictions = self.decoder(self.encoder.context(patches, draw), draw)
        pixels = patches[:, : predictions.shape[1]].contiguous()
        index = draw.target_index.view(-1)
        if not self.options.normalise:
            return F.mse_loss(predictions.float(), pixels[index].float())
        # The published target divides by the unbiased variance: LayerNorm, scaled by this.
        n = predictions.shape[1]
        scale = ((n - 1) / n) ** 0.5
        return scale**2 * target_loss(predictions / scale, pixels, index, kind="l2", eps=PIXEL_EPS * scale**2)

    def work(self, draw: MAEDraw) -> Work:
        """The work of a step on a batch, as executed here."""
        model = self.setup.model
        return step_work(
            Transformer(model.dim, model.depth, model.mlp_ratio),
            Transformer(model.predictor_dim, model.predictor_depth),
            patch=model.patch,
            channels=self.setup.data.channels,
            patches=draw.patches,
            visible=draw.context_max_seqlen,
            images=draw.images,
            embed_all=False,
            used_rows_only=True,
        )


class PixelProjection(nn.Linear):
    """Linear to pixels. Its rows are stored as published, column (i*P + j)*C + c, and applied in patchify's order."""

    def __init__(self, dim: int, patch: int, channels: int):
        super().__init__(dim, channels * patch**2)
        self.channels = channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x` (R, Dd) -> (R, C*P*P), column c*P*P + i*P + j."""
        weight, bias = (
            w.unflatten(0, (-1, self.channels)).transpose(0, 1).flatten(0, 1) for w in (self.weight, self.bias)
        )
        return F.linear(x, weight, bias)


class Decoder(nn.Module):
    """From the encoder's tokens to the pixels of the masked patches.

    Args:
        grid: (rows, columns) of patches.
        patch: P.
        encoder_dim: D.
        dim: Dd.
        depth: blocks.
        heads: of each block.
        channels: C, of an image.
        recompute: keep only each block's input for the backward pass.
    """

    positions: torch.Tensor  # (N, Dd)

    def __init__(
        self,
        grid: tuple[int, int],
        patch: int,
        encoder_dim: int,
        dim: int = 512,
        depth: int = 8,
        heads: int = 16,
        recompute: bool = False,
        channels: int = 3,
    ):
        super().__init__()
        if dim % heads:
            raise ValueError(f"decoder: expected a width that {heads} heads divide, got {dim}; change the width")
        self.dim, self.recompute = dim, recompute
        self.decoder_embed = nn.Linear(encoder_dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.register_buffer("positions", sincos_2d(dim, grid), persistent=False)
        self.decoder_blocks = nn.ModuleList([Block(dim, heads, 4.0) for _ in range(depth)])
        self.decoder_norm = LayerNorm(dim, eps=EPS)
        self.decoder_pred = PixelProjection(dim, patch, channels)

    def forward(self, latent: torch.Tensor, draw: MAEDraw) -> torch.Tensor:
        """`latent` (B*(1 + V), D) -> predicted pixels (B*K, C*P*P) of the masked patches, as in target_index."""
        images, size = draw.images, draw.target_size
        x = self.decoder_embed(latent).view(images, -1, self.dim)
        masked = self.mask_token.to(x.dtype).expand(images, size, -1)
        positions = masked_gather(self.positions.to(x.dtype), draw.decoder_places).view(images, -1, self.dim)
        x = torch.cat([x[:, :1], torch.cat([x[:, 1:], masked], dim=1) + positions], dim=1)
        length = x.shape[1]
        rows = Rows(partial(last_rows, length=length, count=size), draw.masked_cu_seqlens, size)
        last = Packed(draw.decoder_cu_seqlens, length, rows)
        x = run_blocks(
            self.decoder_blocks, self.decoder_norm, x.flatten(0, 1), None, Dense(images), last, self.recompute
        )
        return self.decoder_pred(x)


def last_rows(x: torch.Tensor, length: int, count: int) -> torch.Tensor:
    """x (B*length, D) -> (B*count, D): the last `count` rows of every `length`."""
    return x.view(-1, length, x.shape[1])[:, -count:].reshape(-1, x.shape[1])


def step_work(
    encoder: Transformer,
    decoder: Transformer,
    *,
    patch: int,
    patches: int,
    visible: int,
    images: int = 1,
    embed_all: bool = True,
    used_rows_only: bool = False,
    channels: int = 3,
) -> Work:
    """Work of an MAE step that keeps `visible` patches, of each image, with a class token.

    embed_all: all patches are embedded before masking, as published. used_rows_only: the decoder's last block and its
    prediction compute only the masked patches, as this project's rendering does.
    """
    pixels, masked = channels * patch**2, patches - visible
    embedding = flops.linear(patches if embed_all else visible, pixels, encoder.dim)
    narrow = flops.linear(1 + visible, encoder.dim, decoder.dim)
    narrow += decoder.forward([1 + patches], [masked] if used_rows_only else None)
    narrow += flops.linear(masked if used_rows_only else 1 + patches, decoder.dim, pixels)
    trained = {"encoder": embedding + encoder.forward([1 + visible]), "decoder": narrow}
    return Work(0, {name: images * work for name, work in trained.items()}, images * embedding)
