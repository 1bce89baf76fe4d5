"""LeJEPA (Balestriero and LeCun 2025): views of an image agree, and all embeddings together are a Gaussian.

There is no average, no predictor and no stopped gradient: against collapse stands SIGReg, which draws the embeddings of
a batch to an isotropic Gaussian along random directions (kernels/sigreg).
What makes it fast here, exactly: all views, small ones too, are one packed batch, and the last block, norm and head
compute only the class tokens.
Shapes: B images, V views of N patches, L small ones of n, D width, E width of an embedding, K directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ijepa_fast.agree import check_samples
from ijepa_fast.config import ConfigError, key
from ijepa_fast.data.crops import View
from ijepa_fast.kernels.sigreg import sigreg
from ijepa_fast.masks.crops import crops_of, smaller
from ijepa_fast.masks.views import ViewDraw, ViewSampler
from ijepa_fast.methods.method import Method, Setup
from ijepa_fast.models import flops, projector
from ijepa_fast.models.flops import Transformer, Work
from ijepa_fast.models.initial import INIT_STD, init_weights
from ijepa_fast.models.projector import Projector
from ijepa_fast.models.vit import Encoder

PUBLISHED = 128  # pixels of a view, beside which the blur is given
SMALL_SCALE = 0.05  # smallest share of an image in a small view, as published


@dataclass
class Options:
    """LeJEPA's options; the values here are those of the authors' minimal example, whose views are of one size.

    For ImageNet they publish 2 views, 6 small ones, scale .3 and strengths .4, .4, .2, .1.
    """

    views: int = key(4, "views per image", least=2, most=100)
    small_views: int = key(
        0, "smaller views per image beside them, of what is below `scale`; published for ImageNet: 6", least=0, most=100
    )
    weight: float = key(0.02, "of SIGReg; the agreement of the views has the rest", least=0, most=1)
    slices: int = key(256, "random directions of a step", least=1, most=65536)
    knots: int = key(17, "at which a direction's characteristic function is compared", least=2, most=1000)
    last_knot: float = key(3.0, "the largest of them", above=0, most=100)
    bottleneck: int = key(512, "width between encoder and projector", least=1, most=65536)
    hidden: int = key(2048, "width of the projector's two hidden layers", least=1, most=65536)
    embedding: int = key(16, "width of an embedding", least=1, most=65536)
    drop_path: float = key(0.1, "of the last block; linear from 0 at the first", least=0, most=0.99)
    scale: float = key(0.08, "smallest share of an image in a view, in place of data.scale's", above=0, most=1)
    strengths: list[float] = key(
        [0.8, 0.8, 0.8, 0.2],
        "largest changes of brightness, contrast, saturation (shares), hue (turns)",
        least=0,
        most=1,
    )


class LeJEPA(Method[ViewDraw]):
    """`encoder` with a class token, and `head`, which is thrown away: a linear layer and a projector."""

    Options = Options

    @classmethod
    def check(cls, options: Any, setup: Setup) -> None:
        """Four strengths; a batch that can be compared with a Gaussian; small views that are smaller."""
        check_samples(setup.micro_batch)
        if len(options.strengths) != 4:
            raise ConfigError(f"objective.options.strengths: expected four numbers, got {options.strengths}")
        if options.small_views and setup.grid == (1, 1):
            raise ConfigError(
                f"objective.options.small_views={options.small_views}: a view is one patch, and none is smaller; raise "
                f"data.crop or lower model.patch"
            )

    def __init__(self, setup: Setup):
        super().__init__(setup)
        model, chosen = setup.model, self.options
        self.encoder = Encoder(
            **setup.encoder_sizes,
            class_token=True,
            learned_positions=True,
            drop_path=chosen.drop_path,
            readout="class",
        )
        self.widths = (chosen.bottleneck, chosen.hidden, chosen.hidden, chosen.embedding)
        self.head = nn.Sequential(nn.Linear(model.dim, chosen.bottleneck), Projector(self.widths))
        sizes = (chosen.views, chosen.small_views, setup.grid, smaller(setup.grid))
        self.sampler = ViewSampler(*sizes, model.depth, chosen.embedding, chosen.slices)
        self.encoder.apply(init_weights)
        for name in ("encoder.cls_token", "encoder.pos_embed"):
            nn.init.trunc_normal_(self.get_parameter(name), std=INIT_STD)

    def views(self) -> list[View]:
        """Views of data.crop pixels, from `scale` to data.scale's upper bound of an image; then small ones."""
        data, chosen = self.setup.data, self.options
        brightness, contrast, saturation, hue = chosen.strengths
        scale = (min(chosen.scale, data.scale[1]), data.scale[1])
        view = View(0, scale, blur=0.5, solarise=0.2, strengths=(brightness, contrast, saturation, hue))
        small = replace(view, scale=(SMALL_SCALE, scale[0]))
        large, patch = [view] * chosen.views, self.setup.model.patch
        return crops_of(large, small, data.size, patch, scale, chosen.small_views, PUBLISHED)

    def draw(self, images: int, seed: int, step: int, first: int = 0, batch: int | None = None) -> ViewDraw:
        """Dropped branches and directions."""
        return self.sampler(images, seed, step, first)

    def forward(self, images: list[torch.Tensor], draw: ViewDraw) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """`images`: V views of every image, then L small ones, (B, h, w, C) each -> scalar fp32 loss, its two terms."""
        encoder = self.encoder
        keep = encoder.keep(draw.chance) if self.training else None
        parts = (images[: draw.views], draw.grid), (images[draw.views :], draw.small_grid)
        embedded = [encoder.embed(self.patchify(torch.cat(part)), grid) for part, grid in parts if part]
        tokens = encoder.class_tokens(torch.cat(embedded), draw.cu_seqlens, draw.max_seqlen, keep)
        if self.watch is not None:
            self.watch(tokens[: draw.images].detach(), draw)
        embeddings = self.head(tokens).float().view(draw.views + draw.small, draw.images, -1)
        gaussian, agreement = self.terms(embeddings, draw.directions)
        loss = self.options.weight * gaussian + (1 - self.options.weight) * agreement
        return loss, {"sigreg": gaussian.detach(), "agreement": agreement.detach()}

    def terms(self, embeddings: torch.Tensor, directions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(V + L, B, E) fp32, (E, K) -> SIGReg, of the views apart; mean square of what tells a view from the mean of
        its image's V large ones.
        """
        gaussian = sigreg(embeddings, directions, self.options.last_knot, self.options.knots)
        return gaussian, (embeddings - embeddings[: self.options.views].mean(0)).square().mean()

    def work(self, draw: ViewDraw) -> Work:
        """The work of a step on a batch, as executed here."""
        model, chosen = self.setup.model, self.options
        return step_work(
            Transformer(model.dim, model.depth, model.mlp_ratio),
            self.widths,
            slices=chosen.slices,
            values=self.setup.values,
            lengths=draw.lengths,
        )


def step_work(
    encoder: Transformer,
    widths: tuple[int, ...],
    *,
    slices: int,
    values: int,
    lengths: Sequence[int],
    used_rows_only: bool = True,
) -> Work:
    """Work of a LeJEPA step on views of `lengths` tokens, a class token among them; patches have `values` numbers.

    widths: of the projector. used_rows_only: the last block computes the class tokens alone, as here; published: all.
    """
    count = len(lengths)
    embedding = flops.linear(sum(lengths) - count, values, encoder.dim)
    stack = encoder.forward(list(lengths), [1] * count if used_rows_only else None)
    head = flops.linear(count, encoder.dim, widths[0]) + projector.work(count, widths)
    seen = flops.linear(count, widths[-1], slices)  # along the directions, which have no gradient
    return Work(0, {"encoder": embedding + stack, "head": head + seen}, embedding + seen)
