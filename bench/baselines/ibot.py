"""iBOT (Zhou et al. 2022) on this project's blocks and kernels, with the I-JEPA objective's contract.

`forward(images uint8, batch) -> loss`; `encoder` is the student and `target_encoder` the teacher, each a backbone with
its head. A batch (`CropBatch`) carries crops, masks, index tensors and the teacher temperature, drawn on the host.
What makes it fast here, exactly: all crops of the student are one packed batch; its last block, norm and head compute
only the class tokens and the masked patches; the teacher's 8192-wide layer too, since the mean of its logits over all
patches, which the patch centre needs, is that layer applied to the mean of its inputs.
Shapes: B images, L small crops an image, N and n patches of a large and a small crop, D width, R masked patches, Q
prototypes.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, fields, replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from bench.baselines.crops import LARGE, Views, draw_masks, draw_views, render
from ijepa_fast.kernels.masked_gather import masked_gather
from ijepa_fast.kernels.patchify import patchify
from ijepa_fast.models.vit import Block, LayerNorm, LinearGELU, PatchEmbed, Sequences, init_weights, run_blocks

STUDENT_TEMPERATURE = 0.1
CENTRE_MOMENTUM = 0.9
SMALL_CROPS = 10
DROP_PATH = 0.1


@dataclass(frozen=True)
class CropBatch:
    """One batch's crops and masks as index tensors (int32 where not said otherwise).

    Tokens of the student are ordered (crop, image, token), large crops first, a class token before the patches.
    """

    images: int
    small: int  # L
    side: int  # patches along a large crop
    small_side: int
    temperature: float  # of the teacher
    mask: torch.Tensor  # (2*B*N,) bool
    cu_seqlens: torch.Tensor  # ((2 + L)*B + 1,)
    max_seqlen: int
    used: torch.Tensor  # (U,) rows whose output is wanted: class tokens and masked patches
    used_cu_seqlens: torch.Tensor  # ((2 + L)*B + 1,)
    used_max_seqlen: int
    class_rows: torch.Tensor  # ((2 + L)*B,) of `used`
    patch_rows: torch.Tensor  # (R,) of `used`
    teacher_rows: torch.Tensor  # (R,) of the tokens of the large crops
    patch_weight: torch.Tensor  # (R,) fp32, 1 / (masked patches of the crop * crops)
    views: Views | None = None

    @property
    def tokens(self) -> int:
        """Tokens that pass through a network: student and teacher."""
        large = LARGE * self.images * (1 + self.side**2)
        return 2 * large + self.small * self.images * (1 + self.small_side**2)

    def _map(self, change) -> CropBatch:
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        tensors = {name: change(value) for name, value in tensors.items() if isinstance(value, torch.Tensor)}
        return replace(self, **tensors, views=self.views and self.views.map(change))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> CropBatch:
        """The same batch with its tensors on `device`."""
        return self._map(partial(torch.Tensor.to, device=device, non_blocking=non_blocking))

    def pin_memory(self) -> CropBatch:
        """The same batch with its tensors in pinned host memory."""
        return self._map(torch.Tensor.pin_memory)


def lay_out(mask: np.ndarray, small: int, small_side: int, temperature: float, views: Views | None = None) -> CropBatch:
    """The index tensors of a batch whose large crops are masked by `mask` (2, B, N) bool."""
    _, images, patches = mask.shape
    crops = LARGE * images
    lengths = np.repeat([1 + patches, 1 + small_side**2], [crops, small * images])
    starts = np.cumsum(lengths) - lengths
    counts = np.count_nonzero(mask.reshape(crops, patches), axis=1)
    wanted = np.zeros(lengths.sum(), dtype=bool)
    wanted[starts] = True
    wanted[: crops * (1 + patches)].reshape(crops, 1 + patches)[:, 1:] = mask.reshape(crops, patches)
    used = np.flatnonzero(wanted)
    used_lengths = np.concatenate([1 + counts, np.ones(small * images, dtype=np.int64)])
    patch_rows = np.flatnonzero(~np.isin(used, starts, assume_unique=True))
    return CropBatch(
        images=images,
        small=small,
        side=round(patches**0.5),
        small_side=small_side,
        temperature=temperature,
        mask=torch.from_numpy(mask.reshape(-1)),
        cu_seqlens=_cu_seqlens(lengths),
        max_seqlen=int(lengths.max()),
        used=_int32(used),
        used_cu_seqlens=_cu_seqlens(used_lengths),
        used_max_seqlen=int(used_lengths.max()),
        class_rows=_int32(np.cumsum(used_lengths) - used_lengths),
        patch_rows=_int32(patch_rows),
        teacher_rows=_int32(used[patch_rows]),
        patch_weight=torch.from_numpy(np.repeat(1 / (np.maximum(counts, 1) * crops), counts).astype(np.float32)),
        views=views,
    )


def _int32(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.int32))


def _cu_seqlens(lengths: np.ndarray) -> torch.Tensor:
    return _int32(np.concatenate([[0], np.cumsum(lengths)]))


class StochasticBlock(Block):
    """Block with stochastic depth: in training a branch of a whole sequence is dropped with probability `drop`."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float, drop: float):
        super().__init__(dim, heads, mlp_ratio)
        self.drop = drop

    def forward(self, x: torch.Tensor, branch: torch.Tensor | None, sequences: Sequences):
        """See `Block.forward`; where something is dropped the sequences must be packed."""
        if not (self.training and self.drop):
            return super().forward(x, branch, sequences)
        normed, x = (self.norm1(x), x) if branch is None else self.norm1(x, branch)
        attended, cu_seqlens = self.attn(normed, sequences), sequences.cu_seqlens
        if sequences.select is not None:
            x, cu_seqlens = sequences.select(x), sequences.query_cu_seqlens
        normed, x = self.norm2(x, self._thin(attended, cu_seqlens))
        return x, self._thin(self.mlp(normed), cu_seqlens)

    def _thin(self, branch: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
        kept = torch.rand(len(cu_seqlens) - 1, device=branch.device) >= self.drop
        factor = kept.to(branch.dtype) / (1 - self.drop)
        return branch * factor.repeat_interleave(cu_seqlens.diff(), output_size=len(branch))[:, None]


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
        drops = torch.linspace(0, drop, depth).tolist()
        self.blocks = nn.ModuleList([StochasticBlock(dim, heads, mlp_ratio, rate) for rate in drops])
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

    def forward(self, x: torch.Tensor, sequences: Sequences, last: Sequences | None = None) -> torch.Tensor:
        """Tokens (T, D) -> (T, D) with the final norm, or the rows that `last` selects."""
        return run_blocks(self.blocks, self.norm, x, None, sequences, last, recompute=self.recompute)


class Prototypes(nn.Module):
    """Weight-normed linear layer of fixed gain 1, without bias."""

    def __init__(self, width: int, count: int):
        super().__init__()
        self.weight_v = nn.Parameter(torch.empty(count, width).uniform_(-(width**-0.5), width**-0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(r, width) -> (r, Q)."""
        return F.linear(x, F.normalize(self.weight_v, dim=1))


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

    @property
    def patches(self) -> int:
        """Patches of a large crop, N."""
        return self.backbone.side**2

    def forward(self, patches: torch.Tensor, images: int) -> torch.Tensor:
        """Whole images, `patches` (B*N, W) -> (B*N, D): features of the patches, without the class token's."""
        x = self.backbone(self.backbone.embed(patches, self.backbone.side), Sequences(images=images))
        return x.view(images, -1, self.backbone.dim)[:, 1:].reshape(-1, self.backbone.dim)

    def student(self, large: torch.Tensor, small: torch.Tensor, batch: CropBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Patches of the crops, (2*B*N, W) and (L*B*n, W) -> logits of the class tokens ((2 + L)*B, Q) and masked
        patches (R, Q).
        """
        tokens = [self.backbone.embed(large, batch.side, batch.mask), self.backbone.embed(small, batch.small_side)]
        last = Sequences(
            cu_seqlens=batch.cu_seqlens,
            max_seqlen=batch.max_seqlen,
            select=partial(masked_gather, index=batch.used, unique=True),
            query_cu_seqlens=batch.used_cu_seqlens,
            query_max_seqlen=batch.used_max_seqlen,
        )
        x = self.backbone(torch.cat(tokens), Sequences(batch.cu_seqlens, batch.max_seqlen), last)
        logits = self.head.last_layer(self.head.bottleneck(x))
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
        # Not buffers, which an engine would cast to the model's precision.
        prototypes = len(student.head.last_layer.weight_v)
        self.centre, self.patch_centre = torch.zeros(1, prototypes), torch.zeros(1, prototypes)

    @property
    def target_encoder(self) -> Network:
        """The teacher."""
        return self._target_encoder[0]

    def forward(self, images: torch.Tensor, batch: CropBatch) -> torch.Tensor:
        """`images` (B, H, W, 3) uint8 and what is to be cut out of them -> scalar fp32 loss."""
        backbone = self.encoder.backbone
        with torch.no_grad():
            large = render(images, batch.views.of(slice(LARGE)), batch.side * backbone.patch)
            small = render(images, batch.views.of(slice(LARGE, None)), batch.small_side * backbone.patch)
            large, small = self.patchify(large), self.patchify(small)
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
        self.centre, self.patch_centre = self.centre.to(large.device), self.patch_centre.to(large.device)
        with torch.no_grad():
            class_logits, patch_logits, patch_mean = self.target_encoder.teacher(large, batch)
            classes = ((class_logits.float() - self.centre) / batch.temperature).softmax(1)
            patches = ((patch_logits.float() - self.patch_centre) / batch.temperature).softmax(1)
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
        self.centre = torch.lerp(means[0], self.centre, CENTRE_MOMENTUM)
        self.patch_centre = torch.lerp(means[1], self.patch_centre, CENTRE_MOMENTUM)


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross-entropy (r,) in fp32 of student `logits` (r, Q) against `targets` (r, Q)."""
    return F.cross_entropy(logits.float() / STUDENT_TEMPERATURE, targets, reduction="none")


class CropSampler:
    """Draws a batch's crops, masks and temperature, a function of (seed, step, rank).

    Args:
        image_size: side of a large crop, pixels.
        patch: side of a patch, pixels.
        small: small crops an image.
        warmup_steps: over which the teacher's temperature rises from .04 to .07.
    """

    def __init__(self, image_size: int, patch: int, small: int = SMALL_CROPS, warmup_steps: int = 0):
        self.side, self.small, self.warmup_steps = image_size // patch, small, warmup_steps
        # 96 pixels beside 224, in whole patches.
        self.small_side = max(1, round(self.side * 96 / 224))

    def __call__(self, images: int, seed: int, step: int, rank: int = 0) -> CropBatch:
        """The batch of `images` images."""
        rng = np.random.default_rng([seed, step, rank])
        mask = draw_masks(rng, LARGE * images, self.side).reshape(LARGE, images, -1)
        progress = min(1.0, step / self.warmup_steps) if self.warmup_steps else 1.0
        views = draw_views(rng, images, self.small)
        return lay_out(mask, self.small, self.small_side, teacher_temperature(progress), views)


def teacher_temperature(progress: float) -> float:
    """The teacher's temperature at `progress` 0..1 of its warm-up."""
    return 0.04 + 0.03 * progress


def build(config) -> IBOT:
    """The objective of a run's configuration, with the published head and drop path."""
    model = config.model
    sizes = (config.data.crop, model.patch, model.dim, model.depth, model.heads, model.mlp_ratio)
    backbone = Backbone(*sizes, drop=DROP_PATH, recompute=model.recompute)
    return IBOT(Network(backbone, Head(model.dim)), mean=config.data.mean, std=config.data.std)


def make_batches(config, steps_per_epoch: int) -> CropSampler:
    """What draws a batch's crops: (images, seed, step, rank) -> CropBatch. Warm-up: 30 epochs or a tenth of all."""
    warmup = min(30, config.optim.epochs / 10) * steps_per_epoch
    return CropSampler(config.data.crop, config.model.patch, warmup_steps=int(warmup))
