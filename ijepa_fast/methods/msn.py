"""MSN (Assran et al. 2022): anchors with patches missing and small ones are assigned to prototypes as a whole view is.

`encoder` and `head` have averages, which see the target view; `prototypes` have none. The views come from the loader.
What makes it fast here, exactly: all anchors, large and small, are one packed batch, of the large ones only the kept
patches are embedded; the last block of both encoders, norms and heads compute only the class tokens; an image's anchors
are added before they meet its target, in which cross-entropy is linear.
Shapes: B images; A large and L small anchors of each, of N and n patches, V = A + L; D width, E the head's output,
Q prototypes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ijepa_fast.config import ConfigError, key
from ijepa_fast.data import crop_of
from ijepa_fast.data.crops import View
from ijepa_fast.kernels.common.over_ranks import ranks, summed
from ijepa_fast.masks.anchors import AnchorDraw, AnchorSampler
from ijepa_fast.masks.crops import PUBLISHED, SMALL_SIDE, crops_of, smaller
from ijepa_fast.methods.method import Method, Setup
from ijepa_fast.models import flops, heads
from ijepa_fast.models.flops import Transformer, Work
from ijepa_fast.models.heads import Directions, HeadSizes, Moments, NormedHead
from ijepa_fast.models.initial import INIT_STD, init_weights
from ijepa_fast.models.vit import Encoder

RUNNING_MOMENTUM = 0.1  # of batch norm's running statistics, which nothing here reads
NORMS = ("bn1", "bn2")
VIEW, SMALL_VIEW = View(PUBLISHED, (0.3, 1.0), blur=0.5), View(SMALL_SIDE, (0.05, 0.3), blur=0.5)
STRENGTHS = (0.8, 0.8, 0.8, 0.2)  # of the jitter, at jitter=1


@dataclass
class Options:
    """MSN's options; the values here are those published for ViT-S/16."""

    anchors: int = key(1, "large anchors per image, of which patches are dropped", least=1, most=100)
    small_anchors: int = key(10, "small anchors per image, which are whole", least=0, most=100)
    small_crop: int | None = key(None, "side of these, pixels; null: as 96 beside 224", least=1, most=4096)
    patch_drop: float = key(0.15, "share of the patches that a large anchor drops", least=0, most=0.99)
    hidden: int = key(2048, "width of the head's two layers", least=1, most=65536)
    out: int = key(256, "width of the head's output, and of a prototype", least=1, most=65536)
    prototypes: int = key(1024, "to which views are assigned", least=2, most=10**7)
    temperature: float = key(0.1, "of the assignments", above=0, most=100)
    sharpening: float = key(0.25, "temperature that the targets have besides", above=0, most=100)
    sinkhorn: int = key(3, "rounds that make targets use the prototypes equally; 0: none", least=0, most=1000)
    me_max: float = key(
        1.0, "weight of the mean assignment's distance from all prototypes equally used", least=0, most=10**6
    )
    entropy: float = key(0.0, "weight of the entropy of an assignment", least=0, most=10**6)
    drop_path: float = key(0.0, "of the last block; linear from 0 at the first", least=0, most=0.99)
    jitter: float = key(0.5, "strength of the colour jitter", least=0, most=1)


class MSN(Method[AnchorDraw]):
    """`encoder` and `head`, their averages, and `prototypes`.

    `carried` holds the running statistics of the batch norms, of the averages' too, which see batches of their own:
    "<network>.<norm>.mean" and ".variance" (F,) fp32. They are kept as published, and nothing of the training reads
    them.
    """

    Options = Options
    undecayed = frozenset({"prototypes.weight"})
    unclipped = frozenset({"prototypes.weight"})

    @classmethod
    def check(cls, options: Any, setup: Setup) -> None:
        """No small view is larger than a large one, patches remain, and batch norm has rows."""
        patch, side, patches = setup.model.patch, options.small_crop, math.prod(setup.grid)
        if side is not None and (side % patch or side > min(setup.data.size)):
            raise ConfigError(
                f"objective.options.small_crop={side}: expected a multiple of model.patch={patch} that is at most "
                f"data.crop={setup.data.crop}"
            )
        if math.floor(patches * (1 - options.patch_drop)) < 1:
            raise ConfigError(
                f"objective.options.patch_drop={options.patch_drop}: expected a share that leaves some of the "
                f"{patches} patches of a crop"
            )
        if setup.micro_batch == 1:
            raise ConfigError(
                "batch_size: the head's batch norm needs at least 2 images in a micro-batch of all ranks, got 1; raise "
                "batch_size or lower engine.accumulation"
            )

    def __init__(self, setup: Setup):
        super().__init__(setup)
        model, chosen = setup.model, self.options
        self.encoder = Encoder(
            **setup.encoder_sizes,
            class_token=True,
            learned_positions=True,
            resampling=0.0,
            drop_path=chosen.drop_path,
            readout="class",
        )
        self.head = NormedHead(model.dim, chosen.hidden, chosen.out)
        self.prototypes = Directions(chosen.out, chosen.prototypes)
        small, drops = chosen.small_crop, model.depth if chosen.drop_path else 0
        grids = setup.grid, (small // model.patch, small // model.patch) if small else smaller(setup.grid)
        self.sampler = AnchorSampler(*grids, chosen.anchors, chosen.small_anchors, chosen.patch_drop, drops)
        self.apply(init_weights)
        nn.init.kaiming_normal_(self.encoder.patch_embed.proj.weight, nonlinearity="relu")
        for name in ("encoder.cls_token", "encoder.pos_embed"):
            nn.init.trunc_normal_(self.get_parameter(name), std=INIT_STD)
        self.keep_average("encoder", "head")
        for norm in (f"{network}.{norm}" for network in ("head", "target_head") for norm in NORMS):
            self.carried |= {f"{norm}.mean": torch.zeros(chosen.hidden), f"{norm}.variance": torch.ones(chosen.hidden)}

    def views(self) -> list[View]:
        """The target view and the large anchors, of data.crop pixels and data.scale; then small ones with what is below
        it, down to a twentieth. All are blurred by the same share of a crop as published, where it is of 224 pixels.
        """
        data, chosen, (rows, columns) = self.setup.data, self.options, self.sampler.small_grid
        colours: dict[str, Any] = {
            "jitter": VIEW.jitter if chosen.jitter else 0.0,
            "strengths": tuple(chosen.jitter * strength for strength in STRENGTHS),
        }
        large, small = replace(VIEW, **colours), replace(SMALL_VIEW, **colours)
        patch, scale = self.setup.model.patch, (data.scale[0], data.scale[1])
        views = crops_of([large] * (1 + chosen.anchors), small, data.size, patch, scale, chosen.small_anchors)
        size = crop_of((rows * patch, columns * patch))
        return views[: 1 + chosen.anchors] + [replace(view, crop=size) for view in views[1 + chosen.anchors :]]

    def draw(self, images: int, seed: int, step: int, first: int = 0, batch: int | None = None) -> AnchorDraw:
        """Kept patches and dropped branches."""
        return self.sampler(images, seed, step, first)

    def forward(self, images: list[torch.Tensor], draw: AnchorDraw) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """`images`: the target view, then A large and L small anchors, (B, side, side, C) each -> scalar fp32 loss."""
        target, large = self.patchify(images[0]), self.patchify(torch.cat(images[1 : 1 + draw.large]))
        small = self.patchify(torch.cat(images[1 + draw.large :])) if draw.small else None
        return self.loss_of_patches(target, large, small, draw)

    def loss_of_patches(
        self, target: torch.Tensor, large: torch.Tensor, small: torch.Tensor | None, draw: AnchorDraw
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss and its terms from patches of the views, (B*N, W), (A*B*N, W) and (L*B*n, W).

        Moves the running statistics.
        """
        embedding = self.target_embedding(target, draw)
        return self.loss_of(self.anchor_embeddings(large, small, draw), self.assignments(embedding))

    def loss_of(self, anchors: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss and its terms from `anchors` (V*B, E) and `targets` (B, Q)."""
        chosen = self.options
        logs = (self.prototypes(anchors) / chosen.temperature).log_softmax(1)
        terms = {"cross_entropy": -(targets * logs.unflatten(0, (-1, len(targets))).sum(0)).sum() / len(logs)}
        loss = terms["cross_entropy"]
        if chosen.me_max:
            mean = summed(logs.exp().mean(0)) / ranks()
            terms["me_max"] = math.log(len(mean)) - torch.special.entr(mean).sum()
            loss = loss + chosen.me_max * terms["me_max"]
        if chosen.entropy:
            terms["entropy"] = -(logs.exp() * logs).sum(1).mean()
            loss = loss + chosen.entropy * terms["entropy"]
        return loss, {name: term.detach() for name, term in terms.items()}

    def anchor_embeddings(self, large: torch.Tensor, small: torch.Tensor | None, draw: AnchorDraw) -> torch.Tensor:
        """Patches of the anchors, (A*B*N, W) and (L*B*n, W) -> the head's outputs (V*B, E)."""
        encoder = self.encoder
        tokens = encoder.embed(large, draw.grid, kept=draw.kept)
        if small is not None:
            tokens = torch.cat([tokens, encoder.embed(small, draw.small_grid)])
        keep = encoder.keep(draw.chance) if self.training and draw.chance is not None else None
        classes = encoder.class_tokens(tokens, draw.cu_seqlens, draw.max_seqlen, keep)
        found, moments = self.head(classes, draw.groups)
        self._move("head", moments)
        return found

    @torch.no_grad()
    def target_embedding(self, target: torch.Tensor, draw: AnchorDraw) -> torch.Tensor:
        """Patches of the target view (B*N, W) -> the averages' outputs (B, E)."""
        encoder = self.averaged["encoder"]
        tokens = encoder.embed(target, draw.grid)
        classes = encoder.class_tokens(tokens, draw.target_cu_seqlens, 1 + math.prod(draw.grid))
        found, moments = self.averaged["head"](classes, [draw.images])
        self._move("target_head", moments)
        return found

    @torch.no_grad()
    def sharpened(self, embedding: torch.Tensor) -> torch.Tensor:
        """(B, E) -> sharpened assignments (B, Q)."""
        chosen = self.options
        # A softmax to the power of 1 / s, normalised, is one at s times its temperature.
        return (self.prototypes(embedding) / (chosen.temperature * chosen.sharpening)).softmax(1)

    @torch.no_grad()
    def assignments(self, embedding: torch.Tensor) -> torch.Tensor:
        """(B, E) -> the targets (B, Q)."""
        found = self.sharpened(embedding)
        return heads.sinkhorn(found, self.options.sinkhorn) if self.options.sinkhorn else found

    def work(self, draw: AnchorDraw) -> Work:
        """The work of a step on a batch, as executed here."""
        model, chosen = self.setup.model, self.options
        return step_work(
            Transformer(model.dim, model.depth, model.mlp_ratio),
            HeadSizes(chosen.hidden, chosen.out, chosen.prototypes),
            values=self.setup.values,
            patches=math.prod(draw.grid),
            kept=len(draw.kept),
            small_patches=math.prod(draw.small_grid),
            anchors=draw.large,
            small=draw.small,
            images=draw.images,
        )

    def _move(self, network: str, moments: dict[str, list[Moments]]) -> None:
        """Move the running statistics, once for each size of views."""
        for norm, groups in moments.items():
            for mean, variance in groups:
                self.carried[f"{network}.{norm}.mean"].lerp_(mean, RUNNING_MOMENTUM)
                self.carried[f"{network}.{norm}.variance"].lerp_(variance, RUNNING_MOMENTUM)


def step_work(
    encoder: Transformer,
    head: HeadSizes,
    *,
    values: int,
    patches: int,
    kept: int,
    small_patches: int,
    anchors: int = Options.anchors,
    small: int = Options.small_anchors,
    images: int = 1,
    used_rows_only: bool = True,
) -> Work:
    """Work of an MSN step on `anchors` large and `small` small anchors per image, `kept` patches of a large one.

    used_rows_only: only kept patches are embedded and the last blocks compute the class tokens alone, as this project's
    rendering does; not the published one, whose heads do all the same.
    """
    targets, views = [1 + patches] * images, (anchors + small) * images
    sequences = [1 + kept] * anchors * images + [1 + small_patches] * small * images
    embedded = (kept if used_rows_only else patches) * anchors + small_patches * small
    embedding = flops.linear(embedded * images, values, encoder.dim)
    teacher, student = (
        encoder.forward(part, [1] * len(part) if used_rows_only else None) for part in (targets, sequences)
    )
    teacher += flops.linear(patches * images, values, encoder.dim) + head.forward(encoder.dim, images, images)
    return Work(teacher, {"encoder": embedding + student, "head": head.forward(encoder.dim, views, views)}, embedding)
