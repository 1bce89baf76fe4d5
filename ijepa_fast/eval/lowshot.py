"""Low-shot learning: the same share of the labels of every class, and the whole encoder trained on these images."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ijepa_fast.data.dali import TrainLoader
from ijepa_fast.data.sources import Source
from ijepa_fast.eval.features import Network
from ijepa_fast.eval.labels import Samples


@dataclass(frozen=True)
class FineTuning:
    """AdamW with layer decay; the rate rises linearly over `warmup` of the steps and falls to zero as a cosine."""

    epochs: int = 50
    batch: int = 512
    rate: float = 3e-5
    layer_decay: float = 0.75
    smoothing: float = 0.1
    weight_decay: float = 0.05
    warmup: float = 0.1
    scale: tuple[float, float] = (0.3, 1.0)  # of the random crops


PAPER_TUNING = FineTuning()  # I-JEPA, appendix A.2
SMALL_TUNING = FineTuning(epochs=100, batch=32, rate=1e-3)  # for small encoders and a few hundred images


def draw_share(targets: torch.Tensor, share: float, seed: int) -> np.ndarray:
    """Indices int64, sorted, of `share` of the images of every class, at least one; targets int64 (n,)."""
    if not 0 < share <= 1:
        raise ValueError(f"--share: expected 0 < share <= 1, got {share}")
    generator = np.random.default_rng(seed)
    drawn = []
    for label in targets.unique():
        members = np.flatnonzero((targets == label).numpy())
        drawn.append(generator.permutation(members)[: max(1, round(share * len(members)))])
    return np.sort(np.concatenate(drawn))


class Classifier(nn.Module):
    """An encoder, average pooling and a linear layer."""

    def __init__(self, encoder: Network, outputs: int):
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.dim, outputs)
        nn.init.trunc_normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images uint8 (b, H, W, 3) -> scores (b, C)."""
        return self.head(self.encoder(images).mean(1))


def parameter_groups(
    classifier: Classifier, rate: float, layer_decay: float, weight_decay: float
) -> list[dict[str, Any]]:
    """Groups of AdamW: the rate of a layer is `rate` * layer_decay^(layers above it), the head's is `rate`.

    Biases and 1-D parameters are not decayed.
    """
    depth = len(classifier.encoder.encoder.blocks)
    groups: dict[tuple[int, float], dict[str, Any]] = {}
    for name, parameter in classifier.named_parameters():
        block = re.search(r"\.blocks\.(\d+)\.", name)
        above = name.startswith(("head.", "encoder.encoder.norm."))
        layer = int(block[1]) + 1 if block else depth + 1 if above else 0
        decay = weight_decay if parameter.ndim > 1 else 0.0
        group = {"params": [], "lr": rate * layer_decay ** (depth + 1 - layer), "weight_decay": decay}
        groups.setdefault((layer, decay), group)["params"].append(parameter)
    return list(groups.values())


def fine_tune(
    encoder: Network,
    source: Source,
    rows: np.ndarray,
    targets: torch.Tensor,
    outputs: int,
    protocol: FineTuning = PAPER_TUNING,
    seed: int = 0,
) -> Classifier:
    """A copy of `encoder` (fp32), trained with a linear head on the images `rows`.

    rows int64 (n,) of `source`; targets int64 (n,), from 0 to outputs - 1. Images are cropped and mirrored at random.
    Returns a Classifier in evaluation mode.
    """
    device = next(encoder.parameters()).device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = Classifier(copy.deepcopy(encoder), outputs).requires_grad_(True).to(device)
    batch = min(protocol.batch, len(rows))
    groups = parameter_groups(classifier, protocol.rate, protocol.layer_decay, protocol.weight_decay)
    optimizer = torch.optim.AdamW(groups)
    rates = [group["lr"] for group in groups]
    steps = max(1, protocol.epochs * len(rows) // batch)
    loader = TrainLoader(
        Samples(source, rows),
        batch_size=batch,
        crop=encoder.crop,
        scale=protocol.scale,
        interpolation=encoder.arch.interpolation,
        flip=True,
        seed=seed,
        device=device,
    )
    try:
        for step in range(steps):
            sample = next(loader)
            y = targets[sample.indices].to(device)
            factor = min((step + 1) / max(1.0, protocol.warmup * steps), 0.5 * (1 + np.cos(np.pi * step / steps)))
            for group, rate in zip(optimizer.param_groups, rates):
                group["lr"] = rate * factor
            loss = F.cross_entropy(classifier(sample.images), y, label_smoothing=protocol.smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    finally:
        loader.close()
    return classifier.eval()
