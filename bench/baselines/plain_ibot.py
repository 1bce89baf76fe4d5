"""The published iBOT step as its authors run it, rendered plainly in eager PyTorch.

Large and small crops in separate passes, every token through the whole head, softmax over all patches and then a mask,
float16 autocast with a GradScaler, gradients clipped one parameter at a time with its norm read back, an EMA one
parameter at a time, the loss read back. Tests hold it to the golden archive.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import nn

from bench.baselines.plain_vit import Block, PatchEmbed, half, move_average, parameter_groups, set_rates, update


class Backbone(nn.Module):
    def __init__(self, image_size, patch, dim, depth, heads, mlp_ratio=4.0, drop_path=0.1):
        super().__init__()
        self.side = image_size // patch
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.side**2, dim))
        self.masked_embed = nn.Parameter(torch.zeros(1, dim))
        self.patch_embed = PatchEmbed(patch, dim)
        rates = torch.linspace(0, drop_path, depth).tolist()
        self.blocks = nn.ModuleList([Block(dim, heads, mlp_ratio, rate) for rate in rates])
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, images: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """`images` (B, 3, H, W), `mask` (B, N) bool -> (B, 1 + N, D)."""
        x = self.patch_embed(images)
        if mask is not None:
            x[mask] = self.masked_embed.to(x.dtype)
        side = round(x.shape[1] ** 0.5)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.positions(side)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def positions(self, side: int) -> torch.Tensor:
        """(1, 1 + side*side, D), resampled from those of a large crop."""
        if side == self.side:
            return self.pos_embed
        grid = self.pos_embed[:, 1:].unflatten(1, (self.side, self.side)).permute(0, 3, 1, 2)
        scale = (side + 0.1) / self.side
        grid = F.interpolate(grid, scale_factor=(scale, scale), mode="bicubic")
        return torch.cat([self.pos_embed[:, :1], grid.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


class WeightNormLinear(nn.Module):
    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.weight_v = nn.Parameter(torch.randn(outputs, inputs) * inputs**-0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight_v / self.weight_v.norm(dim=1, keepdim=True))


class Head(nn.Module):
    def __init__(self, dim, hidden=2048, bottleneck=256, prototypes=8192):
        super().__init__()
        layers = [
            nn.Linear(dim, hidden),
            nn.GELU(),
            nn.Linear(hidden, hidden),
            nn.GELU(),
            nn.Linear(hidden, bottleneck),
        ]
        self.mlp = nn.Sequential(*layers)
        self.last_layer = WeightNormLinear(bottleneck, prototypes)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`x` (B, 1 + N, D) -> logits of class tokens (B, Q) and patches (B, N, Q)."""
        x = self.last_layer(F.normalize(self.mlp(x), dim=-1))
        return x[:, 0], x[:, 1:]


class Network(nn.Module):
    def __init__(self, backbone: dict, head: dict):
        super().__init__()
        self.backbone = Backbone(**backbone)
        self.head = Head(backbone["dim"], **head)

    def forward(self, images, mask=None):
        """See `Backbone` and `Head`."""
        return self.head(self.backbone(images, mask))


class DistillationStep:
    """A step of `student`, whose gradients are clipped tensor by tensor, and of its average, `teacher`."""

    def __call__(self, batch, lr=5e-4, weight_decay=0.04, momentum=0.996) -> float:
        """One step on `batch`, see `loss_of` -> the loss."""
        set_rates(self.optimizer, lr, weight_decay)
        loss = self.loss_of(batch)
        value = loss.item()
        update(loss, self.optimizer, self.scaler, self._clip)
        self.optimizer.zero_grad()
        move_average(self.teacher, self.student, momentum)
        return value

    def _clip(self, largest: float = 3.0) -> None:
        for param in self.student.parameters():
            if param.grad is not None:
                factor = largest / (param.grad.norm().item() + 1e-6)
                if factor < 1:
                    param.grad.mul_(factor)


class PlainIBOTStep(DistillationStep):
    """One training step of iBOT on one process.

    Args:
        backbone: keyword arguments of `Backbone`.
        head: of `Head`, without the width.
        device: to run on.
        autocast: autocast with a GradScaler, to `half` of the device; fp32 without.
    """

    def __init__(self, backbone: dict, head: dict, device="cpu", autocast=False):
        self.device, self.autocast = torch.device(device), autocast
        self.student = Network(backbone, head).to(device)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False).eval()
        self.optimizer = torch.optim.AdamW(parameter_groups(self.student))
        self.scaler = torch.amp.GradScaler(self.device.type) if autocast else None
        prototypes = len(self.student.head.last_layer.weight_v)
        self.centre = torch.zeros(1, prototypes, device=device)
        self.patch_centre = torch.zeros(1, 1, prototypes, device=device)

    def loss(self, large, small, masks, temperature) -> torch.Tensor:
        """`large` and `small` lists of crops (B, 3, H, W), `masks` of (B, N) bool, one a large crop -> loss."""
        with torch.no_grad():
            teacher_classes, teacher_patches = self.teacher(torch.cat(large))
        classes, patches = self.student(torch.cat(large), torch.cat(masks))
        small_classes, _ = self.student(torch.cat(small))
        classes = (torch.cat([classes, small_classes]) / 0.1).chunk(len(large) + len(small))
        patches = (patches / 0.1).chunk(len(large))
        class_targets = ((teacher_classes - self.centre) / temperature).softmax(-1).detach().chunk(len(large))
        patch_targets = ((teacher_patches - self.patch_centre) / temperature).softmax(-1).detach().chunk(len(large))
        class_losses, patch_losses = [], []
        for i in range(len(large)):
            for j in range(len(classes)):
                if i == j:
                    loss = (-patch_targets[i] * patches[j].log_softmax(-1)).sum(-1)
                    count = masks[j].sum(-1).clamp(min=1.0)
                    patch_losses.append(((loss * masks[j].float()).sum(-1) / count).mean())
                else:
                    class_losses.append((-class_targets[i] * classes[j].log_softmax(-1)).sum(-1).mean())
        with torch.no_grad():
            self.centre = self.centre * 0.9 + teacher_classes.mean(0, keepdim=True) * 0.1
            self.patch_centre = self.patch_centre * 0.9 + teacher_patches.mean(1).mean(0)[None, None] * 0.1
        return sum(class_losses) / len(class_losses) + sum(patch_losses) / len(patch_losses)

    def loss_of(self, batch) -> torch.Tensor:
        """The loss of `batch` = (large, small, masks, temperature) in host memory; see `loss`."""
        *lists, temperature = batch
        large, small, masks = ([x.to(self.device, non_blocking=True) for x in tensors] for tensors in lists)
        with torch.autocast(self.device.type, dtype=half(self.device), enabled=self.autocast):
            return self.loss(large, small, masks, temperature)
