"""What an evaluation is asked for, and what can be wrong with that before an image is encoded."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Protocol

import numpy as np
import torch

from ijepa_fast.data import Size, size_of
from ijepa_fast.data.central import eval_batches
from ijepa_fast.data.reading import Reading
from ijepa_fast.eval.dense import Places, open_places
from ijepa_fast.eval.features import Encode, network
from ijepa_fast.eval.knn import KS
from ijepa_fast.eval.labels import Labelled, Samples, match
from ijepa_fast.eval.lowshot import PAPER_TUNING, FineTuning

LAST = 4  # layers that "last4" concatenates
FEATURES = ("last", "last4", "blocks")
OF_PLACES = {"segmentation": "--label-map", "depth": "--depth-map"}  # probes of every place, and what names their maps
OF_A_NETWORK = ("attentive", "finetune", *OF_PLACES)  # probes that want more than a function

OF_CLASSES = ("retrieval", "fewshot", "lowshot", "finetune")  # probes that give nothing of a regression


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
        probes: of evaluate.PROBES.
        features: of "last" (the last layer), "last4" (the last four, side by side) and "blocks" (the output of each
            block by itself). Probes other than "linear" read the first.
        heads, protocol: of linear heads, see sweep.fit_head.
        seeds: how often heads are trained, each time with other held-out images and other first weights.
        share: of the labels of each class, for "lowshot" and "finetune".
        tuning: of "finetune".
        ways, shots, episodes: classes of an episode, labelled images of each, and how many, for "fewshot".
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
    ways: int = 5
    shots: tuple[int, ...] = (1, 5)
    episodes: int = 600

    @property
    def cover(self) -> int | Size:
        """What an image just covers before the central crop."""
        return covering(self.crop, self.resize)

    def rows(self, part: Labelled) -> np.ndarray:
        """The samples of `part` that are read, int64."""
        return part.rows(self.images, self.draw_seed)

    def batches(self, part: Labelled, rows: np.ndarray, size: int) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
        """Batches of `size` of the samples `rows` that can be decoded: images uint8 (b, crop, crop, 3), rows (b,)."""
        return eval_batches(
            Samples(part.source, rows),
            batch_size=size,
            crop=self.crop,
            resize=self.cover,
            device=self.device,
            interpolation=self.interpolation,
        )


def matched(train: Labelled, test: Labelled, options: Options) -> tuple[Labelled, Labelled]:
    """Both, with the class ids of `train`, and the labels that can be measured.

    A label that is the same for all training or all test images is left out, which rank 0 says on stderr. Raises
    ValueError where none is left, where `test` lacks a label or has a class that `train` has not, where there are fewer
    than two test images, and where k-NN is wanted of fewer training images than neighbours.
    """
    test = match(train, test)
    if not train.tasks:
        return train, test
    rows = [options.rows(part) for part in (train, test)]
    if len(rows[1]) < 2:
        raise ValueError(f"{test.source.root}: expected at least two images to test on, got {len(rows[1])}")
    constant: dict[str, list[str]] = {}
    for part, drawn in zip((train, test), map(torch.from_numpy, rows)):
        root = str(part.source.root)
        constant[root] = [name for name in part.tasks if len(part.labels[name][drawn].unique()) < 2]
        if len(constant[root]) == len(train.tasks):
            names = ", ".join(constant[root])
            what = "test images" if part is test else "images"
            raise ValueError(f"{root}: all {what} have the same {names}; a probe needs two labels to tell apart")
    if not (kept := [name for name in train.tasks if not any(name in names for names in constant.values())]):
        told = "; ".join(f"{root}: all images have the same {', '.join(names)}" for root, names in constant.items())
        raise ValueError(f"{told}; a probe needs a label that differs in both")
    for root, same in constant.items():
        if same and os.environ.get("RANK", "0") == "0":
            _say(f"{root}: all images have the same {', '.join(same)}, which is left out")
    if "knn" in options.probes and len(rows[0]) < min(KS):
        raise ValueError(
            f"{train.source.root}: k-NN takes at least {min(KS)} training images, got {len(rows[0])}; name more "
            "images, or leave k-NN out (--probes linear)"
        )
    return _with(train, kept), _with(test, kept)


def _with(part: Labelled, names: list[str]) -> Labelled:
    """`part` with these labels alone."""
    tasks = {name: part.tasks[name] for name in names}
    return replace(part, labels={name: part.labels[name] for name in names}, tasks=tasks)


@cache
def _say(text: str) -> None:
    """Print a line on stderr, once: an evaluation is checked for every encoder, and before them."""
    print(text, file=sys.stderr)


def check(
    encoder: Encode, train: Labelled, test: Labelled, options: Options
) -> tuple[Labelled, Labelled, dict[str, Places]]:
    """Whether `evaluate` can go on, before it encodes an image: both parts as `matched` gives them, and the maps that
    dense probes read, which are opened.

    Raises ValueError as `check_images` does; for maps that are missing or do not fit their images; and where a probe
    wants more than a function, more training images, or other numbers.
    """
    train, test = check_images(getattr(encoder, "arch", None), train, test, options)
    for probe in options.probes:
        if probe in OF_A_NETWORK:
            network(encoder, probe)
    if "blocks" in options.features:
        network(encoder, "blocks")
    if "last4" in options.features and (depth := len(network(encoder, "last4").encoder.blocks)) < LAST:
        raise ValueError(f"--features last4: the encoder has {depth} layers; use --features last")
    if train.tasks and set(options.probes) <= set(OF_CLASSES) and set(train.tasks.values()) == {"regression"}:
        raise ValueError(
            f"--probes {','.join(options.probes)}: no figure, as {', '.join(OF_CLASSES)} take classes; "
            "name --probes linear"
        )
    if not 0 < options.share <= 1 and {"lowshot", "finetune"} & set(options.probes):
        raise ValueError(f"--share: expected 0 < share <= 1, got {options.share}")
    places = {}
    crop, cover = size_of(options.crop), size_of(options.cover)
    for probe in (name for name in options.probes if name in OF_PLACES):
        if not (probe in train.maps and probe in test.maps):
            raise ValueError(
                f"--probes {probe}: expected a map over each image; name a folder of them, {OF_PLACES[probe]}"
            )
        rows, grid = (options.rows(train), options.rows(test)), network(encoder, probe).arch.grid
        if len(rows[0]) < 2:
            raise ValueError(
                f"{train.source.root}: --probes {probe} takes at least two training images, one of which chooses among "
                f"heads, got {len(rows[0])}"
            )
        places[probe] = open_places(train.maps[probe], test.maps[probe], rows, crop, cover, grid)
    return train, test, places


class Takes(Protocol):
    """What images an encoder takes: its architecture, or the settings of a run's data."""

    @property
    def size(self) -> Size:
        """Height and width, pixels."""

    @property
    def mean(self) -> Sequence[float]:
        """A number per channel."""

    @property
    def reading(self) -> Reading:
        """Their depth."""


def check_images(takes: Takes | None, train: Labelled, test: Labelled, options: Options) -> tuple[Labelled, Labelled]:
    """Both parts as `matched` gives them. takes: what the encoder takes, None where that is not known.

    Raises ValueError as `matched` does, and for images of other channels or another depth than the encoder's, or a crop
    of another size.
    """
    train, test = matched(train, test, options)
    crop, cover = size_of(options.crop), size_of(options.cover)
    if not all(side <= most for side, most in zip(crop, cover)):
        raise ValueError(f"crop: expected at most resize = {options.resize}, got {options.crop}")
    if takes is not None:
        if takes.size != crop:
            raise ValueError(
                f"crop: expected {takes.size[0]} x {takes.size[1]} pixels, which the encoder takes, got {crop[0]} x "
                f"{crop[1]}; load it with image_size="
            )
        for part in (train, test):
            found, wanted = part.source.reading, (len(takes.mean), takes.reading.depth)
            if found.channels != wanted[0] or wanted[1] not in (found.depth, "auto"):
                raise ValueError(
                    f"{part.source.root}: expected images of {wanted[0]} channels of {wanted[1]}, which the encoder "
                    f"takes, found {found.channels} of {found.depth}"
                )
    return train, test
