"""DINO (Caron et al. 2021): self-distillation of class tokens between large and small crops of an image.

`encoder` and `head` are the student; their averages are the teacher. The views come from the loader; temperature and
dropped branches come with the draw. What makes it fast here, exactly: all crops of the student are one packed batch;
the last block of student and teacher, norms and heads compute only the class tokens; of the pairs of crops, the targets
of a crop are added before its cross-entropy, which is linear in them.
Shapes: B images, L small crops per image, N and n patches of a large and a small crop, D width, Q prototypes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ijepa_fast.config import key
from ijepa_fast.data.crops import View
from ijepa_fast.masks.crops import LARGE, PUBLISHED, SMALL_SIDE, CropDraw, CropSampler, crops_of
from ijepa_fast.methods.method import Method, Setup
from ijepa_fast.models import flops
from ijepa_fast.models.flops import Transformer, Work
from ijepa_fast.models.heads import Head, HeadSizes
from ijepa_fast.models.initial import INIT_STD, init_weights
from ijepa_fast.models.vit import Encoder

STUDENT_TEMPERATURE = 0.1
CENTRE_MOMENTUM = 0.9
LARGE_VIEWS = (View(PUBLISHED, (0.4, 1.0), blur=1.0), View(PUBLISHED, (0.4, 1.0), blur=0.1, solarise=0.2))
SMALL_VIEW = View(SMALL_SIDE, (0.05, 0.4), blur=0.5)


@dataclass
class Options:
    """DINO's options; the values here are those of the published command for 100 epochs."""

    small_crops: int = key(8, "small crops per image", least=1, most=100)
    hidden: int = key(2048, "width of the head's two layers", least=1, most=65536)
    bottleneck: int = key(256, "width of the head's bottleneck", least=1, most=65536)
    prototypes: int = key(65536, "outputs of the head", least=1, most=10**7)
    norm_last_layer: bool = key(True, "whether the prototypes' gains stay 1")
    drop_path: float = key(0.1, "of the last block; linear from 0 at the first", least=0, most=0.99)
    temperature: float = key(0.04, "of the teacher, reached from first_temperature", above=0, most=100)
    first_temperature: float = key(0.04, "of the teacher, at the start", above=0, most=100)
    temperature_epochs: float = key(0, "over which the teacher's temperature rises", least=0, most=10**6)
    frozen_epochs: float = key(1, "in which the prototypes do not learn", least=0, most=10**6)


class DINO(Method[CropDraw]):
    """The student's `encoder` and `head`, and their averages, the teacher. `carried` holds the centre (1, Q) fp32."""

    Options = Options

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
        learned = not chosen.norm_last_layer
        self.head = Head(model.dim, chosen.hidden, chosen.bottleneck, chosen.prototypes, learned)
        self.sampler = CropSampler(
            setup.grid,
            chosen.small_crops,
            model.depth,
            (chosen.first_temperature, chosen.temperature),
            int(chosen.temperature_epochs * setup.steps_per_epoch),
            int(chosen.frozen_epochs * setup.steps_per_epoch),
            masked=False,
        )
        self.apply(init_weights)
        for name in ("encoder.cls_token", "encoder.pos_embed"):
            nn.init.trunc_normal_(self.get_parameter(name), std=INIT_STD)
        self.keep_average("encoder", "head")
        # Not a buffer, which the engine would cast to the model's precision.
        self.carried = {"centre": torch.zeros(1, chosen.prototypes)}

    def views(self) -> list[View]:
        """Large crops of data.crop pixels and data.scale, then small ones."""
        data, small_crops = self.setup.data, self.options.small_crops
        scale = (data.scale[0], data.scale[1])
        return crops_of(LARGE_VIEWS, SMALL_VIEW, data.size, self.setup.model.patch, scale, small_crops)

    def draw(self, images: int, seed: int, step: int, first: int = 0, batch: int | None = None) -> CropDraw:
        """Dropped branches and the step's settings."""
        return self.sampler(images, seed, step, first)

    def forward(self, images: list[torch.Tensor], draw: CropDraw) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """`images`: 2 large, then L small crops of every image, (B, h, w, C) each -> scalar fp32 loss."""
        large, small = (self.patchify(torch.cat(part)) for part in (images[:LARGE], images[LARGE:]))
        return self.loss_of_patches(large, small, draw), {}

    def loss_of_patches(self, large: torch.Tensor, small: torch.Tensor, draw: CropDraw) -> torch.Tensor:
        """The loss from patches of the crops, (2*B*N, W) and (L*B*n, W). Moves the centre."""
        with torch.no_grad():
            teacher = self.averaged["head"]
            logits = teacher.last_layer(teacher.bottleneck(self.teacher_tokens(large, draw)))
            targets = ((logits.float() - self.carried["centre"]) / draw.temperature).softmax(1)
            self._move_centre(logits)
        student = self.head.last_layer(self.head.bottleneck(self.student_tokens(large, small, draw)), draw.frozen)
        # A large crop learns from the other one, a small crop from both.
        first, second = targets.chunk(LARGE)
        wanted = torch.cat([second, first, *[first + second] * draw.small])
        total = F.cross_entropy(student.float() / STUDENT_TEMPERATURE, wanted, reduction="sum")
        return total / (LARGE * (LARGE - 1 + draw.small) * draw.images)

    def student_tokens(self, large: torch.Tensor, small: torch.Tensor, draw: CropDraw) -> torch.Tensor:
        """Patches of the crops, (2*B*N, W) and (L*B*n, W) -> class tokens ((2 + L)*B, D), final norm applied."""
        encoder = self.encoder
        tokens = torch.cat([encoder.embed(large, draw.grid), encoder.embed(small, draw.small_grid)])
        keep = encoder.keep(draw.chance) if self.training and draw.chance is not None else None
        return encoder.class_tokens(tokens, draw.cu_seqlens, draw.max_seqlen, keep)

    def teacher_tokens(self, large: torch.Tensor, draw: CropDraw) -> torch.Tensor:
        """Patches of the large crops (2*B*N, W) -> the average's class tokens (2*B, D), final norm applied."""
        encoder = self.averaged["encoder"]
        ends = draw.cu_seqlens[: LARGE * draw.images + 1]
        return encoder.class_tokens(encoder.embed(large, draw.grid), ends, draw.max_seqlen)

    def work(self, draw: CropDraw) -> Work:
        """The work of a step on a batch, as executed here."""
        model, chosen = self.setup.model, self.options
        return step_work(
            Transformer(model.dim, model.depth, model.mlp_ratio),
            HeadSizes(chosen.hidden, chosen.bottleneck, chosen.prototypes),
            values=self.setup.values,
            large_patches=draw.patches,
            small_patches=draw.small_patches,
            small=draw.small,
            images=draw.images,
        )

    def _move_centre(self, logits: torch.Tensor) -> None:
        mean = logits.mean(0, keepdim=True, dtype=torch.float32)
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            torch.distributed.all_reduce(mean)
            mean /= torch.distributed.get_world_size()
        self.carried["centre"].lerp_(mean, 1 - CENTRE_MOMENTUM)


def step_work(
    encoder: Transformer,
    head: HeadSizes,
    *,
    values: int,
    large_patches: int,
    small_patches: int,
    small: int = Options.small_crops,
    images: int = 1,
    used_rows_only: bool = True,
) -> Work:
    """Work of a DINO step on 2 large and `small` small crops per image.

    used_rows_only: the last blocks compute the class tokens alone, as this project's rendering does; not the published
    one, whose heads do all the same.
    """
    large = [1 + large_patches] * images * LARGE
    crops = large + [1 + small_patches] * images * small
    embedding = flops.linear(sum(crops) - len(crops), values, encoder.dim)
    stacks = [encoder.forward(part, [1] * len(part) if used_rows_only else None) for part in (large, crops)]
    teacher = flops.linear(sum(large) - len(large), values, encoder.dim) + stacks[0]
    teacher += head.forward(encoder.dim, len(large), len(large))
    trained = {"student": embedding + stacks[1], "head": head.forward(encoder.dim, len(crops), len(crops))}
    return Work(teacher, trained, embedding)
