"""BEiT (Bao et al. 2022): a classifier of the tokens that a frozen tokenizer gives to the hidden patches.

There is no average: what a run leaves is the encoder that was trained.
What makes it fast here, exactly: the encoder's last block, its norm and the classifier compute only the masked patches.
Shapes: B images of N patches, R masked patches in all, D width, V tokens of the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from ijepa_fast.agree import check_blocks, check_masked
from ijepa_fast.config import ConfigError, key
from ijepa_fast.data import crop_of
from ijepa_fast.data.crops import View
from ijepa_fast.masks.blocks import PatchDraw, PatchSampler, blocks
from ijepa_fast.methods.method import Method, Setup
from ijepa_fast.models import flops
from ijepa_fast.models.flops import Transformer, Work
from ijepa_fast.models.initial import init_cut
from ijepa_fast.models.tokenizer import Tokenizer, load_tokenizer
from ijepa_fast.models.vit import Encoder, Linear


@dataclass
class Options:
    """BEiT's options; the values here are the published ones."""

    tokenizer: str | None = key(None, "path of the tokenizer (models/tokenizer.py)")
    vocabulary: int = key(8192, "tokens that it has", least=2, most=10**7)
    token_patch: int = key(8, "pixels of its view to a token", least=1, most=1024)
    masked: int = key(75, "masked patches per image", least=1)
    smallest: int = key(16, "patches of a masked block, at least", least=1)
    largest: int | None = key(None, "patches of a masked block, at most; null: all that are left", least=1)
    drop_path: float = key(0.1, "of the last block; linear from 0 at the first", least=0, most=0.99)
    layer_scale: float = key(0.1, "what the branches' gains begin as", above=0, most=10)
    jitter: float = key(0.4, "largest change of brightness, contrast and saturation", least=0, most=1)


class BEiT(Method[PatchDraw]):
    """`encoder` with a class token and relative positions, and `head`, a linear classifier."""

    Options = Options
    undecayed = frozenset({"encoder.cls_token"})
    tokenizer: Tokenizer | None = None

    @classmethod
    def check(cls, options: Any, setup: Setup) -> None:
        """There are more patches than are masked."""
        check_masked(options.masked, setup)
        check_blocks(options.smallest, options.largest)

    def __init__(self, setup: Setup):
        super().__init__(setup)
        model, chosen = setup.model, self.options
        self.encoder = Encoder(
            **setup.encoder_sizes,
            class_token=True,
            relative_positions=True,
            mask_token=True,
            layer_scale=chosen.layer_scale,
            key_bias=False,
            drop_path=chosen.drop_path,
        )
        self.head = Linear(model.dim, chosen.vocabulary)
        init_cut(self)
        mask = partial(blocks, grid=setup.grid, count=chosen.masked, smallest=chosen.smallest, largest=chosen.largest)
        self.sampler = PatchSampler(mask, model.depth)

    def ready(self) -> None:
        """Load the tokenizer."""
        chosen, data = self.options, self.setup.data
        if data.channels != 3:
            raise ConfigError(f"data.channels={data.channels}: a tokenizer reads images of 3 channels")
        try:
            self.tokenizer = load_tokenizer(chosen.tokenizer, chosen.vocabulary, chosen.token_patch)
        except ValueError as error:
            raise ConfigError(str(error)) from None

    def views(self) -> list[View]:
        """One crop, its colours jittered; and the same at the tokenizer's size."""
        return token_views(self.setup, self.options.token_patch, self.options.jitter)

    def draw(self, images: int, seed: int, step: int, first: int = 0, batch: int | None = None) -> PatchDraw:
        """Masks and dropped branches."""
        return self.sampler(images, seed, step, first)

    def forward(self, images: list[torch.Tensor], draw: PatchDraw) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """`images`: the crop and the tokenizer's view of it, uint8 (B, side, side, 3) -> scalar fp32 loss."""
        if self.tokenizer is None:
            self.ready()
        assert self.tokenizer is not None
        tokens = tokens_of(self.tokenizer, images[1], self.encoder.grid, self.options.vocabulary)
        return self.loss_of_patches(self.patchify(images[0]), tokens, draw), {}

    def loss_of_patches(self, patches: torch.Tensor, tokens: torch.Tensor, draw: PatchDraw) -> torch.Tensor:
        """The loss from `patches` (B*N, W) and their `tokens` (B*N,) int64: cross-entropy at the masked ones."""
        return F.cross_entropy(self.logits(patches, draw).float(), tokens[draw.patch_index])

    def logits(self, patches: torch.Tensor, draw: PatchDraw) -> torch.Tensor:
        """The classifier's outputs (R, V) at the masked patches."""
        return self.head(self.encoder.masked(patches, draw))

    def work(self, draw: PatchDraw) -> Work:
        """The work of a step on a batch, as executed here, without the tokenizer's."""
        model = self.setup.model
        return step_work(
            Transformer(model.dim, model.depth, model.mlp_ratio),
            self.options.vocabulary,
            values=self.setup.values,
            patches=draw.patches,
            masked=draw.lengths.tolist(),
        )


def token_views(setup: Setup, token_patch: int, jitter: float) -> list[View]:
    """A crop as a method of tokens sees it, and the same window at the tokenizer's size.

    Both are resized alike (published: the second by another filter).
    """
    data, (rows, columns) = setup.data, setup.grid
    strengths = (jitter, jitter, jitter, 0.0)
    scale, size = (data.scale[0], data.scale[1]), (rows * token_patch, columns * token_patch)
    view = View(crop_of(data.size), scale, jitter=float(jitter > 0), strengths=strengths, grey=0.0)
    return [view, replace(view, crop=crop_of(size), like=0)]


@torch.no_grad()
def tokens_of(tokenizer: Tokenizer, images: torch.Tensor, grid: tuple[int, int], vocabulary: int) -> torch.Tensor:
    """Tokens (B*N,) int64 of `images` uint8 (B, S, S, 3). ValueError for another grid, or a token beyond the head."""
    tokens = tokenizer(images)
    if tokens.shape != (len(images), *grid):
        raise ConfigError(
            f"objective.options.tokenizer: it gives tokens of shape {tuple(tokens.shape)} and the grid of patches has "
            f"{(len(images), *grid)}; set objective.options.token_patch to its pixels to a token"
        )
    if not tokens.is_cuda and int(tokens.max()) >= vocabulary:
        raise ConfigError(
            f"objective.options.tokenizer: it gave token {int(tokens.max())} and the head has {vocabulary}; set "
            f"objective.options.vocabulary to its number of tokens"
        )
    return tokens.flatten()


def step_work(
    encoder: Transformer,
    vocabulary: int,
    *,
    values: int,
    patches: int,
    masked: list[int],
    used_rows_only: bool = True,
) -> Work:
    """Work of a BEiT step on images with `masked` patches each, without the tokenizer's.

    used_rows_only: the last block computes the masked patches alone, as this project's rendering does; not the
    published one, whose head does all the same.
    """
    images = len(masked)
    embedding = flops.linear(images * patches, values, encoder.dim)
    stack = encoder.forward([1 + patches] * images, masked if used_rows_only else None)
    head = flops.linear(sum(masked), encoder.dim, vocabulary)
    return Work(0, {"encoder": embedding + stack, "head": head}, embedding)
