"""I-JEPA in one place: from a batch of images and masks to a loss.

Paper: Assran et al. 2023, section 3. Shapes: B images, N patches, T context tokens, U target rows, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ijepa_fast.config import ConfigError, check_width, key
from ijepa_fast.data.crops import counter_uniform
from ijepa_fast.kernels.target_loss import target_loss
from ijepa_fast.masks.inside import held
from ijepa_fast.masks.packing import GRAPH_BITS, MaskDraw, pack, whole_groups
from ijepa_fast.masks.samplers import Sampler, make_sampler
from ijepa_fast.methods.method import Method, Setup
from ijepa_fast.models import flops
from ijepa_fast.models.flops import Transformer, Work
from ijepa_fast.models.fp8 import FP8Block
from ijepa_fast.models.predictor import Predictor
from ijepa_fast.models.vit import INIT_STD, Encoder, init_weights

TRIED = 64  # draws among which the largest is looked for
HIDDEN_SHARE = 0.5  # of the channels, under mask.strategy=channels
POLICY = ("policy", "budget", "padding", "group")  # keys of the section `mask` that no sampler has
_CHANNELS = 1 << 40  # stream of random numbers, see data.crops.counter_bits


@dataclass
class Options:
    """I-JEPA's options; its masks are in the section `mask`."""

    loss: str = key("l2", "l2: paper; smooth_l1: published code", choices=("l2", "smooth_l1"))
    target: str = key("features", "of the target encoder, or normalised pixels", choices=("features", "pixels"))


class IJEPA(Method[MaskDraw]):
    """Context encoder, predictor and, outside the module tree, the target encoder.

    Every weight matrix is truncated normal .02, but for the patch embedding, whose standard deviation is
    `model.patch_std`: what a patch adds to its position grows with it and with the root of its number of values; the
    published one was chosen for patches of 14 and 16 pixels, and at 4 leaves the targets little but their positions.
    """

    Options = Options
    capabilities = frozenset({"graphs", "fp8", "target_stream", "forecast"})
    reads_mask = True

    @classmethod
    def check(cls, options: Any, setup: Setup) -> None:
        """The predictor has the encoder's heads, and the masks fit the grid."""
        check_width("predictor_dim", setup.model)
        mask, patches = asdict(setup.mask), setup.grid[0] * setup.grid[1]
        if setup.mask.budget is not None and setup.mask.budget > patches:
            raise ConfigError(f"mask.budget: expected at most the {patches} patches of a crop, got {setup.mask.budget}")
        _hidden(mask, setup)
        if ":" not in setup.mask.strategy:  # somebody else's are made with the method
            _sampler(mask, setup)

    def __init__(self, setup: Setup):
        super().__init__(setup)
        model, mask = setup.model, asdict(setup.mask)
        self.policy: dict[str, Any] = {name: mask[name] for name in POLICY}
        self.hidden = _hidden(mask, setup)
        self.sampler = _sampler(mask, setup)
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
        self.fp8_blocks: list[FP8Block] | None = None  # all but the last of the target encoder, see `use_fp8`
        self.apply(init_weights)
        with torch.no_grad():
            self.encoder.patch_embed.proj.weight.mul_(model.patch_std / INIT_STD)
        nn.init.trunc_normal_(self.predictor.mask_token, std=INIT_STD)
        self.keep_average("encoder")

    @property
    def target_encoder(self) -> Encoder:
        """The encoder's average."""
        return self.averaged["encoder"]

    def use_fp8(self) -> None:
        """Run the target encoder in fp8 from now on, but for its last block. Its weights must lie where they will."""
        self.fp8_blocks = [FP8Block(block) for block in self.averaged["encoder"].blocks[:-1]]

    def use_graphs(self) -> None:
        """Draw masks of few sizes from now on."""
        self.policy["padding"] = GRAPH_BITS

    def largest(self, draw: MaskDraw) -> MaskDraw:
        """Of some draws the one that keeps most for the backward pass."""
        return max((self.draw(draw.images, 0, step) for step in range(TRIED)), key=self.saved_values)

    def average_changed(self) -> None:
        """Called whenever the target encoder's weights were written."""
        for block in self.fp8_blocks or ():
            block.refresh()

    def draw(self, images: int, seed: int, step: int, first: int = 0, batch: int | None = None) -> MaskDraw:
        """The masks of a micro-batch, packed. Those are drawn, too, that a policy compares its contexts with."""
        start, last = first, first + images
        stop = last
        if self.policy["policy"] != "full":
            start, stop = whole_groups(first, last, batch or last, self.policy["group"])
        sample = partial(self.sampler, stop - start, seed, step)
        if self.inside is None:
            masks = sample(start)
        else:
            masks = held(sample, start, self.inside(step * (batch or last) + np.arange(start, stop)))
        drawn = pack(masks, **self.policy, part=slice(first - start, last - start))
        if not self.hidden:
            return drawn
        return replace(drawn, channels=seen_channels(images, seed, step, first, self.setup.data.channels, self.hidden))

    def forward(self, images: torch.Tensor, draw: MaskDraw) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """`images` (B, H, W, C) and their masks -> scalar fp32 loss."""
        return self.loss_of_patches(self.patchify(images), draw), {}

    def loss_of_patches(self, patches: torch.Tensor, draw: MaskDraw) -> torch.Tensor:
        """The loss from `patches` (B*N, W): targets without gradient, then context, predictions, loss."""
        beside = self.target_stream
        if beside is not None:  # it needs the patches and the average that the last step left on this stream
            beside.wait_stream(torch.cuda.current_stream())
        with torch.no_grad(), torch.cuda.stream(beside):
            targets = self.targets(patches, draw)
        predictions = self.predictor(self.encoder.context(self.seen(patches, draw), draw), draw)
        if beside is not None:
            torch.cuda.current_stream().wait_stream(beside)
            targets.record_stream(torch.cuda.current_stream())
        return target_loss(predictions, targets, draw.prediction_rows, kind=self.options.loss)

    def seen(self, patches: torch.Tensor, draw: MaskDraw) -> torch.Tensor:
        """`patches` (B*N, W) as the contexts see them: hidden channels are at their mean, which is zero."""
        if draw.channels is None:
            return patches
        columns = draw.channels.to(patches.dtype).repeat_interleave(self.encoder.patch**2, 1)
        columns = F.pad(columns, (0, patches.shape[1] - columns.shape[1]))
        return (patches.view(draw.images, -1, patches.shape[1]) * columns[:, None]).view_as(patches)

    def targets(self, patches: torch.Tensor, draw: MaskDraw) -> torch.Tensor:
        """What is to be predicted, (U, D), in the order of `draw.union_index`, before the affine-free LayerNorm."""
        if self.options.target == "pixels":
            return patches[draw.union_index, : self.setup.values]
        features = self.target_encoder.targets(patches, draw, self.fp8_blocks)
        if self.watch is not None:
            self.watch(features, draw)
        return features

    def work(self, draw: MaskDraw) -> Work:
        """The work of a step on a batch, as executed here."""
        model = self.setup.model
        return step_work(
            Transformer(model.dim, model.depth, model.mlp_ratio),
            Transformer(model.predictor_dim, model.predictor_depth),
            patch=model.patch,
            channels=self.setup.data.channels,
            patches=draw.patches,
            context=draw.context_lengths.tolist(),
            targets=draw.targets,
            target_size=draw.target_size,
            images=draw.images,
            unions=draw.union_lengths.tolist(),
            pixels=self.options.target == "pixels",
        )

    def saved_values(self, draw: MaskDraw) -> int:
        """Values that a step keeps for its backward pass: context encoder, predictor, loss."""
        model, context = self.setup.model, draw.context_index.numel()
        rows = draw.targets * draw.contexts * draw.images * draw.target_size
        tokens = draw.targets * context + rows
        encoder = Transformer(model.dim, model.depth, model.mlp_ratio)
        predictor = Transformer(model.predictor_dim, model.predictor_depth)
        stacks = encoder.saved_values(context, context, model.recompute)
        stacks += predictor.saved_values(tokens, rows, model.recompute)
        width = -(-self.setup.values // 8) * 8
        patches = draw.images * draw.patches * width + context * width  # all patches, and the embedding's input
        predictions = 2 * rows * model.dim  # and their gradient
        return stacks + patches + predictions


def _hidden(mask: dict[str, Any], setup: Setup) -> int:
    """How many channels of an image its contexts do not see. Takes the option out of `mask`. Raises ConfigError."""
    if not setup.foreign and ":" in mask["strategy"]:
        raise ConfigError(f"mask.strategy={mask['strategy']}: only strategies of this package are imported here")
    if mask["strategy"] != "channels":
        if mask["hidden_channels"] is None:  # else the sampler refuses it
            mask.pop("hidden_channels")
        return 0
    share, channels = mask.pop("hidden_channels") or HIDDEN_SHARE, setup.data.channels
    if channels < 2:
        raise ConfigError(f"mask.strategy=channels: expected images of several channels, got data.channels={channels}")
    return min(channels - 1, max(1, round(share * channels)))


def _sampler(mask: dict[str, Any], setup: Setup) -> Sampler:
    """The sampler of the section `mask`, whose `hidden_channels` were taken out. Raises ConfigError."""
    options = {name: value for name, value in mask.items() if name not in (*POLICY, "strategy")}
    try:
        return make_sampler(mask["strategy"], setup.grid, **options)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def seen_channels(images: int, seed: int, step: int, first: int, channels: int, hidden: int) -> torch.Tensor:
    """Bool (images, channels), a function of (seed, step, place): False for `hidden` channels of each image."""
    places = (step << 32) + first + np.arange(images)
    order = counter_uniform(seed, places, channels, _CHANNELS).argsort(1).argsort(1)
    return torch.from_numpy(order >= hidden)


def step_work(
    encoder: Transformer,
    predictor: Transformer,
    *,
    patch: int,
    patches: int,
    context: Sequence[int],
    targets: int,
    target_size: int,
    images: int,
    unions: Sequence[int] | None = None,
    embed_all: bool = False,
    pixels: bool = False,
    channels: int = 3,
) -> Work:
    """Work of an I-JEPA step.

    Args:
        encoder: of both encoders.
        predictor: the narrow one.
        patch: side of a patch, pixels.
        patches: patches per image, N.
        context: tokens of each context, C*B of them in order (c, b).
        targets: blocks per image, M.
        target_size: patches of a block, K.
        images: B.
        unions: distinct target patches of each image. Where given, the last blocks of target encoder and predictor
            compute only the rows that are used, as this engine does; None counts the published computation.
        embed_all: the context side embeds all patches, as the published code does.
        pixels: they are predicted, so there is no target encoder.
        channels: of an image.
    """
    row, kept = channels * patch**2, images * patches if embed_all else sum(context)
    embedding = flops.linear(kept, row, encoder.dim)
    teacher = flops.linear(images * patches, row, encoder.dim) + encoder.forward([patches] * images, unions)
    sequences = targets * [length + target_size for length in context]
    predicted = targets * len(context) * target_size
    narrow = predictor.forward(sequences, [target_size] * len(sequences) if unions is not None else None)
    narrow += flops.linear(sum(context), encoder.dim, predictor.dim)
    narrow += flops.linear(predicted, predictor.dim, row if pixels else encoder.dim)
    return Work(
        0 if pixels else teacher, {"context": embedding + encoder.forward(context), "predictor": narrow}, embedding
    )
