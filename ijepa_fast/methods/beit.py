"""BEiT (Bao et al. 2022): a classifier of the tokens that a frozen tokenizer gives to the hidden patches.

There is no average: what a run leaves is the encoder that was trained.
What makes it fast here, exactly: the encoder's last block, its norm and the classifier compute only the masked patches.
Shapes: B images of N patches, R masked patches in all, D width, V tokens of the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from ijepa_fast.agree import check_blocks, check_masked
from ijepa_fast.config import key
from ijepa_fast.masks.blocks import PatchDraw, PatchSampler, blocks
from ijepa_fast.methods.method import Setup, TokenMethod
from ijepa_fast.models import flops
from ijepa_fast.models.blocks import Linear
from ijepa_fast.models.flops import Transformer, Work
from ijepa_fast.models.initial import init_cut
from ijepa_fast.models.vit import Encoder


@dataclass
class Options:
    """BEiT's options; the values here are the published ones."""

    tokenizer: str | None = key(None, "path of the tokenizer (models/tokenizer.py)", path=True)
    vocabulary: int = key(8192, "tokens that it has", least=2, most=10**7)
    token_patch: int = key(8, "pixels of its view to a token", least=1, most=1024)
    masked: int = key(75, "masked patches per image", least=1)
    smallest: int = key(16, "patches of a masked block, at least", least=1)
    largest: int | None = key(None, "patches of a masked block, at most; null: all that are left", least=1)
    drop_path: float = key(0.1, "of the last block; linear from 0 at the first", least=0, most=0.99)
    layer_scale: float = key(0.1, "what the branches' gains begin as", above=0, most=10)
    jitter: float = key(0.4, "largest change of brightness, contrast and saturation", least=0, most=1)


class BEiT(TokenMethod[PatchDraw]):
    """`encoder` with a class token and relative positions, and `head`, a linear classifier."""

    Options = Options
    undecayed = frozenset({"encoder.cls_token"})

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

    def draw(self, images: int, seed: int, step: int, first: int = 0, batch: int | None = None) -> PatchDraw:
        """Masks and dropped branches."""
        return self.sampler(images, seed, step, first)

    def forward(self, images: list[torch.Tensor], draw: PatchDraw) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """`images`: the crop and the tokenizer's view of it, uint8 (B, side, side, 3) -> scalar fp32 loss."""
        return self.loss_of_patches(self.patchify(images[0]), self.tokens(images[1]), draw), {}

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
