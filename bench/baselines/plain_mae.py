"""The published MAE pre-training step as its authors run it, rendered plainly in eager PyTorch.

All patches are embedded, then shuffled and dropped by gathers whose int64 indices are repeated to the width; the
decoder puts its tokens back into image order; the loss covers all patches and is masked. float16 autocast with a
GradScaler and a gradient norm on a GPU; the loss is read back each step. Tests hold it to the golden archive.
"""

from __future__ import annotations

import torch
from torch import nn

from bench.baselines.plain_vit import Block, PatchEmbed, half, parameter_groups, set_rates, update
from ijepa_fast.models.positions import sincos_2d


def gather(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """x (B, N, D), index (B, K) int64 -> (B, K, D)."""
    return x.gather(1, index.unsqueeze(-1).repeat(1, 1, x.shape[-1]))


def table(dim: int, grid: tuple[int, int]) -> nn.Parameter:
    """Positions (1, 1 + N, D), the class token's zero."""
    return nn.Parameter(torch.cat([torch.zeros(1, dim), sincos_2d(dim, grid)])[None], requires_grad=False)


class PlainMAE(nn.Module):
    """Masked autoencoder; state-dict names are the published ones."""

    def __init__(
        self, image_size, patch, dim, depth, heads, mlp_ratio=4.0, decoder_dim=512, decoder_depth=8, decoder_heads=16
    ):
        super().__init__()
        self.patch, grid = patch, (image_size // patch, image_size // patch)
        self.patch_embed = PatchEmbed(patch, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = table(dim, grid)
        self.blocks = nn.ModuleList([Block(dim, heads, mlp_ratio) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.decoder_embed = nn.Linear(dim, decoder_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_dim))
        self.decoder_pos_embed = table(decoder_dim, grid)
        self.decoder_blocks = nn.ModuleList([Block(decoder_dim, decoder_heads) for _ in range(decoder_depth)])
        self.decoder_norm = nn.LayerNorm(decoder_dim, eps=1e-6)
        self.decoder_pred = nn.Linear(decoder_dim, 3 * patch**2)

    def forward(self, images: torch.Tensor, order: torch.Tensor, visible: int) -> torch.Tensor:
        """`images` (B, 3, H, W); `order` (B, N) int64: patches shuffled, the first `visible` kept -> loss."""
        restore = order.argsort(dim=1)
        x = gather(self.patch_embed(images) + self.pos_embed[:, 1:], order[:, :visible])
        x = torch.cat([(self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1), x], dim=1)
        for block in self.blocks:
            x = block(x)
        x = self.decoder_embed(self.norm(x))
        masked = self.mask_token.repeat(len(x), order.shape[1] - visible, 1)
        tokens = gather(torch.cat([x[:, 1:], masked.to(x.dtype)], dim=1), restore)
        x = torch.cat([x[:, :1], tokens], dim=1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        predictions = self.decoder_pred(self.decoder_norm(x))[:, 1:]
        target = self.pixels(images)
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6) ** 0.5
        loss = (predictions - target).square().mean(-1)
        mask = (restore >= visible).to(loss.dtype)
        return (loss * mask).sum() / mask.sum()

    def pixels(self, images: torch.Tensor) -> torch.Tensor:
        """`images` (B, 3, H, W) -> (B, N, 3*P*P), column (i*P + j)*3 + c."""
        x = images.unflatten(3, (-1, self.patch)).unflatten(2, (-1, self.patch))  # (B, 3, h, P, w, P)
        return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


class PlainMAEStep:
    """One training step of MAE on one process.

    Args:
        model: keyword arguments of `PlainMAE`.
        device: to run on.
        autocast: autocast with a GradScaler, to `half` of the device; fp32 without.
    """

    def __init__(self, model: dict, device="cpu", autocast=False):
        self.device, self.autocast = torch.device(device), autocast
        self.model = PlainMAE(**model).to(device)
        self.optimizer = torch.optim.AdamW(parameter_groups(self.model), betas=(0.9, 0.95))
        self.scaler = torch.amp.GradScaler(self.device.type) if autocast else None

    def loss_of(self, batch) -> torch.Tensor:
        """The loss of `batch` = (float images (B, 3, H, W), order (B, N), visible) in host memory."""
        images, order, visible = batch
        images, order = (x.to(self.device, non_blocking=True) for x in (images, order))
        with torch.autocast(self.device.type, dtype=half(self.device), enabled=self.autocast):
            return self.model(images, order, visible)

    def __call__(self, batch, lr=1.5e-4, weight_decay=0.04) -> float:
        """One step on `batch`, see `loss_of` -> the loss."""
        set_rates(self.optimizer, lr, weight_decay)
        loss = self.loss_of(batch)
        value = loss.item()
        update(loss, self.optimizer, self.scaler, self._gradient_norm)
        self.optimizer.zero_grad()
        return value

    def _gradient_norm(self) -> None:
        norms = [p.grad.norm() for p in self.model.parameters() if p.grad is not None]
        self.gradient_norm = torch.stack(norms).norm()
