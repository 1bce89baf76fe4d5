"""A method of somebody else's, in one file: tokens of an image predict the mean of its pixels. It learns; no more."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ijepa_fast.config import key
from ijepa_fast.masks.draw import Draw
from ijepa_fast.methods.method import Method, Setup
from ijepa_fast.models.flops import Transformer, Work, linear
from ijepa_fast.models.initial import init_weights
from ijepa_fast.models.vit import Encoder


@dataclass
class Options:
    """What a configuration may say under objective.options."""

    noise: float = key(0.1, "standard deviation of what is added to the patches", least=0)


@dataclass(frozen=True)
class ToyDraw(Draw):
    """The noise of one patch per image, (B, N, 1)."""

    noise: torch.Tensor

    @property
    def tokens(self) -> int:
        """Tokens that pass through the encoder."""
        return self.noise[..., 0].numel()


class Toy(Method[ToyDraw]):
    """An encoder with a learned average, and a linear head."""

    Options = Options

    def __init__(self, setup: Setup):
        super().__init__(setup)
        model = setup.model
        self.encoder = Encoder(setup.data.crop, model.patch, model.dim, model.depth, model.heads, model.mlp_ratio)
        self.head = nn.Linear(model.dim, 1)
        self.apply(init_weights)
        self.keep_average("encoder")
        self.carried = {"seen": torch.zeros(())}

    def draw(self, images: int, seed: int, step: int, first: int = 0, batch: int | None = None) -> ToyDraw:
        """Noise by (seed, step, place of the image)."""
        places = range(first, first + images)
        generators = [torch.Generator().manual_seed(hash((seed, step, place))) for place in places]
        return ToyDraw(images, torch.stack([torch.randn(self.encoder.patches, 1, generator=g) for g in generators]))

    def forward(self, images: torch.Tensor, draw: ToyDraw) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Squared error of the mean, and that of the average's encoder as a term."""
        patches = self.patchify(images)
        self.carried["seen"] += draw.images
        noisy = patches + self.options.noise * draw.noise.view(-1, 1).to(patches.dtype)
        target = patches.float().view(draw.images, -1).mean(1)
        features = self.encoder(noisy, draw.images).view(draw.images, -1, self.encoder.dim)
        loss = (self.head(features.mean(1))[:, 0].float() - target).square().mean()
        return loss, {"doubled": 2 * loss.detach()}

    def work(self, draw: ToyDraw) -> Work:
        """The encoder's."""
        model, tokens = self.setup.model, self.encoder.patches
        embedding = linear(draw.tokens, 3 * model.patch**2, model.dim)
        stack = Transformer(model.dim, model.depth, model.mlp_ratio).forward([tokens] * draw.images)
        return Work(0, {"encoder": embedding + stack}, embedding)
