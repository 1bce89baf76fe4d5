"""Dense probes: heads on the features of single patches, measured at the pixels of maps over the test images.

A head is trained on patches of training images: of each the class that most of its pixels have, or the mean of their
numbers. Its scores of a test image's patches are resampled to the pixels of the crop, bilinearly, and compared with the
map there. Pixels without a label count nowhere.

Shapes: b images of a batch, N patches on a grid (rows, columns), H x W pixels, C outputs (classes, or 1 of numbers).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from ijepa_fast.data import Size
from ijepa_fast.data.label_map import LabelMap
from ijepa_fast.eval.attentive import DenseFeatures
from ijepa_fast.eval.features import Standardiser
from ijepa_fast.eval.knn import knn_scores
from ijepa_fast.eval.linear import LinearHead
from ijepa_fast.eval.outputs import of_terms

PATCHES = 40_000  # that heads are trained on, of all training images together
K = 20  # neighbours
_BATCH = 64  # test images scored at once
_ELEMENTS = 1 << 26  # of scores at pixels held at once
_NONE = -1  # the class of a pixel or a patch without one

Head = Callable[[torch.Tensor], torch.Tensor]  # features (b, N, D) -> scores (b, N, C)
Fit = Callable[..., LinearHead]  # sweep.fit_head, of a protocol


@dataclass
class Places:
    """What maps say of the training images' patches and of the test images' pixels.

    rows: samples of the training and of the test images, int64. grid: rows and columns of patches. crop, cover: see
    LabelMap.crop. classes: values of the maps, int64 (C,); none of numbers. targets: of the training images' patches,
    (n, N), in the order of their rows: int64 places in `classes`, _NONE without one; or fp32 numbers, 0 for none.
    """

    rows: tuple[np.ndarray, np.ndarray]
    test: LabelMap
    grid: Size
    crop: Size
    cover: Size
    classes: np.ndarray
    targets: torch.Tensor

    @property
    def task(self) -> str:
        """Of the heads."""
        return "regression" if self.test.numbers else "classification"

    @property
    def count(self) -> int:
        """Outputs of a head."""
        return 1 if self.test.numbers else len(self.classes)

    def known(self, targets: torch.Tensor) -> torch.Tensor:
        """Which targets, of patches or pixels, are there: bool of their shape."""
        return targets > 0 if self.test.numbers else targets >= 0

    def votes(self, targets: torch.Tensor) -> torch.Tensor:
        """Targets (n,) as what neighbours vote with, fp32 (n, C)."""
        return targets[:, None].float() if self.test.numbers else F.one_hot(targets, self.count).float()

    def pixels(self, rows: Iterable[int]) -> torch.Tensor:
        """The targets at the crop's pixels of the test samples `rows`, (b, H, W)."""
        values = np.stack([self.test.crop(row, self.crop, self.cover) for row in rows])
        return torch.from_numpy(values if self.test.numbers else _ids(values, self.classes))


def open_places(
    train: LabelMap, test: LabelMap, rows: tuple[np.ndarray, np.ndarray], crop: Size, cover: Size, grid: Size
) -> Places:
    """Read the maps of the training and of the test samples `rows`, and see that each is there and fits its image.

    crop, cover: of the evaluation, see LabelMap.crop. grid: of the encoder's patches. Raises ValueError, naming the
    map, where one is missing or has another shape, where training maps have fewer than two values, and where test maps
    have classes that they have not, or nothing.
    """
    of_patches = _mean_of_patches if train.numbers else _most_of_patches
    targets, values, seen = [], np.empty(0, np.int64), False
    for row in rows[0].tolist():
        pixels = train.crop(row, crop, cover)
        targets.append(of_patches(pixels, grid))
        if not train.numbers or len(values) < 2:
            values = np.union1d(values, pixels[pixels > 0])
    if len(values) < 2:
        found, kind = f"{values[0]:g} alone" if len(values) else "only 0", "numbers" if train.numbers else "classes"
        raise ValueError(
            f"{train.where}: expected two {kind} or more over {len(targets)} training images, found {found}"
        )
    for row in rows[1].tolist():
        pixels = test.crop(row, crop, cover)
        seen = seen or bool((pixels > 0).any())
        if not train.numbers and len(strange := np.setdiff1d(pixels[pixels > 0], values)):
            raise ValueError(
                f"{test.where}: class {strange[0]}, over {test.source.name(row)}, is not among the {len(values)} of "
                f"the training images' maps, {train.where}"
            )
    if not seen:
        raise ValueError(f"{test.where}: expected labels over {len(rows[1])} test images, found only 0, which is none")
    stacked = np.stack(targets)
    classes = np.empty(0, np.int64) if train.numbers else values
    of_all = torch.from_numpy(stacked if train.numbers else _ids(stacked, values))
    return Places(rows, test, grid, crop, cover, classes, of_all)


def _ids(values: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Values of a map -> their places in `classes`, int64, _NONE for 0."""
    ids: np.ndarray = np.where(values > 0, np.searchsorted(classes, values), _NONE)
    return ids


def _patches(values: np.ndarray, grid: Size) -> np.ndarray:
    """(H, W) -> (N, pixels of a patch)."""
    height, width = values.shape[0] // grid[0], values.shape[1] // grid[1]
    return values.reshape(grid[0], height, grid[1], width).swapaxes(1, 2).reshape(-1, height * width)


def _most_of_patches(values: np.ndarray, grid: Size) -> np.ndarray:
    """The commonest class of each patch, int64 (N,), 0 where no pixel has one."""
    found = []
    for patch in _patches(values, grid):
        counts = np.bincount(patch)
        counts[0] = 0
        found.append(counts.argmax())
    return np.array(found)


def _mean_of_patches(values: np.ndarray, grid: Size) -> np.ndarray:
    """The mean number of each patch, fp32 (N,), 0 where no pixel has one."""
    patches = _patches(values, grid)
    means: np.ndarray = (patches.sum(1) / np.maximum((patches > 0).sum(1), 1)).astype(np.float32)
    return means


@dataclass
class Drawn:
    """Patches that heads are trained on: features fp32 (n, D), targets (n,), and of each its cell of the grid and its
    image, int64 (n,).
    """

    features: torch.Tensor
    targets: torch.Tensor
    cells: torch.Tensor
    images: torch.Tensor


def draw_patches(
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]], places: Places, seed: int = 0, most: int = PATCHES
) -> Drawn:
    """As many patches with a label of every training image, by `seed`: `most` in all, or one of each where it has more.

    batches: (features of patches (b, N, D), rows (b,)).
    """
    each = max(1, most // len(places.targets))
    place = {row: number for number, row in enumerate(places.rows[0].tolist())}
    parts: list[tuple[torch.Tensor, ...]] = []
    for features, rows in batches:
        for image, row in zip(features, rows.tolist()):
            targets = places.targets[place[row]]
            known = places.known(targets).nonzero()[:, 0].numpy()
            cells = torch.from_numpy(np.random.default_rng([seed, row]).permutation(known)[:each])
            parts.append((image[cells.to(image.device)], targets[cells], cells, torch.full_like(cells, row)))
    drawn, *others = (torch.cat(part) for part in zip(*parts))
    return Drawn(drawn, *(part.to(drawn.device) for part in others))


def by_place(drawn: Drawn, places: Places) -> torch.Tensor:
    """What the place in the image alone says: fp32 (N, C), the share of each class or the mean number at each patch.

    A patch of which none was drawn has those of all.
    """
    votes = places.votes(drawn.targets)
    sums = votes.new_zeros(places.targets.shape[1], places.count).index_add_(0, drawn.cells, votes)
    counts = drawn.cells.bincount(minlength=len(sums))[:, None]
    return torch.where(counts > 0, sums / counts.clamp_min(1), votes.mean(0))


def probe_places(
    train: DenseFeatures, test: DenseFeatures, places: Places, fit: Fit, seeds: int = 1, seed: int = 0
) -> dict[str, list[dict[str, Any]]]:
    """A linear head, fitted `seeds` times, and k-NN on single patches: what each measures, by the name of the probe.

    train, test: features of the patches of the images of `places.rows`. fit: of a head, as sweep.fit_head. seed: of the
    patches that are drawn. The chance beside them is what the place in the image alone says.
    """
    drawn = draw_patches(train.read(places.rows[0], _BATCH), places, seed)
    given = drawn.features, drawn.targets, places.task
    fitted = [fit(*given, seed=number, groups=drawn.images) for number in range(seeds)]
    standardise, table = Standardiser(drawn.features), by_place(drawn, places)
    x, votes, k = standardise(drawn.features), places.votes(drawn.targets), min(K, len(drawn.features))

    def neighbours(features: torch.Tensor) -> torch.Tensor:
        scores = knn_scores(x, votes, standardise(features.flatten(0, 1)), (k,))[k]
        return scores.unflatten(0, features.shape[:2])

    heads: dict[str, list[Head]] = {"linear": [_padded(head, places.count) for head in fitted]}
    heads[f"{k}-NN"], heads["place"] = [neighbours], [lambda features: table.expand(len(features), -1, -1)]
    tallies = {title: [Tally(places) for _ in of_seeds] for title, of_seeds in heads.items()}
    total = -(-len(places.rows[1]) // _BATCH)
    for features, rows in tqdm(test.read(places.rows[1], _BATCH), "dense probes", total, disable=None, delay=2):
        truth = places.pixels(rows.tolist()).to(features.device)
        for title, of_seeds in heads.items():
            for head, tally in zip(of_seeds, tallies[title]):
                tally.add(head(features), truth)
    measured = {title: [tally.measured() for tally in of_seeds] for title, of_seeds in tallies.items()}
    (chance,) = measured.pop("place")
    for title, runs in measured.items():
        chosen = [head.chosen for head in fitted] if title == "linear" else [{}]
        measured[title] = [run | more | {"chance": chance} for run, more in zip(runs, chosen)]
    return measured


def _padded(head: LinearHead, count: int) -> Head:
    """A head of patches, which may lack the last classes, as the commonest class of no patch."""

    def scores(features: torch.Tensor) -> torch.Tensor:
        found = head(features.flatten(0, 1)).unflatten(0, features.shape[:2])
        return F.pad(found, (0, count - found.shape[-1]), value=-1e9)

    return scores


class Tally:
    """Sums over the pixels of each test image, from which the metrics and their standard errors are made."""

    def __init__(self, places: Places):
        self.places = places
        self.sums: list[torch.Tensor] = []

    def add(self, scores: torch.Tensor, truth: torch.Tensor) -> None:
        """Count some images: scores (b, N, C) of their patches, truth (b, H, W) at their pixels, on one device."""
        size = tuple(truth.shape[1:])
        grids = scores.transpose(1, 2).unflatten(2, self.places.grid)
        chunk = max(1, _ELEMENTS // (self.places.count * size[0] * size[1]))
        for some, labels in zip(grids.split(chunk), truth.split(chunk)):
            at_pixels = F.interpolate(some, size=size, mode="bilinear", align_corners=False)
            count = self._numbers if self.places.test.numbers else self._classes
            self.sums.append(count(at_pixels, labels, self.places.known(labels)).double().cpu())

    def _classes(self, scores: torch.Tensor, labels: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
        """(b, 3, C): how many pixels of each class are answered right, are answered so, and are so."""
        sums = []
        for answer, label, is_known in zip(scores.argmax(1), labels, known):
            a, y = answer[is_known], label[is_known]
            sums.append(torch.stack([part.bincount(minlength=self.places.count) for part in (y[a == y], a, y)]))
        return torch.stack(sums)

    def _numbers(self, scores: torch.Tensor, labels: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
        """(b, 5): pixels, and their sums of absolute errors, of squared errors, of labels and of their squares."""
        y, error = labels.double() * known, (scores[:, 0].double() - labels) * known
        return torch.stack([part.sum((1, 2)) for part in (known, error.abs(), error.square(), y, y.square())], dim=1)

    def measured(self) -> dict[str, Any]:
        """The metrics over all pixels of all images, as outputs.of_terms, and "n", how many images."""
        sums = torch.cat(self.sums)
        terms = _terms_of_numbers(sums) if self.places.test.numbers else _terms_of_classes(sums)
        return of_terms(terms) | {"n": len(sums)}


def ratio_terms(parts: torch.Tensor, wholes: torch.Tensor) -> torch.Tensor:
    """Terms (n, ...) of the ratio of two sums over images, parts (n, ...) over wholes (n, ...).

    Their mean is the ratio; to first order it moves with the images as their mean does.
    """
    mean = wholes.mean(0).clamp_min(1e-12)
    ratio = parts.mean(0) / mean
    return ratio + (parts - ratio * wholes) / mean


def _terms_of_classes(sums: torch.Tensor) -> dict[str, np.ndarray]:
    """sums (n, 3, C) -> terms of intersection over union, the mean over the classes that test maps have, and of the
    share of pixels that are right.
    """
    right, answered, true = sums.unbind(1)
    seen = true.sum(0) > 0
    iou = ratio_terms(right[:, seen], (answered + true - right)[:, seen]).mean(1)
    return {"mean_iou": iou.numpy(), "accuracy": ratio_terms(right.sum(1), true.sum(1)).numpy()}


def _terms_of_numbers(sums: torch.Tensor) -> dict[str, np.ndarray]:
    """sums (n, 5) -> terms of R^2 and of the mean absolute error."""
    pixels, absolute, squared, y, y2 = sums.unbind(1)
    mean = y.sum() / pixels.sum()
    spread = y2 - 2 * mean * y + mean**2 * pixels  # of each image's labels about the mean of all
    r2, error = 1 - ratio_terms(squared, spread), ratio_terms(absolute, pixels)
    return {"r2": r2.numpy(), "mean_absolute_error": error.numpy()}
