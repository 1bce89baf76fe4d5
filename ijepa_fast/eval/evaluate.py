"""The evaluation of an encoder on labelled images: every probe on every label, as a list of figures."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from ijepa_fast.data import Size
from ijepa_fast.data.dali import eval_batches
from ijepa_fast.eval.attentive import DenseFeatures, attentive_scores, fit_attentive
from ijepa_fast.eval.features import Encode, Standardiser, network, pooled_features
from ijepa_fast.eval.figures import Figure, over_seeds
from ijepa_fast.eval.knn import KS, knn_scores
from ijepa_fast.eval.labels import Labelled, Samples, match
from ijepa_fast.eval.lowshot import PAPER_TUNING, FineTuning, draw_share, fine_tune
from ijepa_fast.eval.outputs import Outputs, measure, standard_errors
from ijepa_fast.eval.sweep import fit_head

LAST = 4  # layers that "last4" concatenates
FEATURES = ("last", "last4", "blocks")


def covering(crop: int | Size, resize: int | None) -> int | Size:
    """What an image just covers before the central crop; resize: the shorter side of that, None: of the crop."""
    if resize is None or isinstance(crop, int):
        return resize or crop
    short = min(crop)
    return (round(crop[0] * resize / short), round(crop[1] * resize / short))


@dataclass(frozen=True)
class Options:
    """How images are read and encoded, and which heads are trained on the features.

    Attributes:
        crop: side of the central crop, or height and width, pixels.
        resize: shorter side before the crop, pixels; None: `crop`.
        interpolation: "bilinear" or "bicubic".
        batch_size: images encoded at once.
        device: of the encoder; heads are trained there too.
        dtype: of the encoder while its features are taken; None: as it is.
        images: at most, of the training and of the test images, drawn by `draw_seed`; None: all.
        probes: of PROBES.
        features: of "last" (the last layer), "last4" (the last four, side by side) and "blocks" (the output of each
            block by itself). Probes other than "linear" read the first.
        heads, protocol: of linear heads, see sweep.fit_head.
        seeds: how often heads are trained, each time with other held-out images and other first weights.
        share: of the labels of each class, for "lowshot" and "finetune".
        tuning: of "finetune".
    """

    crop: int | Size
    resize: int | None = None
    interpolation: str = "bilinear"
    batch_size: int = 256
    device: torch.device | str = "cpu"
    dtype: torch.dtype | None = None
    images: int | None = None
    draw_seed: int = 0
    probes: tuple[str, ...] = ("linear", "knn")
    features: tuple[str, ...] = ("last",)
    heads: tuple[str, ...] = ("bn_linear",)
    protocol: str = "fast"
    seeds: int = 1
    share: float = 0.01
    tuning: FineTuning = PAPER_TUNING

    def batches(self, part: Labelled, rows: np.ndarray, size: int) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
        """Batches of `size` of the samples `rows` that can be decoded: images uint8 (b, crop, crop, 3), rows (b,)."""
        return eval_batches(
            Samples(part.source, rows),
            batch_size=size,
            crop=self.crop,
            resize=covering(self.crop, self.resize),
            device=self.device,
            interpolation=self.interpolation,
        )


@dataclass
class Split:
    """The training or the test images of an evaluation, without those that cannot be decoded.

    rows: int64 (n,) of `part.source`. features: {"last", "last4" or "block 1" and so on: fp32 (n, D)} and labels:
    {name: (n,)}, both on the device.
    """

    part: Labelled
    rows: np.ndarray
    features: dict[str, torch.Tensor]
    labels: dict[str, torch.Tensor]


def evaluate(encoder: Encode, train: Labelled, test: Labelled, options: Options) -> list[Figure]:
    """Train heads on the features of `train`, measure them on `test`: a figure per label, probe and metric.

    encoder: images uint8 (b, H, W, 3) on `options.device` -> features (b, N, D) of N patches or one class token; for
    "last4", "blocks", "attentive", "finetune" and another dtype a features.Network, in fp32. A test image whose label
    no training image has counts as wrong. Raises ValueError as `matched` does, before anything is encoded.
    """
    test = matched(train, test, options)
    frozen: Any = encoder if options.dtype is None else copy.deepcopy(encoder)
    if options.dtype is not None:
        frozen.to(options.dtype)
    read = [read_split(frozen, part, options) for part in (train, test)]
    return Evaluation(encoder, frozen, read[0], read[1], options).figures()


def matched(train: Labelled, test: Labelled, options: Options) -> Labelled:
    """`test` with the class ids of `train`.

    Raises ValueError where it lacks a label or has a class that `train` has not, where all images have one label, and
    where k-NN is wanted of fewer images than neighbours.
    """
    test = match(train, test)
    if all(len(values.unique()) < 2 for values in train.labels.values()):
        names = ", ".join(train.tasks)
        raise ValueError(
            f"{train.source.root}: all images have the same {names}; a probe needs two labels to tell apart"
        )
    images = min(len(train.source), options.images or len(train.source))
    if "knn" in options.probes and images < min(KS):
        raise ValueError(
            f"{train.source.root}: k-NN takes at least {min(KS)} training images, got {images}; name more images, "
            "or leave k-NN out (--probes linear)"
        )
    return test


def read_split(encoder: Encode, part: Labelled, options: Options) -> Split:
    """Encode `part`, or `options.images` of it."""
    wanted = part.rows(options.images, options.draw_seed)
    batches = options.batches(part, wanted, options.batch_size)
    total = -(-len(wanted) // options.batch_size)
    bar = tqdm(batches, f"encoding {part.source.root}", total, unit="batch", mininterval=1, disable=None, delay=2)
    encode, slices = encode_layers(encoder, options.features)
    features, rows = pooled_features(encode, bar, options.device)
    parts = features.chunk(max(stop for _, stop in slices.values()), dim=1)
    sets = {name: torch.cat(parts[slice(*ends)], dim=1).to(options.device) for name, ends in slices.items()}
    labels = {name: values.to(options.device) for name, values in part.at(rows).items()}
    return Split(part, rows.numpy(), sets, labels)


def encode_layers(encoder: Encode, sets: tuple[str, ...]) -> tuple[Callable, dict[str, tuple[int, int]]]:
    """A function of images, and which of its layers (b, N, D) are which set's: {name: (first, end)}.

    It is `encoder` where `sets` is "last" alone; else it gives a list, the last layer and the outputs of blocks.
    """
    if sets == ("last",):
        return encoder, {"last": (0, 1)}
    whole = network(encoder, next(name for name in sets if name != "last"))
    depth = len(whole.encoder.blocks)
    count = depth if "blocks" in sets else LAST
    known = {"last": {"last": (0, 1)}, "last4": {"last4": (1 + count - LAST, 1 + count)}}
    known["blocks"] = {f"block {number}": (number, number + 1) for number in range(1, count + 1)}

    def encode(images: torch.Tensor) -> list[torch.Tensor]:
        layers = whole.layers(images, count)
        return [whole.encoder.norm(layers[-1].flatten(0, 1)).view_as(layers[-1]), *layers]

    return encode, {name: ends for chosen in sets for name, ends in known[chosen].items()}


Runs = dict[str, list[dict[str, Any]]]  # {probe's name in the figures: what each seed measured and chose}


@dataclass
class Evaluation:
    """An encoder, the features it gives of training and test images, and the probes of them.

    encoder: in fp32, for fine-tuning. frozen: the same in the precision of the features.
    """

    encoder: Encode
    frozen: Encode
    train: Split
    test: Split
    options: Options

    def figures(self) -> list[Figure]:
        """The figures of every label and probe."""
        pairs = [(name, probe) for name in self.train.part.tasks for probe in self.options.probes]
        figures = []
        for name, probe in (bar := tqdm(pairs, "probes", unit="probe", disable=None, delay=2)):
            bar.set_postfix_str(f"{name}, {probe}")
            outputs, truth = Outputs(self.train.part.tasks[name], self.train.labels[name]), self.test.labels[name]
            for title, runs in PROBES[probe](self, name, outputs).items():
                figures += over_seeds(name, title, runs, outputs.chance(truth), len(truth))
        return figures

    def linear(self, name: str, outputs: Outputs) -> Runs:
        """A linear head on each set of features, and of several sets the one that was best on held-out images."""
        options = self.options
        runs: Runs = {}
        for seed in range(options.seeds):
            tried = []
            for features in self.train.features:
                head = fit_head(
                    self.train.features[features], outputs.targets, outputs.task, options.protocol, options.heads, seed
                )
                scores = head(self.test.features[features])
                tried.append(self._measure(name, outputs, scores) | head.chosen | {"features": features})
                runs.setdefault("linear" if features == "last" else f"linear, {features}", []).append(tried[-1])
            if len(tried) > 1:
                runs.setdefault("linear, best", []).append(max(tried, key=lambda run: run["held_out"]))
        return runs

    def knn(self, name: str, outputs: Outputs) -> Runs:
        """k nearest neighbours, for every k that there are training images for, on standardised features."""
        x, x_test = self._first()
        standardise, ks = Standardiser(x), [k for k in KS if k <= len(x)]
        scores = knn_scores(standardise(x), outputs.votes, standardise(x_test), ks) if ks else {}
        return {f"{k}-NN": [self._measure(name, outputs, scores[k])] for k in ks}

    def attentive(self, name: str, outputs: Outputs) -> Runs:
        """An attentive head on the patch features."""
        runs = []
        heads = network(self.encoder, "attentive").arch.heads
        dense, dense_test = self._dense
        outputs = Outputs(outputs.task, outputs.labels.cpu())
        for seed in range(self.options.seeds):
            head, chosen = fit_attentive(dense, self.train.rows, outputs, heads, seed=seed)
            scores, _ = attentive_scores(head, dense_test, self.test.rows)
            runs.append(self._measure(name, outputs, scores) | chosen)
        return {"attentive": runs}

    def lowshot(self, name: str, outputs: Outputs) -> Runs:
        """A linear head fitted to convergence on a share of the labels, which each seed draws anew."""
        runs, (x, x_test) = [], self._first()
        for seed, chosen in self._shares(outputs):
            rows = torch.from_numpy(chosen)
            head = fit_head(x[rows], outputs.targets[rows], outputs.task, "exact", self.options.heads, seed)
            runs.append(self._measure(name, outputs, head(x_test)) | head.chosen)
        return {f"low-shot {self.options.share:.3g} of labels, linear": runs} if runs else {}

    def finetune(self, name: str, outputs: Outputs) -> Runs:
        """The whole encoder trained on a share of the labels, the same as `lowshot` draws."""
        runs, targets, encoder = [], outputs.targets.cpu(), network(self.encoder, "finetune")
        for seed, chosen in self._shares(outputs):
            source, rows = self.train.part.source, self.train.rows[chosen]
            classifier = fine_tune(encoder, source, rows, targets[chosen], outputs.count, self.options.tuning, seed)
            with torch.no_grad():
                batches = self.options.batches(self.test.part, self.test.rows, 256)
                scores = torch.cat([classifier(images.to(self.options.device)) for images, _ in batches])
            runs.append(self._measure(name, outputs, scores))
        return {f"low-shot {self.options.share:.3g} of labels, fine-tuned": runs} if runs else {}

    def _measure(self, name: str, outputs: Outputs, scores: torch.Tensor) -> dict[str, Any]:
        found = outputs.decode(scores), self.test.labels[name].to(scores.device), outputs.task
        return measure(*found) | {"errors": standard_errors(*found)}

    def _first(self) -> tuple[torch.Tensor, torch.Tensor]:
        features = next(iter(self.train.features))
        return self.train.features[features], self.test.features[features]

    def _shares(self, outputs: Outputs) -> Iterable[tuple[int, np.ndarray]]:
        """Each seed and the training images it draws; none of a regression, which has no classes to share out."""
        if outputs.classes is None:
            return
        for seed in range(self.options.seeds):
            yield seed, draw_share(outputs.targets.cpu(), self.options.share, seed)

    @cached_property
    def _dense(self) -> list[DenseFeatures]:
        encode = network(self.frozen, "attentive").dense
        return [
            DenseFeatures(encode, partial(self.options.batches, split.part), split.rows, self.options.device)
            for split in (self.train, self.test)
        ]


PROBES = {
    "linear": Evaluation.linear,
    "knn": Evaluation.knn,
    "attentive": Evaluation.attentive,
    "lowshot": Evaluation.lowshot,
    "finetune": Evaluation.finetune,
}
