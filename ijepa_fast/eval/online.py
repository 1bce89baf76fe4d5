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

from ijepa_fast.eval.collapse import (
    LEAST_A_CLASS,
    RANK_IMAGES,
    Moments,
    advise,
    examine,
    has_collapsed,
    lidar,
    means_of,
)
from ijepa_fast.eval.features import Standardiser
from ijepa_fast.eval.outputs import measure
from ijepa_fast.methods.method import Method

WINDOW = 4096  # images kept, of rank 0
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
        # Of the last RANK_IMAGES images, and of those before them that fill one more block of as many.
        self._blocks: deque[Moments] = deque(maxlen=2)
        self._size: torch.Tensor | None = None  # mean square of the last block's output, of the last batch
        self._means, self._places = means_of(method), method.encoder.patches
        self.untrained, self._begins = untrained, untrained is None and step == 0
        self._advised: str | None = None
        if rank == 0 and self.every > 0:
            method.watch = self._watch
            self._measure(method)

    def _measure(self, method: Method) -> None:
        """Have the encoder whose features are watched measure its last block's output; a frozen one's cannot grow."""
        if not self._means.fixed:
            encoder = method.probed
            self._size = torch.full((), torch.nan, device=next(encoder.parameters()).device)
            encoder.measured = self._size

    def _watch(self, features: torch.Tensor, draw: Any) -> None:
        """Keep a batch's target features (U, D): their mean over each image's target patches, and sums of all.

        draw: a MaskDraw, or what has its `images`, `union_lengths` and `union_places`.
        """
        lengths = draw.union_lengths
        self._pooled.append(torch.segment_reduce(features.float(), "mean", lengths=lengths, unsafe=True))
        if len(self._pooled) > -(-WINDOW // draw.images):
            self._pooled.popleft()
        if not self._blocks or self._blocks[-1].images >= RANK_IMAGES:
            self._blocks.append(Moments(self._places, features.shape[1], features.device))
        self._blocks[-1].add(features, draw.union_places, draw.images, self._size)

    def _end_first(self) -> None:
        """Note what the images until now say of the untrained encoder, where nothing is noted yet."""
        if self._begins:
            pooled, indices = self._window()
            self.untrained = self._examine(pooled[:RANK_IMAGES], indices[:RANK_IMAGES])
        self._begins = False

    def _window(self) -> tuple[torch.Tensor, np.ndarray]:
        """Pooled features (n, D) of the images that are kept, and which they are, (n,)."""
        return torch.cat(list(self._pooled)), np.concatenate(list(self._indices))

    def _examine(self, pooled: torch.Tensor, indices: np.ndarray) -> dict[str, Any]:
        """The doctor's figures of these images, and by label their LiDAR."""
        found: dict[str, Any] = dict(examine(pooled, self._blocks))
        return found | {name: {"lidar": value} for name, value in self._lidar(pooled, indices).items()}

    def add(self, indices: torch.Tensor) -> None:
        """Say which samples (B,) the last batch was made of."""
        if self._blocks:
            self._indices.append(indices.numpy())
            while len(self._indices) > len(self._pooled):
                self._indices.popleft()
            if self._blocks[-1].images >= RANK_IMAGES:
                self._end_first()

    def read(self, step: int) -> dict:
        """The probe's section of the log where one is due, {} where none is.

        {"probe": {"rankme", "images": that it is of, "target_variance", "position_share", "residual_norm", see
        `collapse.examine`; "untrained": the same of the run's first images, "collapsed", "<label>": outputs.measure
        and, of classes, lidar, ...}}; "fixed", true, where the features are a frozen encoder's. Says what is wrong,
        once.
        """
        if not self._blocks or step // self.every == self._last // self.every:
            return {}
        self._last = step
        self._end_first()
        pooled, indices = self._window()
        last = slice(-RANK_IMAGES, None)
        found: dict[str, Any] = dict(examine(pooled[last], self._blocks))
        if self.untrained is not None:
            found["untrained"] = dict(self.untrained)
        found |= self._probe(pooled, indices)
        for name, value in self._lidar(pooled[last], indices[last]).items():
            found.setdefault(name, {})["lidar"] = value
        self._warn(step, found, pooled.shape[1])
        for kept in (self._pooled, self._indices, self._blocks):
            kept.clear()
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
        """LiDAR by label, of those that are classes and have enough images of each that is seen."""
        labels = {name: self._columns[name][indices] for name in self._classes if name in self._columns}
        few = {name: ids for name, ids in labels.items() if len(ids) >= LEAST_A_CLASS * len(np.unique(ids))}
        return {name: lidar(pooled, torch.from_numpy(ids).to(pooled.device)) for name, ids in few.items()}

    def _warn(self, step: int, found: dict, width: int) -> None:
        found["collapsed"] = has_collapsed(found) and not self._means.fixed
        if self._means.fixed:
            found["fixed"] = True
        advice = advise(found, self.untrained, min(width, RANK_IMAGES), self._means)
        if advice is not None:
            found["advice"] = advice.words
            if self._advised != advice.kind:
                self._say(f"step {step}: {advice.words}")
        self._advised = None if advice is None else advice.kind
