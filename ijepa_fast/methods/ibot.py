"""iBOT (Zhou et al. 2022) on this project's blocks and kernels, with the I-JEPA objective's contract.

`forward(views, batch) -> loss`; `encoder` is the student and `target_encoder` the teacher, each a backbone with its
head. The views come from the loader, masks, temperature and dropped branches with the batch (`CropBatch`).
What makes it fast here, exactly: all crops of the student are one packed batch; its last block, norm and head compute
only the class tokens and the masked patches; the teacher's 8192-wide layer too, since the mean of its logits over all
patches, which the patch centre needs, is that layer applied to the mean of its inputs.
Shapes: B images, L small crops an image, N and n patches of a large and a small crop, D width, R masked patches, Q
prototypes.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from ijepa_fast.kernels.masked_gather import masked_gather
from ijepa_fast.kernels.patchify import patchify
from ijepa_fast.masks.crops import LARGE, CropBatch, CropSampler
from ijepa_fast.models import flops
from ijepa_fast.models.vit import Block, LayerNorm, LinearGELU, PatchEmbed, Sequences, init_weights, run_blocks

STUDENT_TEMPERATURE = 0.1
CENTRE_MOMENTUM = 0.9


@dataclass
class Options:
    """What a configuration may say under objective.options; the values here are the published ones."""

    small_crops: int = 10
    hidden: int = 2048  # of the head's two layers
    bottleneck: int = 256
    prototypes: int = 8192
    drop_path: float = 0.1  # of the last block; linear from 0 at the first
    temperature: float = 0.07  # of the teacher, reached from first_temperature
    first_temperature: float = 0.04
    temperature_epochs: float = 30
    frozen_epochs: float = 1  # in which the prototypes do not learn


@dataclass(frozen=True)
class StochasticSequences(Sequences):
    """Sequences and a factor for each block, branch and sequence, (depth, 2, sequences): 0 where it is dropped."""

    factor: torch.Tensor | None = None


class StochasticBlock(Block):
    """Block with stochastic depth: in training, branches of whole sequences are dropped.

    What is dropped is decided by the batch, not by a generator, so that a resumed run drops the same.
    """

    def __init__(self, dim: int, heads: int, mlp_ratio: float, number: int, drops: bool):
        super().__init__(dim, heads, mlp_ratio)
        self.drops = drops
        # A tensor: torch.compile would make a kernel for every value of an integer.
        self.register_buffer("number", torch.tensor([number]), persistent=False)

    def forward(self, x: torch.Tensor, branch: torch.Tensor | None, sequences: Sequences):
        """See `Block.forward`; where something is dropped the sequences must be packed StochasticSequences."""
        if not (self.training and self.drops):
            return super().forward(x, branch, sequences)
        normed, x = (self.norm1(x), x) if branch is None else self.norm1(x, branch)
        attended, cu_seqlens = self.attn(normed, sequences), sequences.cu_seqlens
        if sequences.select is not None:
            x, cu_seqlens = sequences.select(x), sequences.query_cu_seqlens
        factors = sequences.factor.index_select(0, self.number)[0]
        normed, x = self.norm2(x, _scale(attended, cu_seqlens, factors[0]))
        return x, _scale(self.mlp(normed), cu_seqlens, factors[1])


def _scale(branch: torch.Tensor, cu_seqlens: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """`branch` (T, D), each of the sequences times its `factor` (sequences,)."""
    rows = factor.to(branch.dtype).repeat_interleave(cu_seqlens.diff(), output_size=len(branch))
    return branch * rows[:, None]


class Backbone(nn.Module):
    """ViT with class token, learned positions and a token for masked patches."""

    def __init__(self, image_size, patch, dim, depth, heads, mlp_ratio=4.0, drop=0.0, recompute=False):
        super().__init__()
        if image_size % patch:
            raise ValueError(f"data.crop={image_size} is not divisible by model.patch={patch}; set it to a multiple")
        self.patch, self.dim, self.side, self.recompute = patch, dim, image_size // patch, recompute
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.side**2, dim))
        self.masked_embed = nn.Parameter(torch.zeros(1, dim))
        self.patch_embed = PatchEmbed(patch, dim)
        self.drop = drop
        self.blocks = nn.ModuleList(
            [StochasticBlock(dim, heads, mlp_ratio, i, drops=drop > 0 and i > 0) for i in range(depth)]
        )
        self.norm = LayerNorm(dim, eps=1e-6)

    def embed(self, patches: torch.Tensor, side: int, mask: torch.Tensor | None = None) -> torch.Tensor:
        """`patches` (I*n, W) of crops of side*side = n patches, `mask` (I*n,) bool -> tokens (I*(1 + n), D)."""
        x = self.patch_embed(patches)
        if mask is not None:
            x = torch.where(mask[:, None], self.masked_embed.to(x.dtype), x)
        x = x.view(-1, side**2, self.dim)
        x = torch.cat([self.cls_token.to(x.dtype).expand(len(x), -1, -1), x], dim=1)
        return (x + self._positions(side).to(x.dtype)).flatten(0, 1)

    def _positions(self, side: int) -> torch.Tensor:
        """(1, 1 + side*side, D), from the large crops' by bicubic resampling with the published scale."""
        if side == self.side:
            return self.pos_embed
        table = self.pos_embed[:, 1:].view(1, self.side, self.side, self.dim).permute(0, 3, 1, 2)
        scale = (side + 0.1) / self.side
        table = F.interpolate(table, scale_factor=(scale, scale), mode="bicubic")
        return torch.cat([self.pos_embed[:, :1], table.flatten(2).transpose(1, 2)], dim=1)

    def factors(self, chance: torch.Tensor | None) -> torch.Tensor | None:
        """Numbers in 0..1 (depth, 2, sequences) -> 0 where a branch is dropped, else 1 over the chance to be kept."""
        if chance is None:
            return None
        drop = torch.linspace(0, self.drop, len(chance), device=chance.device)[:, None, None]
        return (chance >= drop) / (1 - drop)

    def forward(self, x: torch.Tensor, sequences: Sequences, last: Sequences | None = None) -> torch.Tensor:
        """Tokens (T, D) -> (T, D) with the final norm, or the rows that `last` selects."""
        return run_blocks(self.blocks, self.norm, x, None, sequences, last, recompute=self.recompute)


class Prototypes(nn.Module):
    """Weight-normed linear layer of fixed gain 1, without bias."""

    def __init__(self, width: int, count: int):
        super().__init__()
        self.weight_v = nn.Parameter(torch.empty(count, width).uniform_(-(width**-0.5), width**-0.5))

    def forward(self, x: torch.Tensor, frozen: bool = False) -> torch.Tensor:
        """(r, width) -> (r, Q); `frozen`: the weight's gradient is zero."""
        # Zero, not None: the engine reduces every gradient. What weight decay does to it, the norm undoes.
        weight = self.weight_v.detach() + 0 * self.weight_v if frozen else self.weight_v
        return F.linear(x, F.normalize(weight, dim=1))


class Head(nn.Module):
    """The projection head, shared by class tokens and patches."""

    def __init__(self, dim: int, hidden: int = 2048, bottleneck: int = 256, prototypes: int = 8192):
        super().__init__()
        # The published names count the activations.
        self.mlp = nn.ModuleDict(
            {"0": LinearGELU(dim, hidden), "2": LinearGELU(hidden, hidden), "4": nn.Linear(hidden, bottleneck)}
        )
        self.last_layer = Prototypes(bottleneck, prototypes)

    def bottleneck(self, x: torch.Tensor) -> torch.Tensor:
        """(r, D) -> (r, bottleneck), of length 1."""
        for layer in self.mlp.values():
            x = layer(x)
        return F.normalize(x, dim=1)


class Network(nn.Module):
    """A backbone and its head: the student, or the teacher."""

    def __init__(self, backbone: Backbone, head: Head):
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, patches: torch.Tensor, images: int) -> torch.Tensor:
        """Whole images, `patches` (B*N, W) -> class tokens (B, D), which iBOT's own probes read too."""
        x = self.backbone(self.backbone.embed(patches, self.backbone.side), Sequences(images=images))
        return x.view(images, -1, self.backbone.dim)[:, 0].contiguous()

    def student(self, large: torch.Tensor, small: torch.Tensor, batch: CropBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Patches of the crops, (2*B*N, W) and (L*B*n, W) -> logits of the class tokens ((2 + L)*B, Q) and masked
        patches (R, Q).
        """
        tokens = [self.backbone.embed(large, batch.side, batch.mask), self.backbone.embed(small, batch.small_side)]
        factor = self.backbone.factors(batch.chance)
        sequences = StochasticSequences(batch.cu_seqlens, batch.max_seqlen, factor=factor)
        last = replace(
            sequences,
            select=partial(masked_gather, index=batch.used, unique=True),
            query_cu_seqlens=batch.used_cu_seqlens,
            query_max_seqlen=batch.used_max_seqlen,
        )
        x = self.backbone(torch.cat(tokens), sequences, last)
        logits = self.head.last_layer(self.head.bottleneck(x), batch.frozen)
        return logits[batch.class_rows], logits[batch.patch_rows]

    def teacher(self, large: torch.Tensor, batch: CropBatch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Patches of the large crops (2*B*N, W) -> logits of the class tokens (2*B, Q) and masked patches (R, Q), and
        their mean over all patches (1, Q).
        """
        crops = LARGE * batch.images
        x = self.backbone(self.backbone.embed(large, batch.side), Sequences(images=crops))
        z = self.head.bottleneck(x)
        by_crop = z.view(crops, -1, z.shape[1])
        mean = by_crop[:, 1:].mean((0, 1), dtype=torch.float32).to(z.dtype)[None]
        logits = self.head.last_layer(torch.cat([by_crop[:, 0], mean, z[batch.teacher_rows]]))
        return logits[:crops], logits[crops + 1 :], logits[crops : crops + 1]


class IBOT(nn.Module):
    """Self-distillation of class tokens between crops and of masked patches within a crop.

    `carried` holds the two centres (1, Q) fp32, which a checkpoint keeps beside the weights.

    Args:
        mean: (3,) of the images, in units of 0..1.
        std: (3,) likewise.
    """

    def __init__(self, student: Network, *, mean, std):
        super().__init__()
        self.encoder, self.predictor = student, nn.Module()  # there is no predictor; the engine asks for its parameters
        self.mean, self.std = tuple(mean), tuple(std)
        self.encoder.apply(init_weights)
        for parameter in (student.backbone.cls_token, student.backbone.pos_embed):
            nn.init.trunc_normal_(parameter, std=0.02)
        self._target_encoder = (copy.deepcopy(student).requires_grad_(False).eval(),)
        # Not buffers, which the engine would cast to the model's precision.
        prototypes = len(student.head.last_layer.weight_v)
        self.carried = {"centre": torch.zeros(1, prototypes), "patch_centre": torch.zeros(1, prototypes)}

    @property
    def target_encoder(self) -> Network:
        """The teacher."""
        return self._target_encoder[0]

    def forward(self, views: list[torch.Tensor], batch: CropBatch) -> torch.Tensor:
        """`views`: 2 large, then L small ones of every image, uint8 (B, side, side, 3) each -> scalar fp32 loss."""
        large, small = (self.patchify(torch.cat(part)) for part in (views[:LARGE], views[LARGE:]))
        return self.loss_of_patches(large, small, batch)

    def patchify(self, images: torch.Tensor) -> torch.Tensor:
        """`images` (b, H, W, 3) uint8 -> normalised patches (b*N, W) in the student's dtype."""
        dtype = self.encoder.backbone.norm.weight.dtype
        return patchify(images, self.encoder.backbone.patch, self.mean, self.std, dtype=dtype)

    def loss_of_patches(self, large: torch.Tensor, small: torch.Tensor, batch: CropBatch) -> torch.Tensor:
        """The loss from patches of the crops, (2*B*N, W) and (L*B*n, W); moves the centres."""
        class_loss, patch_loss = self.losses(large, small, batch)
        return class_loss + patch_loss

    def losses(self, large: torch.Tensor, small: torch.Tensor, batch: CropBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """The two terms, fp32 scalars: of class tokens between crops, of masked patches within a crop."""
        self.carried = {name: centre.to(large.device) for name, centre in self.carried.items()}
        with torch.no_grad():
            class_logits, patch_logits, patch_mean = self.target_encoder.teacher(large, batch)
            classes = ((class_logits.float() - self.carried["centre"]) / batch.temperature).softmax(1)
            patches = ((patch_logits.float() - self.carried["patch_centre"]) / batch.temperature).softmax(1)
            self._move_centres(class_logits, patch_mean)
        student_classes, student_patches = self.encoder.student(large, small, batch)
        # A large crop learns from the other one, a small crop from both; cross-entropy is linear in the target.
        first, second = classes.chunk(LARGE)
        targets = torch.cat([second, first, *[first + second] * batch.small])
        pairs = LARGE * (LARGE - 1 + batch.small)
        class_loss = cross_entropy(student_classes, targets).sum() / (pairs * batch.images)
        return class_loss, (cross_entropy(student_patches, patches) * batch.patch_weight).sum()

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


def build(config) -> IBOT:
    """The objective of a run's configuration."""
    model, chosen = config.model, _options(config)
    sizes = (config.data.crop, model.patch, model.dim, model.depth, model.heads, model.mlp_ratio)
    backbone = Backbone(*sizes, drop=chosen.drop_path, recompute=model.recompute)
    head = Head(model.dim, chosen.hidden, chosen.bottleneck, chosen.prototypes)
    return IBOT(Network(backbone, head), mean=config.data.mean, std=config.data.std)


def make_batches(config, steps_per_epoch: int) -> CropSampler:
    """What draws a batch beside its views: (images, seed, step, rank) -> CropBatch."""
    chosen, side = _options(config), config.data.crop // config.model.patch
    return CropSampler(
        side,
        small_crop_side(side),
        chosen.small_crops,
        config.model.depth,
        (chosen.first_temperature, chosen.temperature),
        int(chosen.temperature_epochs * steps_per_epoch),
        int(chosen.frozen_epochs * steps_per_epoch),
    )


def make_views(config):
    """The views of an image, data.views.View each; large ones are of data.crop pixels and data.scale."""
    return views_of(config.data.crop, config.model.patch, config.data.scale, _options(config).small_crops)


def views_of(crop: int, patch: int, scale=(0.25, 1.0), small_crops: int = Options.small_crops):
    """The published views for large crops of `crop` pixels and `scale`, shares of the image's area.

    Small ones have what is below `scale`, down to a twentieth of the image. All are mirrored half of the time, and
    blurred by the same share of a crop as published, where it is of 224 pixels.
    """
    from ijepa_fast.data.views import IBOT_VIEWS

    large, small = IBOT_VIEWS[0], IBOT_VIEWS[LARGE]
    sigma = tuple(bound * crop / large.crop for bound in large.sigma)
    views = [replace(view, crop=crop, scale=tuple(scale), sigma=sigma) for view in IBOT_VIEWS[:LARGE]]
    side, share = small_crop_side(crop // patch) * patch, (min(0.05, scale[0]), scale[0])
    return views + [replace(small, crop=side, scale=share, sigma=sigma)] * small_crops


def work(config, batch: CropBatch) -> flops.Work:
    """The work of a step on a batch, as executed here."""
    model, chosen = config.model, _options(config)
    return flops.ibot(
        flops.Transformer(model.dim, model.depth, model.mlp_ratio),
        flops.Head(chosen.hidden, chosen.bottleneck, chosen.prototypes),
        patch=model.patch,
        global_patches=batch.side**2,
        local_patches=batch.small_side**2,
        locals_=batch.small,
        masked=int(batch.mask.sum()),
        images=batch.images,
    )


def small_crop_side(side: int) -> int:
    """Patches along a small crop beside a large one of `side`: as 96 pixels beside 224."""
    return max(1, round(side * 96 / 224))


def _options(config) -> Options:
    from ijepa_fast.config import options_of

    return options_of(config, Options)
