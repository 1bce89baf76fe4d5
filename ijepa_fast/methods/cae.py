"""CAE (Chen et al. 2022): latents of the masked patches are regressed from the visible ones, tokens decoded of them.

The regressed latents are aligned with what the same encoder makes of the masked patches alone, without a gradient.
There is no average: what a run leaves is the encoder that was trained.
What makes it fast here, exactly: only visible patches are embedded and encoded, only masked ones for the alignment; the
class token ends with the encoder; positions are gathered once for all blocks.
Shapes: B images of N patches, V of them visible and K masked; D encoder width, E width of regressor and decoder, T
tokens of the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ijepa_fast.agree import check_blocks, check_masked
from ijepa_fast.config import ConfigError, key
from ijepa_fast.kernels.masked_gather import masked_gather
from ijepa_fast.masks import blocks
from ijepa_fast.masks.blocks import PatchDraw, PatchSampler
from ijepa_fast.masks.packing import cu_seqlens
from ijepa_fast.methods.method import Setup, TokenMethod
from ijepa_fast.models import flops
from ijepa_fast.models.blocks import EPS, Block, LayerNorm, Linear, run_blocks
from ijepa_fast.models.flops import Transformer, Work
from ijepa_fast.models.initial import INIT_STD
from ijepa_fast.models.layouts import Dense, keep_branches
from ijepa_fast.models.positions import sincos_2d
from ijepa_fast.models.regressor import Regressor, join
from ijepa_fast.models.vit import Encoder

Keep = list[torch.Tensor | None] | None


@dataclass
class Options:
    """CAE's options; the values here are those published for ViT-B/16."""

    tokenizer: str | None = key(None, "path of the tokenizer (models/tokenizer.py)", path=True)
    vocabulary: int = key(8192, "tokens that it has", least=2, most=10**7)
    token_patch: int = key(8, "pixels of its view to a token", least=1, most=1024)
    masked: int = key(98, "masked patches per image", least=1)
    smallest: int = key(16, "patches of a masked block, at least", least=1)
    largest: int | None = key(None, "patches of a masked block, at most; null: all that are left", least=1)
    width: int | None = key(None, "of regressor and decoder; null: the encoder's", least=1, most=65536)
    heads: int | None = key(None, "of their attention; null: the encoder's", least=1, most=4096)
    regressor_depth: int = key(4, "blocks of the regressor", least=1, most=1000)
    decoder_depth: int = key(4, "blocks of the decoder", least=1, most=1000)
    alignment: float = key(2.0, "weight of the squared error of the regressed latents", least=0, most=10**6)
    drop_path: float = key(0.1, "of the last block of each network; linear from 0 at the first", least=0, most=0.99)
    layer_scale: float = key(0.1, "what the branches' gains begin as", above=0, most=10)
    jitter: float = key(0.0, "largest change of brightness, contrast and saturation", least=0, most=1)


@dataclass(frozen=True)
class CAEDraw(PatchDraw):
    """Masks that hide as many patches of every image; int32. `chance` is of encoder, alignment, regressor, decoder."""

    visible_index: torch.Tensor = field(kw_only=True)  # (B*V,) flat patch rows of the visible ones, image-major
    masked_cu_seqlens: torch.Tensor = field(kw_only=True)  # (B + 1,) 0, K, 2K, ...
    whole_cu_seqlens: torch.Tensor = field(kw_only=True)  # (B + 1,) 0, N, 2N, ...

    @property
    def tokens(self) -> int:
        """Tokens that pass through a network: encoder and alignment, regressor, decoder."""
        masked = len(self.patch_index)
        return 2 * self.images + self.images * self.patches + 2 * masked


def with_visible(draw: PatchDraw) -> CAEDraw:
    """The same draw with what is visible; ValueError unless every image has as many masked patches."""
    size = len(draw.patch_index) // draw.images
    if draw.kept is not None or size == 0:
        raise ValueError(f"masks: expected as many masked patches in every image, got {draw.lengths.tolist()}")
    visible = np.flatnonzero(~draw.mask.numpy()).astype(np.int32)
    return CAEDraw(
        **vars(draw),
        visible_index=torch.from_numpy(visible),
        masked_cu_seqlens=cu_seqlens(np.full(draw.images, size)),
        whole_cu_seqlens=cu_seqlens(np.full(draw.images, draw.patches)),
    )


class Kept(NamedTuple):
    """Which branches are kept, by block; None: all."""

    encoder: Keep = None
    alignment: Keep = None
    regressor: Keep = None
    decoder: Keep = None


class CAE(TokenMethod[CAEDraw]):
    """Context autoencoder: `encoder` with a class token, `regressor` and `decoder`."""

    Options = Options

    @classmethod
    def check(cls, options: Any, setup: Setup) -> None:
        """There are more patches than are masked; widths suit heads and positions."""
        check_masked(options.masked, setup)
        check_blocks(options.smallest, options.largest)
        width, heads = options.width or setup.model.dim, options.heads or setup.model.heads
        if width % heads or width % 4:
            raise ConfigError(
                f"objective.options.width={width}: expected a width that 4 and the {heads} heads divide; change "
                f"objective.options.width or objective.options.heads"
            )

    def __init__(self, setup: Setup):
        super().__init__(setup)
        model, chosen = setup.model, self.options
        self.encoder = Encoder(
            **setup.encoder_sizes,
            class_token=True,
            layer_scale=chosen.layer_scale,
            key_bias=False,
            drop_path=chosen.drop_path,
        )
        self.encoder.positions.copy_(sincos_2d(model.dim, setup.grid, row_first=True))
        width, heads = chosen.width or model.dim, chosen.heads or model.heads
        sizes = {"heads": heads, "mlp_ratio": model.mlp_ratio, "layer_scale": chosen.layer_scale}
        self.regressor = Regressor(setup.grid, model.dim, width, chosen.regressor_depth, **sizes)
        self.decoder = Decoder(width, chosen.decoder_depth, chosen.vocabulary, recompute=model.recompute, **sizes)
        self.apply(init_weights)
        for token in (self.get_parameter("encoder.cls_token"), self.regressor.mask_token):
            nn.init.trunc_normal_(token, std=INIT_STD, a=-INIT_STD, b=INIT_STD)
        mask = partial(
            blocks.blocks, grid=setup.grid, count=chosen.masked, smallest=chosen.smallest, largest=chosen.largest
        )
        self.depths = (model.depth, model.depth, chosen.regressor_depth, chosen.decoder_depth)
        self.sampler = PatchSampler(mask, sum(self.depths))

    def draw(self, images: int, seed: int, step: int, first: int = 0, batch: int | None = None) -> CAEDraw:
        """Masks and dropped branches."""
        return with_visible(self.sampler(images, seed, step, first))

    def forward(self, images: list[torch.Tensor], draw: CAEDraw) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """`images`: the crop and the tokenizer's view of it, uint8 (B, side, side, 3) -> scalar fp32 loss."""
        classes, latents = self.losses(self.patchify(images[0]), self.tokens(images[1]), draw)
        terms = {"tokens": classes.detach(), "latents": latents.detach()}
        return classes + self.options.alignment * latents, terms

    def losses(self, patches: torch.Tensor, tokens: torch.Tensor, draw: CAEDraw) -> tuple[torch.Tensor, torch.Tensor]:
        """Cross-entropy of the tokens and squared error of the latents at the masked patches, without its weight.

        From `patches` (B*N, W) and their `tokens` (B*N,) int64.
        """
        kept, places = self.kept(draw), self.places(draw)
        latents = self.latents(self.visible(patches, draw, kept.encoder), draw, places, kept.regressor)
        targets = self.targets(patches, draw, kept.alignment)
        if self.watch is not None:
            self.watch(targets, draw)
        logits = self.decoder(latents, places[0], draw.images, kept.decoder)
        return F.cross_entropy(logits.float(), tokens[draw.patch_index]), F.mse_loss(latents.float(), targets.float())

    def kept(self, draw: CAEDraw) -> Kept:
        """Branches of all networks that the draw keeps; in training alone."""
        if not self.training or draw.chance is None or not self.options.drop_path:
            return Kept()
        return Kept(*(keep_branches(part, self.options.drop_path) for part in draw.chance.split(self.depths)))

    def places(self, draw: CAEDraw) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions of the masked patches (B*K, E), and of the visible and then the masked ones of each image."""
        table = self.regressor.positions.to(self.encoder.norm.weight.dtype)
        masked, visible = (masked_gather(table, rows % draw.patches) for rows in (draw.patch_index, draw.visible_index))
        return masked, join(visible, masked, draw.images)

    def visible(self, patches: torch.Tensor, draw: CAEDraw, keep: Keep = None) -> torch.Tensor:
        """Patches (B*N, W) -> the encoder's tokens of the visible ones (B*(1 + V), D), final norm applied."""
        rows = draw.visible_index
        return self.encoder.some(patches, rows, rows % draw.patches, draw.images, keep)

    def latents(
        self, visible: torch.Tensor, draw: CAEDraw, places: tuple[torch.Tensor, torch.Tensor], keep: Keep = None
    ) -> torch.Tensor:
        """What `visible` gave -> the regressed latents (B*K, E) of the masked patches."""
        ends = draw.masked_cu_seqlens, draw.whole_cu_seqlens
        return self.regressor(self.regressor.narrowed(without_class(visible, draw.images)), places, ends, keep)

    @torch.no_grad()
    def targets(
        self, patches: torch.Tensor, draw: CAEDraw, keep: Keep = None, encoder: Encoder | None = None
    ) -> torch.Tensor:
        """Patches (B*N, W) -> latents (B*K, E) of the masked ones, of which the encoder sees nothing else.

        encoder: instead of the own.
        """
        rows = draw.patch_index
        found = (encoder or self.encoder).some(patches, rows, rows % draw.patches, draw.images, keep)
        return self.regressor.narrowed(without_class(found, draw.images))

    def work(self, draw: CAEDraw) -> Work:
        """The work of a step on a batch, as executed here, without the tokenizer's."""
        model, chosen = self.setup.model, self.options
        width = chosen.width or model.dim
        return step_work(
            Transformer(model.dim, model.depth, model.mlp_ratio),
            Transformer(width, chosen.regressor_depth, model.mlp_ratio),
            Transformer(width, chosen.decoder_depth, model.mlp_ratio),
            chosen.vocabulary,
            values=self.setup.values,
            patches=draw.patches,
            masked=len(draw.patch_index) // draw.images,
            images=draw.images,
        )


class Decoder(nn.Module):
    """From the regressed latents to scores of the vocabulary. Arguments as Regressor's."""

    def __init__(
        self,
        dim: int,
        depth: int,
        vocabulary: int,
        heads: int,
        mlp_ratio: float = 4.0,
        layer_scale: float = 0.1,
        recompute: bool = False,
    ):
        super().__init__()
        self.recompute = recompute
        self.decoder_blocks = nn.ModuleList(
            [Block(dim, heads, mlp_ratio, EPS, layer_scale, key_bias=False) for _ in range(depth)]
        )
        self.norm = LayerNorm(dim, eps=EPS)
        self.head = Linear(dim, vocabulary)

    def forward(self, latents: torch.Tensor, positions: torch.Tensor, images: int, keep: Keep = None) -> torch.Tensor:
        """`latents` and `positions` (B*K, E) of `images` -> scores (B*K, T)."""
        layout = Dense(images)
        x = run_blocks(self.decoder_blocks, self.norm, latents, positions, layout, None, self.recompute, keep)
        return self.head(x)


def without_class(tokens: torch.Tensor, images: int) -> torch.Tensor:
    """Tokens (B*(1 + n), D) of `images` -> (B*n, D): all but the class tokens."""
    return tokens.view(images, -1, tokens.shape[1])[:, 1:].reshape(-1, tokens.shape[1])


def init_weights(module: nn.Module) -> None:
    """Published initialisation: Xavier uniform for every matrix, biases 0, LayerNorm 1 and 0; the patch embedding is
    normal .02, cut off at one standard deviation.
    """
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
    elif isinstance(module, nn.Conv2d):
        nn.init.trunc_normal_(module.weight, std=INIT_STD, a=-INIT_STD, b=INIT_STD)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
    else:
        return
    if module.bias is not None:
        nn.init.zeros_(module.bias)


def step_work(
    encoder: Transformer,
    regressor: Transformer,
    decoder: Transformer,
    vocabulary: int,
    *,
    values: int,
    patches: int,
    masked: int,
    images: int = 1,
    used_rows_only: bool = True,
) -> Work:
    """Work of a CAE step on images with `masked` of `patches` masked, without the tokenizer's.

    used_rows_only: embedded is what is encoded and the class token ends with the encoder, as in this project's
    rendering; not in the published one, which embeds all patches twice.
    """
    visible, kept = patches - masked, int(not used_rows_only)
    narrows = encoder.dim != regressor.dim

    def embedding(count: int) -> int:
        return flops.linear(count if used_rows_only else patches, values, encoder.dim)

    def narrow(count: int) -> int:
        return flops.linear(count, encoder.dim, regressor.dim) if narrows else 0

    cross = Transformer(regressor.dim, 1, regressor.mlp_ratio).forward([patches], [masked])
    teacher = embedding(masked) + encoder.forward([1 + masked]) + narrow(masked)
    trained = {
        "encoder": embedding(visible) + encoder.forward([1 + visible]),
        "regressor": narrow(visible + kept) + regressor.depth * cross,
        "decoder": decoder.forward([masked]) + flops.linear(masked, decoder.dim, vocabulary),
    }
    return Work(images * teacher, {name: images * work for name, work in trained.items()}, images * embedding(visible))
