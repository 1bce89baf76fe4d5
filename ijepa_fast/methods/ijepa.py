"""I-JEPA in one place: from a batch of images and masks to a loss.

Paper: Assran et al. 2023, section 3. Shapes: B images, N patches, T context tokens, U target rows, D width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict

import torch
from torch import nn

from ijepa_fast.kernels.patchify import patchify
from ijepa_fast.kernels.target_loss import target_loss
from ijepa_fast.masks.packing import PackedBatch, pack
from ijepa_fast.masks.samplers import make_sampler
from ijepa_fast.models import flops
from ijepa_fast.models.fp8 import FP8Block
from ijepa_fast.models.predictor import Predictor
from ijepa_fast.models.vit import INIT_STD, Encoder, init_weights

TARGETS = ("features", "pixels")
LOSSES = ("l2", "smooth_l1")


class IJEPA(nn.Module):
    """Context encoder, predictor and, outside the module tree, the target encoder.

    The target encoder is no submodule because nothing may optimise, shard or checkpoint it: its weights are the
    optimiser's EMA state, copied in after every step (see optim.py and engine.py).

    Args:
        loss: "l2" (paper) or "smooth_l1" (published code), the mean over all predicted values.
        target: "features" of the target encoder, or "pixels" (the paper's ablation: patches normalised one by one).
        mean, std: (3,) normalisation of the images, in units of 0..1.
        patch_std: standard deviation of the patch embedding's weights at the start. What a patch adds to its position
            grows with it and with the root of its number of values; the published one was chosen for patches of 14 and
            16 pixels, and at 4 leaves the targets little but their positions.
    """

    def __init__(
        self,
        encoder: Encoder,
        predictor: Predictor,
        *,
        loss="l2",
        target="features",
        mean,
        std,
        patch_std: float = INIT_STD,
    ):
        super().__init__()
        self.encoder, self.predictor = encoder, predictor
        self.loss, self.target, self.mean, self.std = loss, target, tuple(mean), tuple(std)
        self.target_stream: torch.cuda.Stream | None = None  # the target encoder runs on it, beside the context encoder
        self.fp8_blocks: list[FP8Block] | None = None  # all but the last of the target encoder, see `use_fp8_targets`
        self.watch: Callable | None = None  # called with every batch's target features (U, D) and PackedBatch
        self.apply(init_weights)
        with torch.no_grad():
            encoder.patch_embed.proj.weight.mul_(patch_std / INIT_STD)
        nn.init.trunc_normal_(predictor.mask_token, std=0.02)
        self._target_encoder = (copy.deepcopy(encoder).requires_grad_(False).eval(),)

    @property
    def target_encoder(self) -> Encoder:
        """The EMA encoder."""
        return self._target_encoder[0]

    def use_fp8_targets(self) -> None:
        """Run the target encoder in fp8 from now on, but for its last block. Its weights must lie where they will."""
        self.fp8_blocks = [FP8Block(block) for block in self.target_encoder.blocks[:-1]]

    def target_changed(self) -> None:
        """Called whenever the target encoder's weights were written."""
        for block in self.fp8_blocks or ():
            block.refresh()

    def forward(self, images: torch.Tensor, packed: PackedBatch) -> torch.Tensor:
        """`images` (B, H, W, 3) uint8 and their masks -> scalar fp32 loss."""
        return self.loss_of_patches(self.patchify(images), packed)

    def patchify(self, images: torch.Tensor) -> torch.Tensor:
        """`images` (B, H, W, 3) uint8 -> normalised patches (B*N, W) in the encoder's dtype."""
        return patchify(images, self.encoder.patch, self.mean, self.std, dtype=self.encoder.norm.weight.dtype)

    def loss_of_patches(self, patches: torch.Tensor, packed: PackedBatch) -> torch.Tensor:
        """The loss from `patches` (B*N, W): targets without gradient, then context, predictions, loss."""
        beside = self.target_stream
        if beside is not None:  # it needs the patches and the average that the last step left on this stream
            beside.wait_stream(torch.cuda.current_stream())
        with torch.no_grad(), torch.cuda.stream(beside):
            targets = self.targets(patches, packed)
        predictions = self.predictor(self.encoder.context(patches, packed), packed)
        if beside is not None:
            torch.cuda.current_stream().wait_stream(beside)
            targets.record_stream(torch.cuda.current_stream())
        return target_loss(predictions, targets, target_rows(packed), kind=self.loss)

    def targets(self, patches: torch.Tensor, packed: PackedBatch) -> torch.Tensor:
        """What is to be predicted, (U, D), in the order of `packed.union_index`, before the affine-free LayerNorm."""
        if self.target == "features":
            features = self.target_encoder.targets(patches, packed, self.fp8_blocks)
            if self.watch is not None:
                self.watch(features, packed)
            return features
        width = 3 * self.encoder.patch**2
        return patches[packed.union_index, :width]


def target_rows(packed: PackedBatch) -> torch.Tensor:
    """Row of the union that each prediction (m, c, b, k) is compared with: (M*C*B*K,) int32."""
    rows = packed.target_in_union
    return rows[:, None].expand(-1, packed.contexts, -1, -1).reshape(-1)


def build(config) -> IJEPA:
    """The objective of a run's configuration, initialised from torch's generator."""
    model, data = config.model, config.data
    encoder = Encoder(data.crop, model.patch, model.dim, model.depth, model.heads, model.mlp_ratio, model.recompute)
    predictor = Predictor(
        encoder.grid,
        model.dim,
        model.predictor_dim,
        model.predictor_depth,
        model.heads,
        out_dim=3 * model.patch**2 if config.objective.target == "pixels" else None,
        recompute=model.recompute,
    )
    return IJEPA(
        encoder,
        predictor,
        loss=config.objective.loss,
        target=config.objective.target,
        mean=data.mean,
        std=data.std,
        patch_std=model.patch_std,
    )


def make_batches(config, steps_per_epoch: int) -> Callable[..., PackedBatch]:
    """What draws a batch's masks: (images, seed, step, rank) -> PackedBatch. `steps_per_epoch` has no meaning here."""
    options = asdict(config.mask)
    strategy, policy, budget, ladder = (options.pop(key) for key in ("strategy", "policy", "budget", "ladder"))
    side = config.data.crop // config.model.patch
    sampler = make_sampler(strategy, (side, side), **options)
    return lambda images, seed, step, rank=0: pack(sampler(images, seed, step, rank), policy, budget, ladder)


def work(config, packed: PackedBatch) -> flops.Work:
    """The work of a step on a batch, as executed here."""
    model = config.model
    return flops.ijepa(
        flops.Transformer(model.dim, model.depth, model.mlp_ratio),
        flops.Transformer(model.predictor_dim, model.predictor_depth),
        patch=model.patch,
        patches=packed.patches,
        context=packed.context_lengths.tolist(),
        targets=packed.targets,
        target_size=packed.target_size,
        images=packed.images,
        unions=packed.union_cu_seqlens.diff().tolist(),
        pixels=config.objective.target == "pixels",
    )
