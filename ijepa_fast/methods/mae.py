"""MAE (He et al. 2022) on this project's blocks and kernels, with the I-JEPA objective's contract.

It is trained, checkpointed and probed like I-JEPA: `forward(images uint8, packed) -> loss`, networks `encoder` and
`predictor` (the decoder), and a `target_encoder` that follows the encoder (a momentum of 0 makes it the encoder). Masks
are those of the strategy "random": the context is what the encoder sees, the one target block what it does not.
What makes it fast here, exactly: only visible patches are embedded, the decoder's tokens are never put back into image
order, and its last block, norm and projection compute only the masked patches, whose loss is all there is.
Shapes: B images, N patches, V visible and K masked patches of one, D and Dd widths, P patch size, R = B*K.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from ijepa_fast.kernels.masked_gather import masked_gather
from ijepa_fast.kernels.patchify import patchify
from ijepa_fast.kernels.target_loss import target_loss
from ijepa_fast.masks.packing import PackedBatch, pack
from ijepa_fast.masks.samplers import make_sampler
from ijepa_fast.models import flops
from ijepa_fast.models.positions import sincos_2d
from ijepa_fast.models.vit import Block, Encoder, LayerNorm, Sequences, run_blocks

MASKED_SHARE = 0.75
EPS = 1e-6  # beside the variance of a patch's pixels


class ClassTokenEncoder(Encoder):
    """The ViT with a class token, whose position is zero."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, self.dim))

    def context(self, patches: torch.Tensor, packed: PackedBatch) -> torch.Tensor:
        """`patches` (B*N, W) -> (B*(1 + V), D): class token and visible patches of each image, final norm applied."""
        positions = self.positions.to(patches.dtype)
        x = self.patch_embed(masked_gather(patches, packed.context_index))
        x = x + masked_gather(positions, packed.context_index % self.patches)
        return self._run(x.view(packed.images, -1, self.dim))

    def forward(self, patches: torch.Tensor, images: int) -> torch.Tensor:
        """Whole images, `patches` (B*N, W) -> (B*N, D): features of the patches, without the class token's."""
        x = self.patch_embed(patches).view(images, self.patches, self.dim) + self.positions.to(patches.dtype)
        return self._run(x).view(images, -1, self.dim)[:, 1:].reshape(-1, self.dim)

    def _run(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens (B, V, D) -> (B*(1 + V), D)."""
        images = len(x)
        x = torch.cat([self.cls_token.to(x.dtype).expand(images, -1, -1), x], dim=1).flatten(0, 1)
        return run_blocks(self.blocks, self.norm, x, None, Sequences(images=images), recompute=self.recompute)


class PixelProjection(nn.Linear):
    """Linear to pixels. Its rows are stored as published, column (i*P + j)*3 + c, and applied in patchify's order."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x` (R, Dd) -> (R, 3*P*P), column c*P*P + i*P + j."""
        weight, bias = (w.unflatten(0, (-1, 3)).transpose(0, 1).flatten(0, 1) for w in (self.weight, self.bias))
        return F.linear(x, weight, bias)


class Decoder(nn.Module):
    """From the encoder's tokens to the pixels of the masked patches.

    Args:
        grid: (rows, columns) of patches.
        patch: P.
        encoder_dim: D.
        dim: Dd.
        depth: blocks.
        heads: of each block.
        recompute: keep only each block's input for the backward pass.
    """

    def __init__(self, grid, patch, encoder_dim, dim=512, depth=8, heads=16, recompute=False):
        super().__init__()
        if dim % heads:
            raise ValueError(f"decoder: expected a width that {heads} heads divide, got {dim}; change the width")
        self.dim, self.recompute = dim, recompute
        self.decoder_embed = nn.Linear(encoder_dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.register_buffer("positions", sincos_2d(dim, grid), persistent=False)
        self.decoder_blocks = nn.ModuleList([Block(dim, heads, 4.0) for _ in range(depth)])
        self.decoder_norm = LayerNorm(dim, eps=1e-6)
        self.decoder_pred = PixelProjection(dim, 3 * patch**2)

    def forward(self, latent: torch.Tensor, packed: PackedBatch) -> torch.Tensor:
        """`latent` (B*(1 + V), D) -> predicted pixels (B*K, 3*P*P) of the masked patches, as in target_index."""
        images, size, device = packed.images, packed.target_size, latent.device
        x = self.decoder_embed(latent).view(images, -1, self.dim)
        positions = self.positions.to(x.dtype)
        rows = torch.cat([packed.context_index.view(images, -1), packed.target_index[0]], dim=1) % packed.patches
        masked = self.mask_token.to(x.dtype).expand(images, size, -1)
        positions = masked_gather(positions, rows.flatten()).view(images, -1, self.dim)
        x = torch.cat([x[:, :1], torch.cat([x[:, 1:], masked], dim=1) + positions], dim=1)
        length, counts = x.shape[1], torch.arange(images + 1, dtype=torch.int32, device=device)
        last = Sequences(
            cu_seqlens=counts * length,
            max_seqlen=length,
            select=partial(last_rows, length=length, count=size),
            query_cu_seqlens=counts * size,
            query_max_seqlen=size,
        )
        x = x.flatten(0, 1)
        sequences = Sequences(images=images)
        x = run_blocks(self.decoder_blocks, self.decoder_norm, x, None, sequences, last, recompute=self.recompute)
        return self.decoder_pred(x)


def last_rows(x: torch.Tensor, length: int, count: int) -> torch.Tensor:
    """x (B*length, D) -> (B*count, D): the last `count` rows of every `length`."""
    return x.view(-1, length, x.shape[1])[:, -count:].reshape(-1, x.shape[1])


class MAE(nn.Module):
    """Masked autoencoder.

    Args:
        normalise: compare with pixels normalised patch by patch ("norm_pix_loss"), the paper's better target.
        mean: (3,) of the images, in units of 0..1.
        std: (3,) likewise.
    """

    def __init__(self, encoder: ClassTokenEncoder, decoder: Decoder, *, normalise=True, mean, std):
        super().__init__()
        self.encoder, self.predictor = encoder, decoder
        self.normalise, self.mean, self.std = normalise, tuple(mean), tuple(std)
        self.apply(init_weights)
        nn.init.normal_(encoder.cls_token, std=0.02)
        nn.init.normal_(decoder.mask_token, std=0.02)
        self._target_encoder = (copy.deepcopy(encoder).requires_grad_(False).eval(),)

    @property
    def target_encoder(self) -> ClassTokenEncoder:
        """The encoder that is probed."""
        return self._target_encoder[0]

    def forward(self, images: torch.Tensor, packed: PackedBatch) -> torch.Tensor:
        """`images` (B, H, W, 3) uint8 and their masks -> scalar fp32 loss."""
        return self.loss_of_patches(self.patchify(images), packed)

    def patchify(self, images: torch.Tensor) -> torch.Tensor:
        """`images` (B, H, W, 3) uint8 -> normalised patches (B*N, W) in the encoder's dtype."""
        return patchify(images, self.encoder.patch, self.mean, self.std, dtype=self.encoder.norm.weight.dtype)

    def loss_of_patches(self, patches: torch.Tensor, packed: PackedBatch) -> torch.Tensor:
        """The loss from `patches` (B*N, W): mean squared error over masked patches."""
        if (
            packed.targets * packed.contexts != 1
            or len(packed.context_index) != packed.images * packed.context_max_seqlen
        ):
            raise ValueError(
                f"packed: expected one target block and one context of equal length in every image, got "
                f"{packed.targets} and {packed.contexts}; draw masks with mask.strategy=random"
            )
        predictions = self.predictor(self.encoder.context(patches, packed), packed)
        pixels = patches[:, : predictions.shape[1]].contiguous()
        index = packed.target_index.view(-1)
        if not self.normalise:
            return F.mse_loss(predictions.float(), pixels[index].float())
        # The published target divides by the unbiased variance: LayerNorm, scaled by this.
        n = predictions.shape[1]
        scale = ((n - 1) / n) ** 0.5
        return scale**2 * target_loss(predictions / scale, pixels, index, kind="l2", eps=EPS * scale**2)


def init_weights(module: nn.Module) -> None:
    """Published initialisation: Xavier uniform for every matrix, biases 0, LayerNorm 1 and 0."""
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        nn.init.xavier_uniform_(module.weight.view(len(module.weight), -1))
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)


@dataclass
class Options:
    """What a configuration may say under objective.options; the values here are the published ones."""

    masked: float = MASKED_SHARE  # of the patches
    normalise: bool = True  # compare with pixels normalised patch by patch


def build(config) -> MAE:
    """The objective of a run's configuration; the decoder has predictor_dim and predictor_depth, and 32-wide heads."""
    model = config.model
    sizes = (config.data.crop, model.patch, model.dim, model.depth, model.heads, model.mlp_ratio)
    encoder = ClassTokenEncoder(*sizes, recompute=model.recompute)
    decoder = Decoder(
        encoder.grid,
        model.patch,
        model.dim,
        model.predictor_dim,
        model.predictor_depth,
        heads=max(1, model.predictor_dim // 32),
        recompute=model.recompute,
    )
    return MAE(encoder, decoder, normalise=_options(config).normalise, mean=config.data.mean, std=config.data.std)


def make_batches(config, steps_per_epoch: int):
    """What draws a batch's masks: (images, seed, step, rank) -> PackedBatch. `steps_per_epoch` has no meaning here."""
    side = config.data.crop // config.model.patch
    sampler = make_sampler("random", (side, side), target_scale=_options(config).masked)
    return lambda images, seed, step, rank=0: pack(sampler(images, seed, step, rank))


def work(config, packed: PackedBatch) -> flops.Work:
    """The work of a step on a batch, as executed here."""
    model = config.model
    return flops.mae(
        flops.Transformer(model.dim, model.depth, model.mlp_ratio),
        flops.Transformer(model.predictor_dim, model.predictor_depth),
        patch=model.patch,
        patches=packed.patches,
        visible=packed.context_max_seqlen,
        images=packed.images,
        embed_all=False,
        used_rows_only=True,
    )


def _options(config) -> Options:
    from ijepa_fast.config import options_of

    return options_of(config, Options)
