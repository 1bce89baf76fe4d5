"""Labelled images: the labels that each layout has, and the task that each label is.

folders      DATA/<class>/...jpg: one column "class" (ImageNet, CIFAR-100, Places205); also tar shards, and text
             lists with one label per line (iNat18: the category of each path)
a table      DATA/labels.csv: one column per label (the embedded scenes: kind, count, distance, metres)
a map        any images, or windows of large ones, and a raster of classes over them (data/label_map.py)
Clevr        CLEVR/images/<split>: count and distance from CLEVR/scenes/CLEVR_<split>_scenes.json
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from ijepa_fast.data.label_map import LabelMap, with_label_map
from ijepa_fast.data.reading import Raster, Reading
from ijepa_fast.data.sources import AS_THEY_ARE, Source, open_source

TASKS = ("classification", "counting", "regression")

# Classes of Clevr's distance to the nearest object, as VTAB bins it: to 8, to 8.5, ... above 10.
CLEVR_DISTANCES = (8.0, 8.5, 9.0, 9.5, 10.0)


@dataclass(frozen=True)
class Labelled:
    """A collection and its labels.

    labels: {column: (n,)}: int64 ids into `classes[column]`, int64 counts, or float64 numbers. tasks: {column: task}.
    maps: {dense probe: its map over each image}.
    """

    source: Source
    labels: dict[str, torch.Tensor]
    tasks: dict[str, str]
    classes: dict[str, list[str]] = field(default_factory=dict)
    maps: dict[str, LabelMap] = field(default_factory=dict)

    def rows(self, most: int | None = None, seed: int = 0) -> np.ndarray:
        """Sample ids in order, int64: all, or `most` of them drawn by `seed` (samples lie in class order)."""
        return np.sort(np.random.default_rng(seed).permutation(len(self.source))[:most])

    def at(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """The labels {column: (n,)} of the samples `rows`, int64 (n,)."""
        return {name: values[rows] for name, values in self.labels.items()}

    def take(self, rows: np.ndarray) -> Labelled:
        """The samples `rows` alone, int64, without maps."""
        labels = self.at(torch.from_numpy(rows))
        return replace(self, source=Samples(self.source, rows), labels=labels, maps={})


class Samples(Source):
    """Some samples of a source as a source for the loaders of data; the label of each is its row in the source."""

    def __init__(self, source: Source, rows: np.ndarray):
        super().__init__(source.root, source.index, reading=source.reading)
        self.source = source
        self.rows = self.labels = np.asarray(rows, np.int64)

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        """What to call sample `index` in a message."""
        return self.source.name(int(self.rows[index]))

    def read(self, index: int) -> bytes:
        """The encoded bytes of sample `index`. Raises OSError."""
        return self.source.read(int(self.rows[index]))

    def raster(self, index: int, max_pixels: int | None = None) -> Raster:
        """Sample `index`, opened."""
        return self.source.raster(int(self.rows[index]), max_pixels)


def open_labelled(
    path: str | Path,
    cache: str | Path | None = None,
    tasks: dict[str, str] | None = None,
    reading: Reading = AS_THEY_ARE,
    label_map: str | None = None,
    maps: dict[str, str] | None = None,
) -> Labelled:
    """The images and labels at `path`, in a layout named above.

    Numbers that are no integers are regressed, a column named count is counted, all else is classified; `tasks`,
    {column: task}, says otherwise. `cache`, `reading`: see open_source. label_map: where labels are those of a map, see
    with_label_map. maps: {dense probe: file or folder} of those that are to be read at every place; of "depth" they are
    numbers. Raises ValueError where there are neither labels nor maps.
    """
    source = open_source(path, cache=cache, reading=reading)
    if label_map is not None:
        source = with_label_map(source, label_map)
    found = {probe: LabelMap(source, where, numbers=probe == "depth") for probe, where in (maps or {}).items()}
    if found and not source.columns and _clevr_scenes(path) is None:
        return Labelled(source, {}, {}, maps=found)
    return replace(labelled(source, path, tasks), maps=found)


def labelled(source: Source, path: str | Path, tasks: dict[str, str] | None = None) -> Labelled:
    """An opened source and its labels; path: of the source. See open_labelled."""
    columns, classes = dict(source.columns), dict(source.index.classes)
    if scenes := _clevr_scenes(path):
        columns, classes = _read_clevr(scenes, source)
    if not columns:
        raise ValueError(
            source.index.problem
            or f"{path}: found no labels; expected a folder per class, a labels.csv, or Clevr's images/<split>"
            + ("; of windows, name a map of classes by --label-map" if source.reading.window else "")
        )
    tasks = _tasks(columns, tasks or {}, path)
    labels = {}
    for name, task in tasks.items():
        values = torch.from_numpy(np.array(columns[name]))
        if task != "classification" and name in classes:
            values = _numbers(classes.pop(name), name, task, path)[values]
        labels[name] = values.double() if task == "regression" else values
    return Labelled(source, labels, tasks, classes)


def _tasks(columns: dict, wanted: dict[str, str], path: str | Path) -> dict[str, str]:
    for name, task in wanted.items():
        if name not in columns:
            raise ValueError(f"--task {name}={task}: {path} has no label {name!r}; it has {', '.join(columns)}")
        if task not in TASKS:
            raise ValueError(f"--task {name}={task}: expected one of {', '.join(TASKS)}")
    tasks = {}
    for name, values in columns.items():
        usual = "counting" if name == "count" else "classification"
        tasks[name] = wanted.get(name, "regression" if values.dtype.kind == "f" else usual)
        if tasks[name] != "regression" and values.dtype.kind == "f":
            raise ValueError(f"--task {name}={tasks[name]}: {path} has numbers that are no integers under {name!r}")
    return tasks


def _numbers(classes: list[str], name: str, task: str, path: str | Path) -> torch.Tensor:
    try:
        return torch.tensor([int(value) for value in classes])
    except ValueError:
        raise ValueError(f"{path}: label {name!r}: expected integers for {task}, got {classes[:3]}") from None


def match(train: Labelled, test: Labelled) -> Labelled:
    """`test` with the class ids of `train`. Raises ValueError where it lacks a label, or has a class not trained on."""
    labels = {}
    for name, task in train.tasks.items():
        if test.tasks.get(name) != task:
            raise ValueError(
                f"labels {name!r}: {train.source.root} has them for {task}, {test.source.root} has only "
                f"{', '.join(f'{n} ({t})' for n, t in test.tasks.items())}"
            )
        labels[name] = test.labels[name]
        if task == "classification":
            ours, theirs = train.classes[name], test.classes[name]
            if strange := sorted(set(theirs) - set(ours)):
                raise ValueError(
                    f"labels {name!r}: {test.source.root} has {len(theirs)} classes, of which {len(strange)} (first "
                    f"{strange[0]!r}) are not among the {len(ours)} of {train.source.root}"
                )
            place = {value: number for number, value in enumerate(ours)}
            labels[name] = torch.tensor([place[value] for value in theirs])[labels[name]]
    return replace(test, labels=labels, tasks=train.tasks, classes=train.classes)


def _clevr_scenes(path: str | Path) -> Path | None:
    folder = Path(path)
    scenes = folder.parent.parent / "scenes" / f"CLEVR_{folder.name}_scenes.json"
    return scenes if folder.parent.name == "images" and scenes.is_file() else None


def _read_clevr(scenes: Path, source: Source) -> tuple[dict, dict]:
    """Columns count, distance (classes) and depth (of the nearest object, in Clevr's units) of every image."""
    try:
        found = {scene["image_filename"]: scene["objects"] for scene in json.loads(scenes.read_text())["scenes"]}
        count = {name: len(objects) for name, objects in found.items()}
        depth = {name: min(item["pixel_coords"][2] for item in objects) for name, objects in found.items()}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{scenes}: expected Clevr's scenes, each with image_filename and objects with pixel_coords; {error!r}"
        ) from None
    names = [Path(source.name(i)).name for i in range(len(source))]
    if missing := [name for name in names if name not in found]:
        raise ValueError(f"{scenes}: {len(missing)} of {len(names)} images have no scene, the first {missing[0]!r}")
    depths = np.array([depth[name] for name in names])
    counts, ids = np.unique([count[name] for name in names], return_inverse=True)
    columns = {"count": ids, "distance": np.searchsorted(CLEVR_DISTANCES, depths), "depth": depths}
    edges = [f"to {CLEVR_DISTANCES[0]}", *(f"from {edge}" for edge in CLEVR_DISTANCES)]
    return columns, {"count": [str(value) for value in counts], "distance": edges}
