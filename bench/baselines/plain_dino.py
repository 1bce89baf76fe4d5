"""The published DINO step as its authors run it, rendered plainly in eager PyTorch.

Crops of one size in one pass, all tokens through the last block, a loop over pairs of crops, float16 autocast with a
GradScaler, gradients clipped one parameter at a time with its norm read back, an EMA one parameter at a time, the loss
read back. Tests hold it to the golden archive.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import nn

from bench.baselines.plain_ibot import Backbone, DistillationStep, WeightNormLinear
from bench.baselines.plain_vit import half, parameter_groups


class Head(nn.Module):
    def __init__(self, dim, hidden=2048, bottleneck=256, prototypes=65536):
        super().__init__()
        narrow = [nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU()]
        self.mlp = nn.Sequential(*narrow, nn.Linear(hidden, bottleneck))
        self.last_layer = WeightNormLinear(bottleneck, prototypes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Class tokens (r, D) -> logits (r, Q)."""
        return self.last_layer(F.normalize(self.mlp(x), dim=-1))


class Network(nn.Module):
    def __init__(self, backbone: dict, head: dict):
        super().__init__()
        self.backbone = Backbone(**backbone)
        self.backbone.masked_embed = None
        self.head = Head(backbone["dim"], **head)

    def forward(self, crops: list[torch.Tensor]) -> torch.Tensor:
        """Crops (B, 3, H, W), those of one size one after the other -> logits (crops*B, Q)."""
        sizes = sorted({crop.shape[-1] for crop in crops}, reverse=True)
        batches = [torch.cat([crop for crop in crops if crop.shape[-1] == size]) for size in sizes]
        return self.head(torch.cat([self.backbone(batch)[:, 0] for batch in batches]))


class PlainDINOStep(DistillationStep):
    """One training step of DINO on one process; the prototypes have length 1.

    Args:
        backbone: keyword arguments of plain_ibot.Backbone.
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
        self.centre = torch.zeros(1, len(self.student.head.last_layer.weight_v), device=device)

    def loss(self, crops: list[torch.Tensor], temperature: float) -> torch.Tensor:
        """`crops`: 2 large, then small ones, (B, 3, H, W) each -> loss."""
        with torch.no_grad():
            teacher = self.teacher(crops[:2])
        student = (self.student(crops) / 0.1).chunk(len(crops))
        targets = ((teacher - self.centre) / temperature).softmax(-1).detach().chunk(2)
        losses = []
        for i, target in enumerate(targets):
            for j, logits in enumerate(student):
                if i != j:
                    losses.append((-target * logits.log_softmax(-1)).sum(-1).mean())
        with torch.no_grad():
            self.centre = self.centre * 0.9 + teacher.mean(0, keepdim=True) * 0.1
        return sum(losses) / len(losses)

    def loss_of(self, batch) -> torch.Tensor:
        """The loss of `batch` = (crops, temperature) in host memory; see `loss`."""
        crops, temperature = batch
        crops = [x.to(self.device, non_blocking=True) for x in crops]
        with torch.autocast(self.device.type, dtype=half(self.device), enabled=self.autocast):
            return self.loss(crops, temperature)
