"""Attentive probe: one learned query attends over the frozen patch features, and a linear layer reads what it gathers.

Shapes: b images of a batch, N patches, D width, C outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ijepa_fast.eval.features import Encode
from ijepa_fast.eval.linear import score_heads, split
from ijepa_fast.eval.outputs import Outputs
from ijepa_fast.models.initial import init_weights


@dataclass(frozen=True)
class AttentiveProtocol:
    """AdamW, cosine to zero. rates: trained side by side, the best on the held-out images is kept."""

    rates: tuple[float, ...] = (3e-3, 1e-3, 3e-4)
    decay: float = 0.01
    epochs: int = 20
    batch: int = 256
    least_steps: int = 300  # more epochs, and batches of a sixteenth of the images, for few of them


class AttentiveHead(nn.Module):
    """Cross-attention of one query and an MLP, each with its residual, then a linear layer (as V-JEPA's probe)."""

    def __init__(self, dim: int, heads: int, outputs: int):
        super().__init__()
        self.heads = heads
        self.query = nn.Parameter(torch.zeros(1, 1, dim))
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.q, self.kv, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.out = nn.Linear(dim, outputs)
        self.apply(init_weights)
        nn.init.trunc_normal_(self.query, std=0.02)

    def forward(self, dense: torch.Tensor) -> torch.Tensor:
        """Patch features (b, N, D) fp32 -> scores (b, C)."""
        b, n, dim = dense.shape
        keys, values = self.kv(self.norm1(dense)).view(b, n, 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        query = self.q(self.query).view(1, 1, self.heads, -1).transpose(1, 2).expand(b, -1, -1, -1)
        gathered = F.scaled_dot_product_attention(query, keys, values).transpose(1, 2).reshape(b, dim)
        x = self.query[:, 0] + self.proj(gathered)
        x = x + self.mlp(self.norm2(x))
        return self.out(self.norm3(x))


class DenseFeatures:
    """Patch features by row of the source: kept in fp16 where all fit into `room` bytes, encoded anew each time if not.

    batches: rows int64 (n,) and a batch's size -> (images, rows), without the images that cannot be decoded.
    rows: all that will be asked for.
    """

    def __init__(
        self,
        encode: Encode,
        batches: Callable[[np.ndarray, int], Iterable[tuple[torch.Tensor, torch.Tensor]]],
        rows: np.ndarray,
        device: torch.device | str,
        room: int = 4 << 30,
    ):
        self.encode, self.batches, self.device = encode, batches, device
        self.kept, self.place = None, {}
        (first, _), *_ = self._encoded(rows[:1], 1)
        if first.numel() * 2 * len(rows) <= room:
            parts = [(dense.half().cpu(), found) for dense, found in self._encoded(rows, 256)]
            self.kept = torch.cat([dense for dense, _ in parts])
            self.place = {int(row): place for place, row in enumerate(torch.cat([found for _, found in parts]))}

    def read(self, rows: np.ndarray, batch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Batches in the order of `rows`: patch features fp32 (b, N, D) on the device, rows int64 (b,) on the CPU."""
        if self.kept is None:
            yield from self._encoded(rows, batch)
            return
        rows = np.array([row for row in rows.tolist() if row in self.place])
        for first in range(0, len(rows), batch):
            part = rows[first : first + batch]
            places = torch.tensor([self.place[row] for row in part.tolist()])
            yield self.kept[places].to(self.device).float(), torch.from_numpy(part)

    @torch.no_grad()
    def _encoded(self, rows: np.ndarray, batch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for images, found in self.batches(rows, batch):
            yield self.encode(images.to(self.device)).float(), found


def fit_attentive(
    dense: DenseFeatures,
    rows: np.ndarray,
    outputs: Outputs,
    heads: int,
    protocol: AttentiveProtocol | None = None,
    holdout: float = 0.1,
    seed: int = 0,
) -> tuple[AttentiveHead, dict[str, Any]]:
    """The attentive head of the best rate.

    rows int64 (n,): the training images; outputs: of their labels, in this order, on the CPU. heads: of the attention.
    holdout: share of the images, drawn by `seed`, that chooses the rate; the head is not trained on them.
    Returns the head in evaluation mode, whose scores `outputs` decodes, and what was chosen: {"rate", "held_out"}.
    """
    protocol = protocol or AttentiveProtocol()
    targets = outputs.targets
    mean, spread = targets.float().mean(), targets.float().std().clamp_min(1e-12)
    if outputs.classes is None:
        targets = (targets - mean) / spread
    by_row = dict(zip(rows.tolist(), targets.tolist()))
    kept, held = (rows[part.numpy()] for part in split(len(rows), holdout, seed))
    batch = min(protocol.batch, max(16, len(kept) // 16), len(kept))
    steps = max(protocol.epochs * (len(kept) // batch), protocol.least_steps)
    order, step = np.random.default_rng(seed), 0
    candidates: list[_Candidate] = []
    while step < steps:
        for features, found in dense.read(order.permutation(kept), batch):
            if not candidates:
                candidates = [_Candidate(features, heads, outputs.count, r, protocol, seed) for r in protocol.rates]
            y = torch.tensor([by_row[row] for row in found.tolist()], device=features.device)
            for candidate in candidates:
                candidate.step(features, y, 0.5 * (1 + np.cos(np.pi * step / steps)))
            step += 1
            if step == steps:
                break
    for candidate in candidates:
        scores, found = attentive_scores(candidate.head, dense, held)
        truth = torch.tensor([by_row[row] for row in found.tolist()])
        candidate.held_out = score_heads(scores, truth, outputs.task)
    best = max(candidates, key=lambda candidate: candidate.held_out)
    head = best.head.eval()
    if outputs.classes is None:
        with torch.no_grad():
            head.out.weight.mul_(spread)
            head.out.bias.mul_(spread).add_(mean)
    return head, {"rate": best.rate, "held_out": best.held_out}


@torch.no_grad()
def attentive_scores(
    head: AttentiveHead, dense: DenseFeatures, rows: np.ndarray, batch: int = 256
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores fp32 (m, C) on the CPU of the images `rows` that can be decoded, and their rows (m,)."""
    parts = [(head(features).cpu(), found) for features, found in dense.read(rows, batch)]
    return torch.cat([scores for scores, _ in parts]), torch.cat([found for _, found in parts])


class _Candidate:
    """A head of one rate, and its score on the held-out images."""

    def __init__(
        self, features: torch.Tensor, heads: int, outputs: int, rate: float, protocol: AttentiveProtocol, seed: int
    ):
        self.rate, self.held_out = rate, 0.0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.head = AttentiveHead(features.shape[-1], heads, outputs).to(features.device)
        self.optimizer = torch.optim.AdamW(self.head.parameters(), lr=rate, weight_decay=protocol.decay)

    def step(self, features: torch.Tensor, targets: torch.Tensor, factor: float) -> None:
        scores = self.head(features)
        loss = F.mse_loss(scores[:, 0], targets) if targets.is_floating_point() else F.cross_entropy(scores, targets)
        self.optimizer.param_groups[0]["lr"] = self.rate * factor
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
