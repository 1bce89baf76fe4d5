"""The online probe: is the representation getting better, or collapsing, while it trains?

It costs almost nothing, because it reads what the step has computed anyway. It keeps the target encoder's features of
the last few thousand training images, pooled over the targets of each image. When the probe is due, it fits a ridge
classifier in closed form on three quarters of them and tests it on the last quarter. It changes nothing that the run
computes. The images are training images, cropped at random, so its numbers are for comparing one step with another; the
numbers to report are those of evaluate.py after training.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ijepa_fast.eval.collapse import advise, examine, has_collapsed, lidar
from ijepa_fast.eval.features import Standardiser
from ijepa_fast.eval.outputs import measure
from ijepa_fast.eval.rankme import rankme
from ijepa_fast.methods.method import Method

WINDOW = 4096  # images kept, of rank 0
RANK_IMAGES = 512  # of these, for the rank: its cost grows with the cube
MOST_CLASSES = 2000  # a label with more of them needs more images than are kept
RIDGE = 0.1


class OnlineProbe:
    """Rank 0's probe of the features that a method hands to its `watch`; on the other ranks, nothing.

    A method that never calls `watch`, such as MAE, is not probed.
    every: steps between readings, 0 for none. columns: {label: values (n,)} of the n training images, int64 ids into
    `classes[label]` or numbers. step: where the run goes on. say: prints a line. untrained: what an earlier launch
    found of the run's first images, when the encoder had hardly moved; a run that begins finds it itself.
    """

    def __init__(
        self,
        method: Method,
        every: int,
        columns: dict[str, np.ndarray],
        classes: dict[str, list[str]],
        rank: int = 0,
        step: int = 0,
        say: Callable[[str], None] = print,
        untrained: dict[str, Any] | None = None,
    ):
        self.every, self._last, self._say = every, step, say
        self._columns, self._classes = columns, classes
        self._pooled: deque[torch.Tensor] = deque()
        self._indices: deque[np.ndarray] = deque()
        self._targets: tuple[torch.Tensor, torch.Tensor] | None = None  # of the last batch, and their places
        self.untrained, self._begins = untrained, untrained is None and step == 0
        # Pooled features of the first images, and which they are, until there are RANK_IMAGES.
        self._first: list[tuple[torch.Tensor, np.ndarray]] = []
        self._advised: str | None = None
        if rank == 0 and self.every > 0:
            method.watch = self._watch

    def _watch(self, features: torch.Tensor, draw: Any) -> None:
        """Keep a batch's target features (U, D), averaged over each image's target patches; draw: a MaskDraw."""
        lengths = draw.union_lengths
        self._pooled.append(torch.segment_reduce(features.float(), "mean", lengths=lengths, unsafe=True))
        self._targets = features, draw.union_places
        if len(self._pooled) > -(-WINDOW // draw.images):
            self._pooled.popleft()

    def _look_at_first(self) -> None:
        """Examine the features of the run's first images, as soon as there are enough for the rank."""
        assert self._targets is not None
        self._first.append((self._pooled[-1], self._indices[-1]))
        if len(self._first) == 1:  # of the first batch, but for the rank: the encoder has not moved yet
            self.untrained = dict(examine(self._pooled[-1], *self._targets))
        self._begins = sum(len(pooled) for pooled, _ in self._first) < RANK_IMAGES
        if not self._begins:
            self._end_first()

    def _end_first(self) -> None:
        if self._first and self.untrained is not None:
            pooled = torch.cat([pooled for pooled, _ in self._first])[:RANK_IMAGES]
            indices = np.concatenate([indices for _, indices in self._first])[:RANK_IMAGES]
            self.untrained["rankme"] = rankme(pooled)
            self.untrained |= {name: {"lidar": found} for name, found in self._lidar(pooled, indices).items()}
        self._begins, self._first = False, []

    def add(self, indices: torch.Tensor) -> None:
        """Say which samples (B,) the last batch was made of."""
        if self._targets is not None:
            self._indices.append(indices.numpy())
            while len(self._indices) > len(self._pooled):
                self._indices.popleft()
            if self._begins:
                self._look_at_first()

    def read(self, step: int) -> dict:
        """The probe's section of the log where one is due, {} where none is.

        {"probe": {"rankme", "target_variance", "position_share", "feature_norm", "untrained": the same of the run's
        first images, "collapsed", "<label>": outputs.measure and, of classes, lidar, ...}}. Says what is wrong, once.
        """
        if self._targets is None or step // self.every == self._last // self.every:
            return {}
        self._last = step
        pooled, indices = torch.cat(list(self._pooled)), np.concatenate(list(self._indices))
        self._end_first()
        last = slice(-RANK_IMAGES, None)
        found: dict[str, Any] = dict(examine(pooled[last], *self._targets))
        if self.untrained is not None:
            found["untrained"] = dict(self.untrained)
        found |= self._probe(pooled, indices)
        for name, value in self._lidar(pooled[last], indices[last]).items():
            found.setdefault(name, {})["lidar"] = value
        self._warn(step, found, pooled.shape[1])
        self._pooled.clear()
        self._indices.clear()
        self._targets = None
        return {"probe": found}

    def _probe(self, pooled: torch.Tensor, indices: np.ndarray) -> dict:
        last = np.arange(len(indices)) >= len(indices) - len(indices) // 4
        kept = torch.from_numpy(~last & ~np.isin(indices, indices[last])).to(pooled.device)
        held = torch.from_numpy(last).to(pooled.device)
        columns = {
            name: torch.from_numpy(values[indices]).to(pooled.device)
            for name, values in self._columns.items()
            if len(self._classes.get(name, ())) <= MOST_CLASSES
        }
        if not columns or kept.sum() < 2 or held.sum() < 2:
            return {}
        x = Standardiser(pooled[kept])(pooled)
        gram = x[kept].T @ x[kept] / kept.sum()
        factor = torch.linalg.cholesky(gram + RIDGE * torch.eye(len(gram), device=gram.device))
        figures = {}
        for name, values in columns.items():
            if name in self._classes:
                targets, task = F.one_hot(values, len(self._classes[name])).float(), "classification"
            else:
                targets, task = values.float()[:, None], "regression"
            mean = targets[kept].mean(0)
            weight = torch.cholesky_solve(x[kept].T @ (targets[kept] - mean) / kept.sum(), factor)
            scores = x[held] @ weight + mean
            predictions = scores.argmax(1) if name in self._classes else scores[:, 0]
            figures[name] = measure(predictions, values[held], task)
        return figures

    def _lidar(self, pooled: torch.Tensor, indices: np.ndarray) -> dict[str, float]:
        """LiDAR by label, of those that are classes, on as many images before training as at a reading."""
        labels = {name: self._columns[name][indices] for name in self._classes if name in self._columns}
        few = {name: ids for name, ids in labels.items() if len(self._classes[name]) <= MOST_CLASSES}
        return {name: lidar(pooled, torch.from_numpy(ids).to(pooled.device)) for name, ids in few.items()}

    def _warn(self, step: int, found: dict, width: int) -> None:
        found["collapsed"] = has_collapsed(found)
        advice = advise(found, self.untrained, min(width, RANK_IMAGES))
        if advice is not None:
            found["advice"] = advice.words
            if self._advised != advice.kind:
                self._say(f"step {step}: {advice.words}")
        self._advised = None if advice is None else advice.kind
