"""data2vec of images (Baevski et al. 2022): what the average makes of a whole image, at the patches that are hidden.

The target of a masked patch is the mean of its normalised outputs of the average's last blocks.
What makes it fast here, exactly: the last block of either network, norms, head and targets compute only the masked
patches; the average's blocks behind the last target are not run.
Shapes: B images of N patches, R masked patches in all, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
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
from ijepa_fast.models.blocks import Linear
from ijepa_fast.models.flops import Transformer, Work
from ijepa_fast.models.initial import init_cut
from ijepa_fast.models.vit import Encoder


@dataclass
class Options:
    """data2vec's options; the values here are the published ones. There is no dropout of attention (published: .05)."""

    masked: int = key(120, "masked patches per image", least=1)
    smallest: int = key(16, "patches of a masked block, at least", least=1)
    largest: int | None = key(196, "patches of a masked block, at most; null: all that are left", least=1)
    layers: int = key(6, "last blocks whose outputs are the target", least=1)
    beta: float = key(2.0, "error up to which the loss is quadratic", above=0, most=10**6)
    drop_path: float = key(0.25, "of the last block; linear from 0 at the first", least=0, most=0.99)
    layer_scale: float = key(1e-4, "what the branches' gains begin as", above=0, most=10)
    jitter: float = key(0.4, "largest change of brightness, contrast and saturation", least=0, most=1)


class Data2Vec(Method[PatchDraw]):
    """`encoder` with a class token and relative positions, its average, and `head`, a linear layer.

    target_layers: the blocks of the average whose outputs are the target.
    """

    Options = Options
    undecayed = frozenset({"encoder.cls_token"})

    @classmethod
    def check(cls, options: Any, setup: Setup) -> None:
        """There are so many patches and blocks."""
        check_masked(options.masked, setup)
        check_blocks(options.smallest, options.largest)
        if options.layers > setup.model.depth:
            raise ConfigError(
                f"objective.options.layers={options.layers}: expected at most model.depth={setup.model.depth}"
            )

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
        self.head = Linear(model.dim, model.dim)
        init_cut(self)
        self.keep_average("encoder")
        self.target_layers = list(range(model.depth - chosen.layers, model.depth))
        mask = partial(blocks, grid=setup.grid, count=chosen.masked, smallest=chosen.smallest, largest=chosen.largest)
        self.sampler = PatchSampler(mask, model.depth, passes=2)

    def views(self) -> list[View]:
        """One crop, its colours jittered."""
        data, by = self.setup.data, self.options.jitter
        return [
            View(crop_of(data.size), (data.scale[0], data.scale[1]), jitter=1.0, strengths=(by, by, by, 0.0), grey=0.0)
        ]

    def draw(self, images: int, seed: int, step: int, first: int = 0, batch: int | None = None) -> PatchDraw:
        """Masks and dropped branches."""
        return self.sampler(images, seed, step, first)

    def forward(self, images: list[torch.Tensor], draw: PatchDraw) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """`images`: one view, (B, H, W, C) -> scalar fp32 loss."""
        return self.loss_of_patches(self.patchify(images[0]), draw), {}

    def loss_of_patches(self, patches: torch.Tensor, draw: PatchDraw) -> torch.Tensor:
        """The loss from `patches` (B*N, W): smooth L1 between head and target at the masked patches."""
        targets = self.targets(patches, draw)
        if self.watch is not None:
            self.watch(targets, draw)
        return F.smooth_l1_loss(self.predictions(patches, draw).float(), targets, beta=self.options.beta)

    def predictions(self, patches: torch.Tensor, draw: PatchDraw) -> torch.Tensor:
        """The head's outputs (R, D) at the masked patches."""
        return self.head(self.encoder.masked(patches, draw))

    @torch.no_grad()
    def targets(self, patches: torch.Tensor, draw: PatchDraw) -> torch.Tensor:
        """(R, D) fp32: the mean of the average's outputs, normalised before and after."""
        teacher, width = self.averaged["encoder"], (self.encoder.dim,)
        layers = teacher.masked_layers(patches, draw, self.target_layers)
        mean = torch.stack([F.layer_norm(layer.float(), width) for layer in layers]).mean(0)
        return F.layer_norm(mean, width)

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
    """Work of a data2vec step on images with `masked` patches each.

    used_rows_only: the last blocks compute the masked patches alone, as this project's rendering does; not the
    published one, whose head does all the same.
    """
    images = len(masked)
    embedding = flops.linear(images * patches, values, encoder.dim)
    stack = encoder.forward([1 + patches] * images, masked if used_rows_only else None)
    head = flops.linear(sum(masked), encoder.dim, encoder.dim)
    return Work(embedding + stack, {"encoder": embedding + stack, "head": head}, embedding)
