"""The plain vision transformer shared by the plain and strong renderings: eager PyTorch modules, no fused operation.

State-dict names are the published codes'. Shapes: B images, N tokens of one, D width, H heads, d head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


def half(device: torch.device) -> torch.dtype:
    """What autocast casts to: float16 as published, on a GPU; bfloat16 on a CPU, where float16 is many times slower."""
    return torch.bfloat16 if device.type == "cpu" else torch.float16


def written_out_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """q, k, v (B, H, N, d) -> (B, H, N, d), with the (N, N) score matrix in memory, as the published codes have it."""
    scores = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5
    return scores.softmax(dim=-1) @ v


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int, attend=written_out_attention):
        super().__init__()
        self.heads, self.attend = heads, attend
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        images, tokens, dim = x.shape
        q, k, v = self.qkv(x).reshape(images, tokens, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        return self.proj(self.attend(q, k, v).transpose(1, 2).reshape(images, tokens, dim))


class MLP(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block with stochastic depth (a whole branch is dropped, image by image)."""

    def __init__(
        self, dim: int, heads: int, mlp_ratio: float = 4.0, drop_path: float = 0.0, attend=written_out_attention
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads, attend)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MLP(dim, int(dim * mlp_ratio))
        self.drop_path = drop_path

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self._drop(self.attn(self.norm1(x)))
        return x + self._drop(self.mlp(self.norm2(x)))

    def _drop(self, branch: torch.Tensor) -> torch.Tensor:
        if not self.drop_path or not self.training:
            return branch
        kept = torch.rand(len(branch), 1, 1, device=branch.device, dtype=branch.dtype) >= self.drop_path
        return branch * kept / (1 - self.drop_path)


class PatchEmbed(nn.Module):
    def __init__(self, patch: int, dim: int):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, kernel_size=patch, stride=patch)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """`images` (B, 3, H, W) float -> (B, N, D)."""
        return self.proj(images).flatten(2).transpose(1, 2)


def parameter_groups(*modules: nn.Module) -> list[dict]:
    """AdamW groups of the published codes: biases and one-dimensional tensors are not decayed."""
    named = [(name, p) for module in modules for name, p in module.named_parameters() if p.requires_grad]
    kept = [p for name, p in named if p.ndim == 1 or name.endswith("bias")]
    decayed = [p for name, p in named if not (p.ndim == 1 or name.endswith("bias"))]
    return [{"params": decayed}, {"params": kept, "weight_decay": 0.0, "fixed": True}]


def set_rates(optimizer: torch.optim.Optimizer, lr: float, weight_decay: float) -> None:
    """Give `optimizer` this step's learning rate and, in the groups that are decayed, weight decay."""
    for group in optimizer.param_groups:
        group["lr"] = lr
        if not group.get("fixed"):
            group["weight_decay"] = weight_decay


def update(loss: torch.Tensor, optimizer: torch.optim.Optimizer, scaler=None, clip=None) -> None:
    """Backward and optimiser step, through a GradScaler where there is one; `clip()` runs between them."""
    if scaler is None:
        loss.backward()
    else:
        scaler.scale(loss).backward()
        if clip is not None:
            scaler.unscale_(optimizer)
    if clip is not None:
        clip()
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()


@torch.no_grad()
def move_average(average: nn.Module, module: nn.Module, momentum: float) -> None:
    """average = momentum * average + (1 - momentum) * module, parameter by parameter as published."""
    for target, param in zip(average.parameters(), module.parameters(), strict=True):
        target.mul_(momentum).add_((1 - momentum) * param)


def normalise(images: torch.Tensor, mean, std) -> torch.Tensor:
    """uint8 (B, H, W, 3) -> normalised float (B, 3, H, W), as the published loaders hand it over."""
    x = images.permute(0, 3, 1, 2).float() / 255
    return ((x - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]).contiguous()
