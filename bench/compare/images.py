"""The images of a comparison: a folder's or the embedded scenes', a share of them, or with a nuisance on top.

The nuisance is a random texture that is added to the pixels: Gaussian noise in 16 cells along a side, smoothed, with a
standard deviation of sigma grey levels of 255. Its cells are as coarse as what images are made of, so that no average
over a patch takes it away, and nothing beyond the next cell tells it. An image has the same texture in every epoch and,
but for its strength, for every sigma; its label says nothing of it. Training and test images have it alike: the
theory is of one distribution, of which a part cannot be predicted, and of what an encoder keeps of the rest. Clean test
images would ask another thing, whether features carry over to other images.
"""

from __future__ import annotations

import io
import os
import re
import tarfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from bench.compare.runs import BASE, Run
from ijepa_fast.config import load_config
from ijepa_fast.data.sources import Source, open_source
from ijepa_fast.eval.labels import open_labelled
from ijepa_fast.eval.lowshot import draw_share
from ijepa_fast.eval.options import Options, matched
from ijepa_fast.files import publish
from ijepa_fast.run.sources import probe_folders

SCENES = "scenes"  # the value of --data
CELLS = 16  # of the nuisance, along the shorter side
NEIGHBOURS = 20  # that vote


@dataclass(frozen=True)
class Images:
    """Labelled images to train and probe on, and to test on.

    out: where indices of them are kept, and what is made of them. overrides: of the configuration, for these images.
    configs: which configs other ones stand in for.
    """

    train: Path
    test: Path
    out: Path
    overrides: tuple[str, ...] = ()
    configs: dict[str, str] = field(default_factory=dict)

    def config(self, run: Run) -> str:
        """The name of the run's config."""
        return self.configs.get(run.config, run.config)

    def of(self, run: Run) -> tuple[Path, Path, Path]:
        """What the run trains on, and its probes' training and test images; what is not there yet is made."""
        kind, number = _kind(run)
        if kind == "noise":
            train, test = (self._noisy(part, number) for part in ("train", "test"))
            return train, train, test
        return self._share(number) if kind == "share" else self.train, self.train, self.test

    def count(self, run: Run) -> int:
        """How many images the run trains on, found without making any. Raises ValueError where they cannot be made."""
        kind, number = _kind(run)
        if kind == "noise":
            self._classes(self.train)
        return len(self._chosen(number)) if kind == "share" else len(self._open(self.train))

    def check(self, probed: int) -> None:
        """Raise ValueError where these images cannot be trained on and probed, `probed` of each part at most."""
        train, test = (open_labelled(part, cache=self.out / "index") for part in (self.train, self.test))
        matched(train, test, Options(crop=1, images=probed))
        if (most := min(probed, len(train.source))) < NEIGHBOURS:
            raise ValueError(
                f"--data, --images: expected at least {NEIGHBOURS} training images to probe with, the neighbours that "
                f"vote, got {most}"
            )

    def _open(self, path: Path) -> Source:
        return open_source(path, cache=self.out / "index")

    def _chosen(self, number: int) -> np.ndarray:
        """The samples of one image in `number` of each class, one at least."""
        source = self._open(self.train)
        if source.index.shards or source.labels is None:
            raise ValueError(f"@share{number}: expected loose images with classes, got {self.train}; unpack it")
        return draw_share(torch.from_numpy(np.array(source.labels)), 1 / number, 0)

    def _share(self, number: int) -> Path:
        path, source = self.out / f"share{number}.txt", self._open(self.train)
        names = [os.path.abspath(os.path.join(source.root, source.index.names[i])) for i in self._chosen(number)]
        with publish(path) as draft, open(draft, "w", errors="surrogateescape") as file:
            file.writelines(f"{name}\n" for name in names)
        return path

    def _classes(self, path: Path) -> Source:
        source = self._open(path)
        if set(source.columns) != {"class"} or source.reading.depth != "uint8":
            raise ValueError(f"@noise: expected images of 8 bits in a folder per class, got {path}")
        return source

    def _noisy(self, part: str, sigma: int) -> Path:
        """The images of a part with the nuisance, as PNG in one archive."""
        path = self.out / f"noise{sigma}" / f"{part}.tar"
        if path.is_file():
            return path
        source = self._classes(self.train if part == "train" else self.test)
        assert source.labels is not None
        with publish(path) as draft, tarfile.open(draft, "w") as archive:
            for i in tqdm(range(len(source)), f"{part} images with a nuisance of {sigma}", disable=None, delay=2):
                try:
                    pixels = np.asarray(Image.open(io.BytesIO(source.read(i))).convert("RGB"), np.float32)
                except OSError as error:
                    raise ValueError(f"{source.name(i)}: {error}") from None
                generator = np.random.default_rng([part == "train", i])
                pixels = pixels + sigma * texture(pixels.shape, generator)
                file = io.BytesIO()
                Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8)).save(file, "PNG", compress_level=1)
                member = tarfile.TarInfo(f"{source.classes[source.labels[i]]}/{i:07d}.png")
                member.size = file.tell()
                file.seek(0)
                archive.addfile(member, file)
        return path


def texture(shape: tuple[int, ...], generator: np.random.Generator) -> np.ndarray:
    """The nuisance of one image, float32 of `shape` (H, W, C), with a standard deviation of 1."""
    height, width, channels = shape
    cell = max(1, min(height, width) // CELLS)
    rows, columns = (-(-side // cell) + 1 for side in (height, width))
    coarse = torch.from_numpy(generator.standard_normal((1, channels, rows, columns), np.float32))
    fine = F.interpolate(coarse, scale_factor=cell, mode="bilinear")[0, :, :height, :width]
    return (fine / fine.std()).permute(1, 2, 0).numpy()


def open_images(data: str, out: Path) -> Images:
    """The images of --data: a folder with train/ and test/, or the embedded scenes, at their config's crop and patch.

    On the scenes I-JEPA has the quickstart's config.
    """
    if data != SCENES:
        folder = Path(data).resolve()
        return Images(folder / "train", folder / "test", out)
    config = load_config("quickstart")
    folders = probe_folders(config)
    assert folders is not None
    overrides = (f"data.crop={config.data.crop}", f"model.patch={config.model.patch}")
    return Images(Path(folders[0]), Path(folders[1]), out, overrides, {BASE: "quickstart"})


def _kind(run: Run) -> tuple[str, int]:
    found = re.fullmatch(r"([a-z]+)(\d+)", run.images)
    return (found[1], int(found[2])) if found else ("", 0)
