"""I-JEPA in one place: from a batch of images and masks to a loss.

Paper: Assran et al. 2023, section 3. What is not the paper's is an option, off by default (docs/options.md).
Shapes: B images, N patches, T context tokens, U target rows, D width.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from ijepa_fast.agree import check_samples, check_targets
from ijepa_fast.config import ConfigError, check_width, key
from ijepa_fast.kernels.target_loss import target_loss
from ijepa_fast.masks.channels import hide_channels, seen_channels
from ijepa_fast.masks.inside import held
from ijepa_fast.masks.packing import GRAPH_BITS, MaskDraw, pack, whole_groups
from ijepa_fast.masks.samplers import POLICY, hidden_channels, sampler_of
from ijepa_fast.masks.views import directions
from ijepa_fast.masks.visible import scale_in
from ijepa_fast.methods.method import Method, Setup
from ijepa_fast.models import teacher as teachers
from ijepa_fast.models.flops import Transformer, Work
from ijepa_fast.models.fp8 import FP8Block
from ijepa_fast.models.initial import INIT_STD, init_weights, init_xavier
from ijepa_fast.models.prediction_work import step_saved, step_work
from ijepa_fast.models.predictor import Predictor
from ijepa_fast.models.projector import Projector
from ijepa_fast.models.regulariser import Regulariser
from ijepa_fast.models.target_norm import TargetNorm
from ijepa_fast.models.vit import Encoder

TRIED = 64  # draws among which the largest is looked for


@dataclass
class Options:
    """I-JEPA's options; its masks are in the section `mask`. Behind `target`, none is published."""

    loss: str = key("l2", "l2: paper; smooth_l1: published code", choices=("l2", "smooth_l1"))
    target: str = key("features", "of the target encoder, or normalised pixels", choices=("features", "pixels"))
    target_norm: str = key(
        "token",
        "what targets are normalised by; token: published",
        choices=("token", "position", "position_token", "batch", "none"),
    )
    target_momentum: float = key(0.99, "of a place's running statistics, target_norm=position", least=0, most=0.9999)
    target_layers: int = key(1, "last blocks whose normalised mean is the target; 0: all blocks", least=0, most=1000)
    teacher: str = key(
        "ema",
        "the target encoder: the average; a frozen one; a frozen one of random weights, those the encoder begins with",
        choices=("ema", "frozen", "random"),
    )
    teacher_from: str | None = key(None, "the frozen one: a run, a checkpoint, a Hugging Face folder", path=True)
    teacher_cache: str | None = key(
        None, "a folder for its targets, which are then computed once, before training", path=True
    )
    regulariser: str = key("none", "of pooled context features", choices=("none", "vicreg", "sigreg"))
    regulariser_weight: float | None = key(
        None, "null: .001 of vicreg, .02 of sigreg, as published", least=0, most=10**6
    )
    projector: list[int] = key(
        [], "widths of layers between pooled features and the regulariser; none: no layer", least=1, most=65536
    )
    slices: int = key(256, "random directions of sigreg in a step", least=1, most=65536)
    mask_sets: int = key(
        1, "sets of context and targets of an image, for one pass of the target encoder", least=1, most=1000
    )
    init: str = key("published", "of weights; xavier: uniform, as MAE's", choices=("published", "xavier"))
    visible_weight: float = key(
        0.0, "of a loss on visible tokens too, each by 1 over the root of its distance to a target", least=0, most=1000
    )
    visible_epochs: float = key(0.0, "over which this weight grows from 0", least=0, most=10**6)


class IJEPA(Method[MaskDraw]):
    """Context encoder, predictor and, outside the module tree, the target encoder.

    Unless init is xavier, weight matrices are truncated normal .02, and the patch embedding's standard deviation is
    `model.patch_std`: what a patch adds to its position grows with it and with the root of its number of values; the
    published one was chosen for patches of 14 and 16 pixels, and at 4 leaves the targets little but their positions.
    """

    Options = Options
    capabilities = frozenset({"graphs", "fp8", "target_stream", "forecast"})
    reads_mask = True

    @classmethod
    def check(cls, options: Any, setup: Setup) -> None:
        """The predictor has the encoder's heads, the options go together, and the masks fit the grid."""
        check_width("predictor_dim", setup.model)
        check_targets(options, setup.model.depth, setup.data.crops_per_image)
        check_samples(setup.micro_batch, options.regulariser)
        mask, patches = asdict(setup.mask), setup.grid[0] * setup.grid[1]
        if setup.mask.budget is not None and setup.mask.budget > patches:
            raise ConfigError(f"mask.budget: expected at most the {patches} patches of a crop, got {setup.mask.budget}")
        hidden_channels(mask, setup.data.channels, setup.foreign)
        if ":" not in setup.mask.strategy:  # somebody else's are made with the method
            sampler_of(mask, setup.grid)

    def __init__(self, setup: Setup):
        super().__init__(setup)
        model, mask = setup.model, asdict(setup.mask)
        self.policy: dict[str, Any] = {name: mask[name] for name in POLICY}
        self.hidden = hidden_channels(mask, setup.data.channels, setup.foreign)
        self.sampler = sampler_of(mask, setup.grid)
        self.encoder = Encoder(**setup.encoder_sizes)
        self.predictor = Predictor(
            self.encoder.grid,
            model.dim,
            model.predictor_dim,
            model.predictor_depth,
            model.heads,
            out_dim=setup.values if self.options.target == "pixels" else None,
            recompute=model.recompute,
        )
        self.widths = [model.dim, *self.options.projector]
        self.projector = Projector(self.widths) if self.options.projector else None
        chosen = self.options
        self.regulariser = Regulariser(chosen.regulariser, chosen.regulariser_weight, chosen.slices)
        self.target_norm = TargetNorm(chosen.target_norm, chosen.target_momentum)
        self.fp8_blocks: list[FP8Block] | None = None  # all but the last of the target encoder, see `use_fp8`
        if self.options.init == "xavier":
            self.apply(init_xavier)
        else:
            self.apply(init_weights)
            with torch.no_grad():
                self.encoder.patch_embed.proj.weight.mul_(model.patch_std / INIT_STD)
        nn.init.trunc_normal_(self.predictor.mask_token, std=INIT_STD)
        if self.options.teacher == "ema":
            self.keep_average("encoder")
        else:
            if chosen.teacher == "frozen":
                self.wanted = {"teacher": chosen.teacher_from}
            else:
                self.frozen["teacher"] = copy.deepcopy(self.encoder).requires_grad_(False).eval()
            if path := chosen.teacher_cache:
                self.kept_in, self.kept_shape = ("teacher_cache", path), (self.encoder.patches, model.dim)
            self.carried["teacher"] = torch.zeros(1, dtype=torch.int64)
        if self.target_norm.by_place:
            width = setup.values if self.options.target == "pixels" else model.dim
            self.carried["target_statistics"] = self.target_norm.fresh(self.encoder.patches, width)
            self.capabilities = type(self).capabilities - {"graphs"}  # its statistics move in every step
        self.exchanges = self.options.target_norm != "token" or self.options.regulariser != "none"

    @property
    def target_encoder(self) -> Encoder:
        """The encoder's average, or the frozen teacher."""
        return self.averaged["encoder"] if self.averaged else self.frozen["teacher"]

    @property
    def target_layers(self) -> int:
        """Last blocks of the target encoder whose mean is the target."""
        return self.options.target_layers or len(self.target_encoder.blocks)

    def give(self, name: str, encoder: Encoder, mean: Sequence[float], std: Sequence[float]) -> None:
        """Take the frozen teacher; see Method. Raises ConfigError for one whose features are no targets here."""
        path, layers = self.options.teacher_from, self.options.target_layers
        teachers.check_teacher(path, encoder, (mean, std), self.encoder, self.setup.data, layers)
        encoder.readout = "patches"
        self.frozen[name] = encoder
        self.know_teacher()

    def ready(self) -> None:
        """Know the random teacher; another one is given later."""
        if self.frozen:
            self.know_teacher()

    def know_teacher(self) -> None:
        """Note the frozen teacher's weights, by which a resume knows them again."""
        teacher = self.frozen["teacher"]
        self.given, self.former = teachers.fingerprint(teacher), teachers.former_fingerprint(teacher)
        self.carried["teacher"].fill_(self.given)

    def resumed(self) -> None:
        """Raise ConfigError for another frozen teacher than the run was begun with."""
        if self.frozen:
            known, begun = (self.given, self.former), int(self.carried["teacher"])
            teachers.check_same(self.options.teacher_from, known, begun)
            self.carried["teacher"].fill_(self.given)

    def keep(self, images: torch.Tensor) -> torch.Tensor:
        """The targets of all patches of `images`, (B, N, D), before their norm."""
        return teachers.whole_targets(self.target_encoder, self.patchify(images), len(images), self.target_layers)

    def keeps(self) -> dict[str, Any]:
        """The teacher's weights and the layers."""
        return {"teacher's weights": self.given, "objective.options.target_layers": self.target_layers}

    def recall(self, draw: MaskDraw, kept: torch.Tensor, keys: torch.Tensor) -> MaskDraw:
        """The draw with the targets of its union."""
        images = keys[torch.arange(draw.images).repeat_interleave(draw.union_lengths)]
        return replace(draw, features=kept[images, draw.union_places.long()])

    def use_fp8(self) -> None:
        """Run the target encoder in fp8 from now on, but for its last block. Its weights must lie where they will."""
        if self.kept_in is not None:
            raise ConfigError(
                "engine.target_precision=fp8: cached targets are made in engine.precision; set it to null"
            )
        if self.target_encoder.cls_token is not None:
            raise ConfigError("engine.target_precision=fp8: the frozen teacher has a class token, which it cannot do")
        blocks: Any = self.target_encoder.blocks
        self.fp8_blocks = [FP8Block(block) for block in blocks[:-1]]

    def use_graphs(self) -> None:
        """Draw masks of few sizes from now on."""
        self.policy["padding"] = GRAPH_BITS

    def largest(self, draw: MaskDraw) -> MaskDraw:
        """Of some draws the one that keeps most for the backward pass."""
        return max((self.draw(draw.images, 0, step) for step in range(TRIED)), key=self.saved_values)

    def average_changed(self) -> None:
        """Called whenever the target encoder's weights were written; those of a frozen one never are."""
        if self.averaged:
            for block in self.fp8_blocks or ():
                block.refresh()

    def draw(self, images: int, seed: int, step: int, first: int = 0, batch: int | None = None) -> MaskDraw:
        """The masks of a micro-batch, packed. Those are drawn, too, that a policy compares its contexts with."""
        start, last = first, first + images
        stop = last
        if self.policy["policy"] != "full":
            start, stop = whole_groups(first, last, batch or last, self.policy["group"])
        sample = partial(self.sampler, stop - start, seed, step)
        # Further mask sets are those of places behind the step's.
        places = [start + number * (batch or last) for number in range(self.options.mask_sets)]
        inside = None if self.inside is None else self.inside(step * (batch or last) + np.arange(start, stop))
        masks = [held(sample, place, inside) for place in places]
        visible, part = self.options.visible_weight > 0, slice(first - start, last - start)
        drawn = pack(masks, **self.policy, part=part, grid=self.encoder.grid if visible else None)
        if visible:
            grows = self.options.visible_epochs * self.setup.steps_per_epoch
            drawn = replace(drawn, visible_scale=scale_in(step, self.options.visible_weight, grows))
        if self.options.regulariser == "sigreg":
            drawn = replace(drawn, directions=directions(self.widths[-1], self.options.slices, seed, step))
        if not self.hidden:
            return drawn
        return replace(drawn, channels=seen_channels(images, seed, step, first, self.setup.data.channels, self.hidden))

    def forward(self, images: torch.Tensor, draw: MaskDraw) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """`images` (B, H, W, C) and their masks -> scalar fp32 loss, and its terms where there are several."""
        return self.losses(self.patchify(images), draw)

    def loss_of_patches(self, patches: torch.Tensor, draw: MaskDraw) -> torch.Tensor:
        """The loss alone from `patches` (B*N, W)."""
        return self.losses(patches, draw)[0]

    def losses(self, patches: torch.Tensor, draw: MaskDraw) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss from `patches` (B*N, W): targets without gradient, then context, predictions, loss."""
        beside = self.target_stream
        if beside is not None:  # it needs the patches and the average that the last step left on this stream
            beside.wait_stream(torch.cuda.current_stream())
        with torch.no_grad(), torch.cuda.stream(beside):
            targets = self.targets(patches, draw)
        context = self.encoder.context(self.seen(patches, draw), draw)
        predictions = self.predictor(context, draw.by_set)
        visible = None
        if draw.visible_targets is not None:
            predictions, visible = predictions.split([len(draw.prediction_rows), len(draw.visible_targets)])
        if beside is not None:
            torch.cuda.current_stream().wait_stream(beside)
            targets.record_stream(torch.cuda.current_stream())
        norm = self.target_norm(targets, draw, self.carried.get("target_statistics"))
        loss = total = target_loss(predictions, targets, draw.prediction_rows, self.options.loss, **norm)
        terms: dict[str, torch.Tensor] = {}
        if visible is not None:
            assert draw.visible_targets is not None
            assert draw.visible_scale is not None
            rows, norm["weights"] = draw.visible_targets, draw.visible_weights
            term = target_loss(visible, targets, rows, self.options.loss, **norm)
            total, terms = total + draw.visible_scale * term, {"visible": term.detach()}
        if self.options.regulariser != "none":
            term, more = self.regulariser(context, targets, draw, self.projector)
            total, terms = total + term, terms | more
        return total, {"prediction": loss.detach()} | terms if terms else {}

    def seen(self, patches: torch.Tensor, draw: MaskDraw) -> torch.Tensor:
        """`patches` (B*N, W) as the contexts see them."""
        return patches if draw.channels is None else hide_channels(patches, draw.channels, self.encoder.patch)

    def targets(self, patches: torch.Tensor, draw: MaskDraw) -> torch.Tensor:
        """What is to be predicted, (U, D), in the order of `draw.union_index`, before the target norm."""
        if self.options.target == "pixels":
            return patches[draw.union_index, : self.setup.values]
        features = draw.features
        if features is None:
            features = self.target_encoder.targets(patches, draw, self.fp8_blocks, self.target_layers)
        if self.watch is not None:
            self.watch(features, draw)
        return features

    @property
    def sizes(self) -> tuple[Transformer, Transformer]:
        """Of the encoder and of the predictor."""
        model = self.setup.model
        encoder = Transformer(model.dim, model.depth, model.mlp_ratio)
        return encoder, Transformer(model.predictor_dim, model.predictor_depth)

    def work(self, draw: MaskDraw) -> Work:
        """The work of a step on a batch, as executed here."""
        model = self.setup.model
        work = step_work(
            *self.sizes,
            patch=model.patch,
            channels=self.setup.data.channels,
            patches=draw.patches,
            context=draw.context_lengths.tolist(),
            targets=draw.targets,
            target_size=draw.target_size,
            images=draw.images,
            unions=draw.union_lengths.tolist(),
            pixels=self.options.target == "pixels",
            visible=self.options.visible_weight > 0,
        )
        if self.kept_in is not None:
            work = replace(work, teacher=0)
        elif self.frozen:
            work = replace(
                work, teacher=teachers.teacher_work(self.target_encoder, draw.images, draw.union_lengths.tolist())
            )
        if self.options.regulariser == "none":
            return work
        return replace(work, trained=work.trained | {"regulariser": self.regulariser.work(draw.sequences, self.widths)})

    def saved_values(self, draw: MaskDraw) -> int:
        """Values that a step keeps for its backward pass: context encoder, predictor, loss."""
        visible = self.options.visible_weight > 0
        return step_saved(*self.sizes, draw, self.setup.values, recompute=self.setup.model.recompute, visible=visible)
