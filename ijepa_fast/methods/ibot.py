"""iBOT (Zhou et al. 2022): self-distillation of class tokens between crops and of masked patches within a crop.

`encoder` and `head` are the student; their averages are the teacher. The views come from the loader; masks, temperature
and dropped branches come with the draw. What makes it fast here, exactly: all crops of the student are one packed
batch; its last block, norm and head compute only the class tokens and the masked patches; the teacher's 8192-wide layer
too, since the mean of its logits over all patches, which the patch centre needs, is that layer applied to the mean of
its inputs.
Shapes: B images, L small crops per image, N and n patches of a large and a small crop, D width, R masked patches, Q
prototypes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from ijepa_fast.config import key
from ijepa_fast.data import Size, size_of
from ijepa_fast.data.crops import View
from ijepa_fast.kernels.masked_gather import masked_gather
from ijepa_fast.masks.crops import LARGE, PUBLISHED, SMALL_SIDE, CropDraw, CropSampler, crops_of
from ijepa_fast.methods.method import Method, Setup
from ijepa_fast.models import flops
from ijepa_fast.models.blocks import run_blocks
from ijepa_fast.models.flops import Transformer, Work
from ijepa_fast.models.heads import Head, HeadSizes
from ijepa_fast.models.initial import INIT_STD, init_weights
from ijepa_fast.models.layouts import Dense, Packed, Rows
from ijepa_fast.models.vit import Encoder

STUDENT_TEMPERATURE = 0.1
CENTRE_MOMENTUM = 0.9
LARGE_VIEWS = (View(PUBLISHED, (0.25, 1.0), blur=1.0), View(PUBLISHED, (0.25, 1.0), blur=0.1, solarise=0.2))
SMALL_VIEW = View(SMALL_SIDE, (0.05, 0.25), blur=0.5)


@dataclass
class Options:
    """iBOT's options; the values here are the published ones."""

    small_crops: int = key(10, "small crops per image", least=1, most=100)
    hidden: int = key(2048, "width of the head's two layers", least=1, most=65536)
    bottleneck: int = key(256, "width of the head's bottleneck", least=1, most=65536)
    prototypes: int = key(8192, "outputs of the head", least=1, most=10**7)
    drop_path: float = key(0.1, "of the last block; linear from 0 at the first", least=0, most=0.99)
    temperature: float = key(0.07, "of the teacher, reached from first_temperature", above=0, most=100)
    first_temperature: float = key(0.04, "of the teacher, at the start", above=0, most=100)
    temperature_epochs: float = key(30, "over which the teacher's temperature rises", least=0, most=10**6)
    frozen_epochs: float = key(1, "in which the prototypes do not learn", least=0, most=10**6)


class IBOT(Method[CropDraw]):
    """The student's `encoder` and `head`, and their averages, the teacher.

    `carried` holds the two centres (1, Q) fp32.
    """

    Options = Options
    former_names: ClassVar = {"encoder.backbone.": "encoder.", "encoder.head.": "head."}

    def __init__(self, setup: Setup):
        super().__init__(setup)
        model, chosen = setup.model, self.options
        self.encoder = Encoder(
            **setup.encoder_sizes,
            class_token=True,
            learned_positions=True,
            mask_token=True,
            drop_path=chosen.drop_path,
            readout="class",
        )
        self.head = Head(model.dim, chosen.hidden, chosen.bottleneck, chosen.prototypes)
        self.sampler = CropSampler(
            setup.grid,
            chosen.small_crops,
            model.depth,
            (chosen.first_temperature, chosen.temperature),
            int(chosen.temperature_epochs * setup.steps_per_epoch),
            int(chosen.frozen_epochs * setup.steps_per_epoch),
        )
        self.apply(init_weights)
        for name in ("encoder.cls_token", "encoder.pos_embed"):
            nn.init.trunc_normal_(self.get_parameter(name), std=INIT_STD)
        self.keep_average("encoder", "head")
        # Not buffers, which the engine would cast to the model's precision.
        self.carried = {name: torch.zeros(1, chosen.prototypes) for name in ("centre", "patch_centre")}

    def views(self) -> list[View]:
        """Large crops of data.crop pixels and data.scale, then small ones."""
        data, small_crops = self.setup.data, self.options.small_crops
        return views_of(data.size, self.setup.model.patch, (data.scale[0], data.scale[1]), small_crops)

    def draw(self, images: int, seed: int, step: int, first: int = 0, batch: int | None = None) -> CropDraw:
        """Masks, dropped branches and the step's settings."""
        return self.sampler(images, seed, step, first)

    def forward(self, images: list[torch.Tensor], draw: CropDraw) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """`images`: 2 large, then L small crops of every image, (B, h, w, C) each -> scalar fp32 loss."""
        large, small = (self.patchify(torch.cat(part)) for part in (images[:LARGE], images[LARGE:]))
        classes, patches = self.losses(large, small, draw)
        return classes + patches, {"class": classes.detach(), "patch": patches.detach()}

    def losses(self, large: torch.Tensor, small: torch.Tensor, draw: CropDraw) -> tuple[torch.Tensor, torch.Tensor]:
        """The two terms, fp32 scalars: of class tokens between crops, of masked patches within a crop.

        large, small: patches of the crops, (2*B*N, W) and (L*B*n, W). Moves the centres.
        """
        with torch.no_grad():
            class_logits, patch_logits, patch_mean = self.teacher(large, draw)
            classes = ((class_logits.float() - self.carried["centre"]) / draw.temperature).softmax(1)
            patches = ((patch_logits.float() - self.carried["patch_centre"]) / draw.temperature).softmax(1)
            self._move_centres(class_logits, patch_mean)
        student_classes, student_patches = self.student(large, small, draw)
        # A large crop learns from the other one, a small crop from both; cross-entropy is linear in the target.
        first, second = classes.chunk(LARGE)
        targets = torch.cat([second, first, *[first + second] * draw.small])
        pairs = LARGE * (LARGE - 1 + draw.small)
        class_loss = cross_entropy(student_classes, targets).sum() / (pairs * draw.images)
        return class_loss, (cross_entropy(student_patches, patches) * draw.patch_weight).sum()

    def student(self, large: torch.Tensor, small: torch.Tensor, draw: CropDraw) -> tuple[torch.Tensor, torch.Tensor]:
        """Patches of the crops, (2*B*N, W) and (L*B*n, W) -> logits of the class tokens ((2 + L)*B, Q) and masked
        patches (R, Q).
        """
        encoder = self.encoder
        tokens = [encoder.embed(large, draw.grid, draw.mask), encoder.embed(small, draw.small_grid)]
        keep = encoder.keep(draw.chance) if self.training and draw.chance is not None else None
        sequences = Packed(draw.cu_seqlens, draw.max_seqlen)
        pick = partial(masked_gather, index=draw.used, unique=True)
        last = replace(sequences, rows=Rows(pick, draw.used_cu_seqlens, draw.used_max_seqlen))
        x = run_blocks(encoder.blocks, encoder.norm, torch.cat(tokens), None, sequences, last, encoder.recompute, keep)
        logits = self.head.last_layer(self.head.bottleneck(x), draw.frozen)
        return logits[draw.class_rows], logits[draw.patch_rows]

    def teacher(self, large: torch.Tensor, draw: CropDraw) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Patches of the large crops (2*B*N, W) -> logits of the class tokens (2*B, Q) and masked patches (R, Q), and
        their mean over all patches (1, Q).
        """
        encoder, head = self.averaged["encoder"], self.averaged["head"]
        crops = LARGE * draw.images
        x = run_blocks(encoder.blocks, encoder.norm, encoder.embed(large, draw.grid), None, Dense(crops))
        z = head.bottleneck(x)
        by_crop = z.view(crops, -1, z.shape[1])
        mean = by_crop[:, 1:].mean((0, 1), dtype=torch.float32).to(z.dtype)[None]
        logits = head.last_layer(torch.cat([by_crop[:, 0], mean, z[draw.teacher_rows]]))
        return logits[:crops], logits[crops + 1 :], logits[crops : crops + 1]

    def work(self, draw: CropDraw) -> Work:
        """The work of a step on a batch, as executed here."""
        model, chosen = self.setup.model, self.options
        return step_work(
            Transformer(model.dim, model.depth, model.mlp_ratio),
            HeadSizes(chosen.hidden, chosen.bottleneck, chosen.prototypes),
            patch=model.patch,
            channels=self.setup.data.channels,
            global_patches=draw.patches,
            local_patches=draw.small_patches,
            locals_=draw.small,
            masked=int(draw.mask.sum()),
            images=draw.images,
        )

    def _move_centres(self, class_logits: torch.Tensor, patch_mean: torch.Tensor) -> None:
        means = torch.stack([class_logits.mean(0, keepdim=True, dtype=torch.float32), patch_mean.float()])
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            torch.distributed.all_reduce(means)
            means /= torch.distributed.get_world_size()
        self.carried["centre"].lerp_(means[0], 1 - CENTRE_MOMENTUM)
        self.carried["patch_centre"].lerp_(means[1], 1 - CENTRE_MOMENTUM)


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross-entropy (r,) in fp32 of student `logits` (r, Q) against `targets` (r, Q)."""
    return F.cross_entropy(logits.float() / STUDENT_TEMPERATURE, targets, reduction="none")


def views_of(
    crop: int | Size, patch: int, scale: tuple[float, float] = (0.25, 1.0), small_crops: int = Options.small_crops
) -> list[View]:
    """The published views for large crops of `crop`, a side or height and width, and `scale`: see `crops_of`."""
    return crops_of(LARGE_VIEWS, SMALL_VIEW, size_of(crop), patch, scale, small_crops)


def step_work(
    encoder: Transformer,
    head: HeadSizes,
    *,
    patch: int,
    global_patches: int,
    local_patches: int,
    globals_: int = LARGE,
    locals_: int = Options.small_crops,
    masked: int | None = None,
    images: int = 1,
    channels: int = 3,
) -> Work:
    """Work of an iBOT step on `globals_` large and `locals_` small crops per image.

    masked: masked patches of the batch. None: every token of every crop goes through the whole head, as published.
    A number: the student's last block and head see class tokens and masked patches alone; so does the teacher's last
    layer, with one row more for the patch centre, as this project's rendering does.
    """
    crops = images * [1 + global_patches] * globals_ + images * [1 + local_patches] * locals_
    pixels = channels * patch**2
    large, small = images * globals_, images * locals_
    embedding = flops.linear(sum(crops) - len(crops), pixels, encoder.dim)
    tokens = large * (1 + global_patches)
    student_rows, prototype_rows, wanted = sum(crops), tokens, None
    if masked is not None:
        wanted = [1 + masked, *[1] * (len(crops) - 1)]  # in whichever large crops they lie
        student_rows, prototype_rows = large + small + masked, large + masked + 1
    student_head = head.forward(encoder.dim, student_rows, student_rows)
    teacher = flops.linear(large * global_patches, pixels, encoder.dim) + encoder.forward(crops[:large])
    teacher += head.forward(encoder.dim, tokens, prototype_rows)
    return Work(teacher, {"student": embedding + encoder.forward(crops, wanted), "head": student_head}, embedding)
