"""The evaluation of an encoder on labelled images: every probe on every label, as a list of figures."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from ijepa_fast.eval.attentive import DenseFeatures, attentive_scores, fit_attentive
from ijepa_fast.eval.corruption import LEVELS, calibration_terms, corrupt, kinds_for
from ijepa_fast.eval.dense import Places, probe_places
from ijepa_fast.eval.episodes import classes_with, episode_accuracies
from ijepa_fast.eval.features import Encode, Standardiser, network, pool, pooled_features
from ijepa_fast.eval.figures import NORMAL, Figure, over_seeds
from ijepa_fast.eval.knn import KS, knn_scores
from ijepa_fast.eval.labels import Labelled
from ijepa_fast.eval.linear import LinearHead
from ijepa_fast.eval.lowshot import draw_share, fine_tune
from ijepa_fast.eval.options import LAST, OF_PLACES, Options, check
from ijepa_fast.eval.outputs import Outputs, measure, of_terms, standard_errors, terms
from ijepa_fast.eval.retrieval import average_precisions, expected_at_random
from ijepa_fast.eval.sweep import fit_head


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
    "last4", "blocks", some probes and another dtype a features.Network, in fp32. A test image whose label no training
    image has counts as wrong. Raises ValueError for what options.check finds.
    """
    train, test, places = check(encoder, train, test, options)
    frozen: Any = encoder if options.dtype is None else copy.deepcopy(encoder)
    if options.dtype is not None:
        frozen.to(options.dtype)
    return Evaluation(encoder, frozen, train, test, options, places).figures()


def read_split(encoder: Encode, part: Labelled, options: Options) -> Split:
    """Encode `part`, or `options.images` of it."""
    wanted = options.rows(part)
    batches = options.batches(part, wanted, options.batch_size)
    bar = _bar(batches, f"encoding {part.source.root}", len(wanted), options)
    encode, slices = encode_layers(encoder, options.features)
    features, rows = pooled_features(encode, bar, options.device)
    sets = {name: values.to(options.device) for name, values in parts_of(features, slices).items()}
    labels = {name: values.to(options.device) for name, values in part.at(rows).items()}
    return Split(part, rows.numpy(), sets, labels)


def parts_of(features: torch.Tensor, slices: dict[str, tuple[int, int]]) -> dict[str, torch.Tensor]:
    """Pooled features of layers side by side (n, layers * D) -> those of each set."""
    parts = features.chunk(max(stop for _, stop in slices.values()), dim=1)
    return {name: torch.cat(parts[slice(*ends)], dim=1) for name, ends in slices.items()}


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


def _bar(batches: Iterable, what: str, images: int, options: Options) -> tqdm:
    total = -(-images // options.batch_size)
    return tqdm(batches, what, total, unit="batch", mininterval=1, disable=None, delay=2)


Runs = dict[str, list[dict[str, Any]]]  # {probe's name in the figures: what each seed measured and chose}


@dataclass
class Evaluation:
    """An encoder, the images that it is evaluated on, and the probes of the features that it gives of them.

    encoder: in fp32, for fine-tuning. frozen: the same in the precision of the features. parts: training and test
    images, whose classes match. places: by the name of each dense probe.
    """

    encoder: Encode
    frozen: Encode
    train_part: Labelled
    test_part: Labelled
    options: Options
    places: dict[str, Places] = field(default_factory=dict)

    def figures(self) -> list[Figure]:
        """The figures of every label and probe."""
        probes = self.options.probes
        pairs = [(name, probe) for name in self.train_part.tasks for probe in probes if probe in OF_IMAGES]
        pairs += [(probe, probe) for probe in probes if probe in OF_PLACES]
        figures = []
        for name, probe in (bar := tqdm(pairs, "probes", unit="probe", disable=None, delay=2)):
            bar.set_postfix_str(f"{name}, {probe}")
            if probe in OF_PLACES:
                for title, runs in self.at_places(probe).items():
                    figures += over_seeds(name, title, runs)
                continue
            outputs, truth = Outputs(self.train.part.tasks[name], self.train.labels[name]), self.test.labels[name]
            for title, runs in OF_IMAGES[probe](self, name, outputs).items():
                figures += over_seeds(name, title, runs, outputs.chance(truth), len(truth))
        return figures

    def linear(self, name: str, outputs: Outputs) -> Runs:
        """A linear head on each set of features, and of several sets the one that was best on held-out images."""
        runs: Runs = {}
        for seed in range(self.options.seeds):
            tried = []
            for features in self.train.features:
                tried.append(self._linear(name, outputs, features, seed) | {"features": features})
                runs.setdefault("linear" if features == "last" else f"linear, {features}", []).append(tried[-1])
            if len(tried) > 1:
                runs.setdefault("linear, best", []).append(max(tried, key=lambda run: run["held_out"]))
        return runs

    def knn(self, name: str, outputs: Outputs) -> Runs:
        """k nearest neighbours, for every k that there are training images for, on standardised features."""
        x, x_test = self._standardised
        ks = [k for k in KS if k <= len(x)]
        scores = knn_scores(x, outputs.votes, x_test, ks) if ks else {}
        return {f"{k}-NN": [self._measure(name, outputs, scores[k])] for k in ks}

    def retrieval(self, name: str, outputs: Outputs) -> Runs:
        """Training images ranked by similarity to each test image, on standardised features; none of a regression."""
        if outputs.classes is None:
            return {}
        (x, x_test), truth = self._standardised, self.test.labels[name]
        found = average_precisions(x, outputs.labels, x_test, truth).cpu().numpy()
        found = found[np.isfinite(found)]  # of a count that no training image has there is nothing to find
        if not len(found):
            return {}
        chance = {"mean_average_precision": expected_at_random(outputs.labels, truth)}
        return {"retrieval": [of_terms({"mean_average_precision": found}) | {"chance": chance, "n": len(found)}]}

    def fewshot(self, name: str, outputs: Outputs) -> Runs:
        """Episodes of a few classes and labels, with an interval over episodes; none of a regression.

        Of every number of labels that two classes have.
        """
        if outputs.classes is None:
            return {}
        runs, options, (x, x_test) = {}, self.options, self._first
        given = x, outputs.labels, x_test, self.test.labels[name]
        for shots in (number for number in options.shots if len(classes_with(given[1], given[3], number)) > 1):
            ways, found = episode_accuracies(*given, options.ways, shots, options.episodes, seed=options.draw_seed)
            run = of_terms({"accuracy": found}) | {"chance": {"accuracy": 1 / ways}}
            half = {"accuracy": NORMAL * run["errors"]["accuracy"]}
            runs[f"{ways}-way {shots}-shot"] = [run | {"interval": half}]
        return runs

    def corruption(self, name: str, outputs: Outputs) -> Runs:
        """The linear head on test images made worse, with its calibration error where it tells classes."""
        runs: Runs = {}
        for seed in range(self.options.seeds):
            head = self._head(name, outputs, next(iter(self.train.features)), seed)
            clean = self._confident(name, outputs, head(self._first[1]))
            runs.setdefault("linear, clean", []).append(clean)
            levels: dict[str, list[dict[str, Any]]] = {}
            for (kind, level), features in self._corrupted.items():
                found = self._confident(name, outputs, head(features))
                runs.setdefault(f"linear, {kind} {level}", []).append(found)
                levels.setdefault(kind, []).append(found["terms"])
            for kind, of_levels in levels.items():
                mean = {metric: np.mean([found[metric] for found in of_levels], axis=0) for metric in of_levels[0]}
                runs.setdefault(f"linear, {kind}", []).append(of_terms(mean) | {"chance": clean["chance"]})
        return runs

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
        runs, (x, x_test) = [], self._first
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

    def at_places(self, probe: str) -> Runs:
        """Linear heads and k-NN on single patches, measured at the pixels of the test images' maps."""
        options = self.options
        fit = partial(fit_head, protocol=options.protocol, heads=options.heads)
        train, test = self._dense
        return probe_places(train, test, self.places[probe], fit, options.seeds, options.draw_seed)

    def _linear(self, name: str, outputs: Outputs, features: str, seed: int) -> dict[str, Any]:
        head = self._head(name, outputs, features, seed)
        return self._measure(name, outputs, head(self.test.features[features])) | head.chosen

    def _head(self, name: str, outputs: Outputs, features: str, seed: int) -> LinearHead:
        """The linear head of a label, a set of features and a seed; fitted once for all probes that read it."""
        if (key := (name, features, seed)) not in self._heads:
            given = self.train.features[features], outputs.targets, outputs.task
            self._heads[key] = fit_head(*given, self.options.protocol, self.options.heads, seed)
        return self._heads[key]

    def _measure(self, name: str, outputs: Outputs, scores: torch.Tensor) -> dict[str, Any]:
        found = outputs.decode(scores), self.test.labels[name].to(scores.device), outputs.task
        return measure(*found) | {"errors": standard_errors(*found), "terms": terms(*found)}

    def _confident(self, name: str, outputs: Outputs, scores: torch.Tensor) -> dict[str, Any]:
        """What `_measure` finds, and of classes the calibration error."""
        truth = self.test.labels[name]
        found, chance = self._measure(name, outputs, scores), outputs.chance(truth)
        if outputs.classes is not None:
            right = outputs.decode(scores) == truth
            error = of_terms({"calibration_error": calibration_terms(scores, right)})
            found = {key: value | error[key] if key in ("terms", "errors") else value for key, value in found.items()}
            found["calibration_error"] = error["calibration_error"]
            # The commonest class, as sure as it is common.
            chance["calibration_error"] = abs(float(outputs.votes.mean(0).max()) - chance["accuracy"])
        return found | {"chance": chance}

    def _shares(self, outputs: Outputs) -> Iterable[tuple[int, np.ndarray]]:
        """Each seed and the training images it draws; none of a regression, which has no classes to share out."""
        if outputs.classes is None:
            return
        for seed in range(self.options.seeds):
            yield seed, draw_share(outputs.targets.cpu(), self.options.share, seed)

    @cached_property
    def train(self) -> Split:
        """The training images' pooled features."""
        return read_split(self.frozen, self.train_part, self.options)

    @cached_property
    def test(self) -> Split:
        """The test images'."""
        return read_split(self.frozen, self.test_part, self.options)

    @property
    def _first(self) -> tuple[torch.Tensor, torch.Tensor]:
        features = next(iter(self.train.features))
        return self.train.features[features], self.test.features[features]

    @property
    def _standardised(self) -> tuple[torch.Tensor, torch.Tensor]:
        x, x_test = self._first
        standardise = Standardiser(x)
        return standardise(x), standardise(x_test)

    @cached_property
    def _heads(self) -> dict[tuple[str, str, int], LinearHead]:
        return {}

    @cached_property
    def _dense(self) -> list[DenseFeatures]:
        """Features of the patches, also of an encoder that is read by its class token."""
        encode, options = network(self.frozen, "attentive").dense, self.options
        return [
            DenseFeatures(encode, partial(options.batches, part), options.rows(part), options.device)
            for part in (self.train_part, self.test_part)
        ]

    @cached_property
    def _corrupted(self) -> dict[tuple[str, int], torch.Tensor]:
        """Features (n, D) of the test images by kind and level of what was done to them."""
        options, reading = self.options, self.test_part.source.reading
        encode, slices = encode_layers(self.frozen, options.features)
        first = next(iter(self.train.features))
        found: dict[tuple[str, int], list[torch.Tensor]] = {}
        batches = options.batches(self.test_part, self.test.rows, options.batch_size)
        for images, rows in _bar(batches, "encoding corrupted images", len(self.test.rows), options):
            for kind in kinds_for(reading.depth, reading.channels):
                for level in range(1, 1 + len(LEVELS[kind])):
                    worse = corrupt(images.to(options.device), kind, level, rows.tolist())
                    with torch.no_grad():
                        features = parts_of(pool(encode(worse)), slices)[first]
                    found.setdefault((kind, level), []).append(features)
        return {key: torch.cat(parts) for key, parts in found.items()}


OF_IMAGES = {
    "linear": Evaluation.linear,
    "knn": Evaluation.knn,
    "retrieval": Evaluation.retrieval,
    "fewshot": Evaluation.fewshot,
    "corruption": Evaluation.corruption,
    "attentive": Evaluation.attentive,
    "lowshot": Evaluation.lowshot,
    "finetune": Evaluation.finetune,
}
PROBES = (*OF_IMAGES, *OF_PLACES)
