"""SimMIM (Xie et al. 2022): pixels of masked squares, predicted by one linear layer; the encoder sees mask tokens.

There is no average: what a run leaves is the encoder that was trained.
What makes it fast here, exactly: the encoder's last block, its norm and the prediction compute only the masked patches,
whose loss is all there is.
Shapes: B images of N patches, R masked patches in all, D width, P patch size.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ijepa_fast.config import ConfigError, key
from ijepa_fast.masks.blocks import PatchDraw, PatchSampler, squares
from ijepa_fast.methods.method import Method, Setup
from ijepa_fast.models import flops
from ijepa_fast.models.blocks import Linear
from ijepa_fast.models.flops import Transformer, Work
from ijepa_fast.models.initial import init_cut
from ijepa_fast.models.vit import Encoder

EPS = 1e-5  # beside the number of masked pixels


@dataclass
class Options:
    """SimMIM's options; the values here are the published ones."""

    masked: float = key(0.6, "share of the squares, rounded up", above=0, most=1)
    square: int = key(2, "patches along a masked square (32 pixels)", least=1)
    drop_path: float = key(0.1, "of the last block; linear from 0 at the first", least=0, most=0.99)
    layer_scale: float = key(0.1, "what the branches' gains begin as", above=0, most=10)
    relative: bool = key(True, "a bias by relative position, shared by all blocks")
    absolute: bool = key(False, "learned absolute positions")


class SimMIM(Method[PatchDraw]):
    """`encoder` with a class token and relative positions, and `decoder`, a linear layer to pixels."""

    Options = Options
    undecayed = frozenset({"encoder.cls_token", "encoder.pos_embed"})

    @classmethod
    def check(cls, options: Any, setup: Setup) -> None:
        """Squares fit the grid, and some of them are left."""
        rows, columns = setup.grid
        if rows % options.square or columns % options.square:
            raise ConfigError(
                f"objective.options.square={options.square}: expected a divisor of a crop's {rows} x {columns} patches"
            )
        if options.masked == 1:
            raise ConfigError("objective.options.masked: expected a share that leaves visible patches, got 1")

    def __init__(self, setup: Setup):
        super().__init__(setup)
        model, chosen = setup.model, self.options
        self.encoder = Encoder(
            **setup.encoder_sizes,
            class_token=True,
            learned_positions=chosen.absolute,
            relative_positions=chosen.relative,
            mask_token=True,
            layer_scale=chosen.layer_scale,
            key_bias=False,
            drop_path=chosen.drop_path,
        )
        self.decoder = Linear(model.dim, setup.values)
        init_cut(self)
        mask = partial(squares, grid=setup.grid, square=chosen.square, share=chosen.masked)
        self.sampler = PatchSampler(mask, model.depth)

    def draw(self, images: int, seed: int, step: int, first: int = 0, batch: int | None = None) -> PatchDraw:
        """Masks and dropped branches."""
        return self.sampler(images, seed, step, first)

    def forward(self, images: torch.Tensor, draw: PatchDraw) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """`images` (B, H, W, C) and their masks -> scalar fp32 loss."""
        return self.loss_of_patches(self.patchify(images), draw), {}

    def loss_of_patches(self, patches: torch.Tensor, draw: PatchDraw) -> torch.Tensor:
        """The loss from `patches` (B*N, W): mean absolute error of the masked pixels."""
        predictions = self.decoder(self.encoder.masked(patches, draw))
        pixels = patches[draw.patch_index, : predictions.shape[1]]
        total = (predictions.float() - pixels.float()).abs().sum()
        return total / (predictions.numel() + self.setup.data.channels * EPS)

    def work(self, draw: PatchDraw) -> Work:
        """The work of a step on a batch, as executed here."""
        model = self.setup.model
        return step_work(
            Transformer(model.dim, model.depth, model.mlp_ratio),
            values=self.setup.values,
            patches=draw.patches,
            masked=draw.lengths.tolist(),
        )


def step_work(
    encoder: Transformer, *, values: int, patches: int, masked: list[int], used_rows_only: bool = True
) -> Work:
    """Work of a SimMIM step on images with `masked` patches each.

    used_rows_only: the last block and the prediction compute the masked patches alone, as this project's rendering
    does; not the published one.
    """
    images = len(masked)
    embedding = flops.linear(images * patches, values, encoder.dim)
    stack = encoder.forward([1 + patches] * images, masked if used_rows_only else None)
    head = flops.linear(sum(masked) if used_rows_only else images * patches, encoder.dim, values)
    return Work(0, {"encoder": embedding + stack, "decoder": head}, embedding)
