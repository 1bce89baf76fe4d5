"""The published data2vec step of images as its authors run it, rendered plainly in eager PyTorch.

Every patch is computed in every block of both networks, each block's output is normalised as a whole and then indexed
by the mask, attention's scores are in memory with the bias added, float16 autocast with a GradScaler, one norm for
all gradients, an EMA one parameter at a time, the loss read back. Tests hold it to the golden archive.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import nn

from bench.baselines.plain_vit import MLP, PatchEmbed, half, move_average, parameter_groups, set_rates, update
from ijepa_fast.models.relative import RelativePositions


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        images, tokens, dim = x.shape
        biases = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, biases).reshape(images, tokens, 3, self.heads, dim // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1) + bias[None]
        return self.proj((scores.softmax(dim=-1) @ v).transpose(1, 2).reshape(images, tokens, dim))


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, mlp_ratio: float, drop_path: float, layer_scale: float):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn, self.mlp = Attention(dim, heads), MLP(dim, int(dim * mlp_ratio))
        self.gamma_1 = nn.Parameter(layer_scale * torch.ones(dim))
        self.gamma_2 = nn.Parameter(layer_scale * torch.ones(dim))
        self.drop_path = drop_path

    def forward(self, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        x = x + self._drop(self.gamma_1 * self.attn(self.norm1(x), bias))
        return x + self._drop(self.gamma_2 * self.mlp(self.norm2(x)))

    def _drop(self, branch: torch.Tensor) -> torch.Tensor:
        if not self.drop_path or not self.training:
            return branch
        kept = torch.rand(len(branch), 1, 1, device=branch.device, dtype=branch.dtype) >= self.drop_path
        return branch * kept / (1 - self.drop_path)


class Network(nn.Module):
    def __init__(self, image_size, patch, dim, depth, heads, mlp_ratio=4.0, drop_path=0.25, layer_scale=1e-4):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.patch_embed = PatchEmbed(patch, dim)
        self.rel_pos_bias = RelativePositions((image_size // patch,) * 2, heads)
        rates = torch.linspace(0, drop_path, depth).tolist()
        self.blocks = nn.ModuleList([Block(dim, heads, mlp_ratio, rate, layer_scale) for rate in rates])
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.lm_head = nn.Linear(dim, dim)

    def layers(self, images: torch.Tensor, mask: torch.Tensor | None = None) -> list[torch.Tensor]:
        """`images` (B, 3, H, W), `mask` (B, N) bool -> each block's output (B, 1 + N, D)."""
        x = self.patch_embed(images)
        if mask is not None:
            hidden = mask[..., None].type_as(x)
            x = x * (1 - hidden) + self.mask_token * hidden
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        bias, outputs = self.rel_pos_bias(), []
        for block in self.blocks:
            x = block(x, bias)
            outputs.append(x)
        return outputs

    def forward(self, images: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """See `layers` -> the head's outputs (R, D) at masked patches."""
        return self.lm_head(self.norm(self.layers(images, mask)[-1])[:, 1:][mask])


class PlainData2VecStep:
    """One training step of data2vec on one process.

    Args:
        network: keyword arguments of `Network`.
        targets: numbers of the blocks whose outputs are the target.
        beta: of the loss.
        device: to run on.
        autocast: autocast with a GradScaler, to `half` of the device; fp32 without.
    """

    def __init__(self, network: dict, targets: list[int], beta=2.0, device="cpu", autocast=False):
        self.device, self.autocast, self.targets, self.beta = torch.device(device), autocast, targets, beta
        self.network = Network(**network).to(device)
        self.average = copy.deepcopy(self.network).requires_grad_(False).eval()
        self.optimizer = torch.optim.AdamW(parameter_groups(self.network))
        self.scaler = torch.amp.GradScaler(self.device.type) if autocast else None

    def loss(self, images: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """`images` (B, 3, H, W), `mask` (B, N) bool -> loss."""
        with torch.no_grad():
            layers = self.average.layers(images)
            normed = [F.layer_norm(layers[i][:, 1:].float(), layers[i].shape[-1:]) for i in self.targets]
            mean = sum(normed) / len(normed)
            target = F.layer_norm(mean, mean.shape[-1:])[mask]
        return F.smooth_l1_loss(self.network(images, mask).float(), target, beta=self.beta)

    def loss_of(self, batch) -> torch.Tensor:
        """The loss of `batch` = (float images (B, 3, H, W), mask (B, N)) in host memory."""
        images, mask = (x.to(self.device, non_blocking=True) for x in batch)
        with torch.autocast(self.device.type, dtype=half(self.device), enabled=self.autocast):
            return self.loss(images, mask)

    def __call__(self, batch, lr=2e-3, weight_decay=0.05, momentum=0.9998) -> float:
        """One step on `batch`, see `loss_of` -> the loss."""
        set_rates(self.optimizer, lr, weight_decay)
        loss = self.loss_of(batch)
        value = loss.item()
        update(loss, self.optimizer, self.scaler, self._clip)
        self.optimizer.zero_grad()
        move_average(self.average, self.network, momentum)
        return value

    def _clip(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 3.0)
