"""The published I-JEPA training step as its authors run it, rendered plainly in eager PyTorch.

Float images, a patch-embedding convolution over all patches in both encoders, attention with its matrix in memory,
gathers by int64 indices repeated to the feature width, a predictor that repeats the context for each target block,
torch.optim.AdamW, an EMA one parameter at a time, autocast with a GradScaler on a GPU, and the gradient statistics and
the loss read back each step. It is the opponent of bench/throughput.py; tests hold it to the golden archive.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import nn

from bench.baselines.plain_vit import Block, PatchEmbed, move_average, normalise, parameter_groups, set_rates, update
from ijepa_fast.models.positions import sincos_2d


def gather(x: torch.Tensor, masks: list[torch.Tensor]) -> torch.Tensor:
    """x (B, N, D), masks of (B, K) int64 -> (len(masks) * B, K, D), mask-major."""
    return torch.cat([x.gather(1, mask.unsqueeze(-1).repeat(1, 1, x.shape[-1])) for mask in masks])


def repeat_blocks(x: torch.Tensor, images: int, times: int) -> torch.Tensor:
    """x (M*B, K, D) -> (M*times*B, K, D): each block of `images` rows `times` times in a row."""
    return torch.cat([block for block in x.split(images) for _ in range(times)])


class Encoder(nn.Module):
    def __init__(self, image_size, patch, dim, depth, heads, mlp_ratio=4.0):
        super().__init__()
        grid = (image_size // patch, image_size // patch)
        self.patch_embed = PatchEmbed(patch, dim)
        self.pos_embed = nn.Parameter(sincos_2d(dim, grid)[None], requires_grad=False)
        self.blocks = nn.ModuleList([Block(dim, heads, mlp_ratio) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, images: torch.Tensor, masks: list[torch.Tensor] | None = None) -> torch.Tensor:
        """`images` (B, 3, H, W) float -> (B, N, D), or (len(masks) * B, K, D) of the patches in `masks`."""
        x = self.patch_embed(images) + self.pos_embed
        if masks is not None:
            x = gather(x, masks)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Predictor(nn.Module):
    def __init__(self, grid, encoder_dim, dim, depth, heads, mlp_ratio=4.0):
        super().__init__()
        self.predictor_embed = nn.Linear(encoder_dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.predictor_pos_embed = nn.Parameter(sincos_2d(dim, grid)[None], requires_grad=False)
        self.predictor_blocks = nn.ModuleList([Block(dim, heads, mlp_ratio) for _ in range(depth)])
        self.predictor_norm = nn.LayerNorm(dim, eps=1e-6)
        self.predictor_proj = nn.Linear(dim, encoder_dim)

    def forward(self, context, context_masks, target_masks) -> torch.Tensor:
        """`context` (C*B, Kc, D) -> predictions (M*C*B, K, D)."""
        images = len(context) // len(context_masks)
        positions = self.predictor_pos_embed.repeat(images, 1, 1)
        x = self.predictor_embed(context) + gather(positions, context_masks)
        tokens = x.shape[1]
        masked = repeat_blocks(gather(positions, target_masks), images, len(context_masks)) + self.mask_token
        x = torch.cat([x.repeat(len(target_masks), 1, 1), masked], dim=1)
        for block in self.predictor_blocks:
            x = block(x)
        return self.predictor_proj(self.predictor_norm(x)[:, tokens:])


class PlainStep:
    """One training step of I-JEPA on one process.

    Args:
        encoder: `Encoder`, or another with its interface; so is predictor.
        predictor: `Predictor`.
        device: to run on.
        autocast: bfloat16 autocast with a GradScaler, as published for a GPU; fp32 without.
    """

    def __init__(self, encoder: nn.Module, predictor: nn.Module, device="cpu", autocast=False):
        self.device = torch.device(device)
        self.encoder = encoder.to(device)
        self.predictor = predictor.to(device)
        self.target_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(parameter_groups(self.encoder, self.predictor))
        self.autocast = autocast
        self.scaler = torch.amp.GradScaler(self.device.type) if autocast else None

    def targets(self, images, context_masks, target_masks) -> torch.Tensor:
        """Normalised target features (M*C*B, K, D)."""
        with torch.no_grad():
            features = self.target_encoder(images)
            features = F.layer_norm(features, features.shape[-1:])
            return repeat_blocks(gather(features, target_masks), len(images), len(context_masks))

    def loss(self, images, context_masks, target_masks, kind="smooth_l1") -> torch.Tensor:
        """The loss of float `images` (B, 3, H, W) under masks (B, Kc) and (B, K), int64."""
        targets = self.targets(images, context_masks, target_masks)
        predictions = self.predictor(self.encoder(images, context_masks), context_masks, target_masks)
        return (F.smooth_l1_loss if kind == "smooth_l1" else F.mse_loss)(predictions, targets)

    def loss_of(self, batch) -> torch.Tensor:
        """The loss of `batch` = (images, context masks, target masks) in host memory; see `loss`."""
        images, context_masks, target_masks = batch
        images = images.to(self.device, non_blocking=True)
        context_masks = [mask.to(self.device, non_blocking=True) for mask in context_masks]
        target_masks = [mask.to(self.device, non_blocking=True) for mask in target_masks]
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.autocast):
            return self.loss(images, context_masks, target_masks)

    def __call__(self, batch, lr=1e-3, weight_decay=0.04, momentum=0.996) -> float:
        """One step on `batch`, see `loss_of` -> the loss."""
        set_rates(self.optimizer, lr, weight_decay)
        loss = self.loss_of(batch)
        update(loss, self.optimizer, self.scaler)
        self.gradient_norms = gradient_norms(self.encoder)
        self.optimizer.zero_grad()
        move_average(self.target_encoder, self.encoder, momentum)
        return loss.item()


def load_published(step, encoder: dict, predictor: dict, target_encoder: dict) -> None:
    """Give the three networks of `step` the weights of published state dicts; position tables may be missing."""
    for name, weights in (("encoder", encoder), ("predictor", predictor), ("target_encoder", target_encoder)):
        missing, unexpected = getattr(step, name).load_state_dict(weights, strict=False)
        if unexpected or any(not key.endswith("pos_embed") for key in missing):
            raise ValueError(f"{name}: the weights do not fit: missing {missing}, unexpected {unexpected}")


def gradient_norms(module: nn.Module) -> list[float]:
    """The norm of each weight's gradient, read back one by one as the published loggers do."""
    return [
        p.grad.norm().item()
        for name, p in module.named_parameters()
        if p.grad is not None and p.ndim > 1 and not name.endswith("bias")
    ]


def plain_batch(images: torch.Tensor, context, target, mean, std):
    """What the published data loader hands over: `images` uint8 (B, H, W, 3) -> normalised float (B, 3, H, W), and the
    masks context (C, B, Kc), target (M, B, K) as lists of int64 tensors.
    """
    return normalise(images, mean, std), list(torch.as_tensor(context).long()), list(torch.as_tensor(target).long())
