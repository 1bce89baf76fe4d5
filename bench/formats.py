"""Images a second of the training loader in each format, beside a plain DataLoader.

    python bench/formats.py [--json FILE]

Sets of `--count` images of `--size` pixels are written to a temporary folder: RGB of eight bits in JPEG and PNG, and
`--channels` channels of 16 bits in TIFF, NPY, HDF5 and Zarr; and one large tiled TIFF, read by windows. Each is read by
ijepa_fast's loader and by what one would write without it: a torch Dataset that reads the whole image with the format's
library, cuts the same window and resizes it, behind torch's DataLoader with as many workers. Both make random resized
crops of `--crop` pixels; they take turns, round by round.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from bench.data import RATIO, SCALE, measure
from bench.run import about
from ijepa_fast.data.crops import TRIES, counter_uniform, random_resized_crop
from ijepa_fast.data.dali import TrainLoader
from ijepa_fast.data.reading import Reading
from ijepa_fast.data.sources import open_source

Open = Callable[[], Callable[[int], np.ndarray]]  # in a worker: makes what reads image i, (H, W, C)


def each(paths: list[Path], read: Callable[[Path], np.ndarray]) -> Open:
    """Files that are read whole, one an image."""
    return lambda: lambda i: read(paths[i % len(paths)])


def in_hdf5(path: Path) -> Open:
    """Images of an HDF5 file, which each worker opens."""

    def make() -> Callable[[int], np.ndarray]:
        import h5py

        images = h5py.File(path, "r")["images"]
        return lambda i: np.asarray(images[i % images.shape[0]])

    return make


def in_zarr(path: Path) -> Open:
    """Images of a Zarr array."""

    def make() -> Callable[[int], np.ndarray]:
        import zarr

        images = zarr.open(path, mode="r")
        return lambda i: np.asarray(images[i % images.shape[0]])

    return make


def write(folder: Path, args: argparse.Namespace) -> dict[str, tuple[Path, Reading, Open]]:
    """Write the sets: {format: (source, how it is read here, how it is read plainly)}."""
    import h5py
    import tifffile
    import zarr

    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 4000, (args.count, args.size // 8, args.size // 8, args.channels))
    deep = coarse.repeat(8, 1).repeat(8, 2).astype(np.uint16)
    rgb = (deep[..., :3] >> 4).astype(np.uint8)
    eight, many = Reading(), Reading(channels=args.channels)
    sets: dict[str, tuple[Path, Reading, Open]] = {}

    def files(name: str, images: np.ndarray, save: Callable[[Path, np.ndarray], Any], read: Any, how: Reading) -> None:
        (folder / name).mkdir()
        paths = [folder / name / f"{number:05}.{name}" for number in range(len(images))]
        for path, image in zip(paths, images):
            save(path, image)
        sets[name] = folder / name, how, each(paths, read)

    pillow = lambda path: np.asarray(Image.open(path).convert("RGB"))  # noqa: E731
    for name in ("jpg", "png"):
        files(name, rgb, lambda path, image: Image.fromarray(image).save(path, quality=90), pillow, eight)
    options: dict[str, Any] = {"photometric": "minisblack", "planarconfig": "contig", "compression": "zlib"}
    files("tif", deep, lambda path, image: tifffile.imwrite(path, image, **options), tifffile.imread, many)
    files("npy", deep, np.save, np.load, many)
    with h5py.File(folder / "set.h5", "w") as file:
        file.create_dataset("images", data=deep, chunks=(1, *deep.shape[1:]))
    sets["h5"] = folder / "set.h5", many, in_hdf5(folder / "set.h5")
    zarr.create_array(folder / "set.zarr", data=deep, chunks=(1, *deep.shape[1:]))
    sets["zarr"] = folder / "set.zarr", many, in_zarr(folder / "set.zarr")
    large = rng.integers(0, 256, (args.large // 16, args.large // 16, 3), dtype=np.uint8).repeat(16, 0).repeat(16, 1)
    tifffile.imwrite(folder / "large.tif", large, tile=(256, 256), photometric="rgb", compression="zlib")
    how = Reading(window=args.size)
    sets["windows of a large tif"] = folder / "large.tif", how, each([folder / "large.tif"], tifffile.imread)
    return sets


def loader(path: Path, reading: Reading, args: argparse.Namespace) -> Iterator[int]:
    """Images of each batch of ijepa_fast's loader, which keeps nothing in memory."""
    options = {"scale": SCALE, "ratio": RATIO, "threads": args.threads, "cache_bytes": 0}
    source = open_source(path, reading=reading)
    batches = TrainLoader(source, batch_size=args.batch_size, crop=args.crop, **options)
    try:
        for batch in batches:
            yield len(batch.images)
    finally:
        batches.close()


class Plain(Dataset):
    """Read the whole image, cut the window, resize it."""

    def __init__(self, make: Open, crop: int):
        self.make, self.crop, self.read = make, crop, None

    def __len__(self) -> int:
        return 1 << 40  # endless: the worker draws the sample

    def __getitem__(self, position: int) -> torch.Tensor:
        self.read = self.read or self.make()
        image = self.read(position * 7919)
        uniform = counter_uniform(0, np.array([position]), 2 * TRIES + 2)
        ((x, y, w, h),) = random_resized_crop(np.array([image.shape[:2]]), uniform, SCALE, RATIO).tolist()
        window = torch.from_numpy(image[y : y + h, x : x + w].astype(np.float32)).permute(2, 0, 1)[None]
        return F.interpolate(window, size=(self.crop, self.crop), mode="bilinear", antialias=True)[0]


def plain(make: Open, args: argparse.Namespace) -> Iterator[int]:
    """Images of each batch of a DataLoader."""
    data = Plain(make, args.crop)
    for batch in DataLoader(data, args.batch_size, sampler=range(1 << 40), num_workers=args.threads):
        yield len(batch)


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=256)
    parser.add_argument("--size", type=int, default=256, help="pixels of a side, a multiple of 16")
    parser.add_argument("--channels", type=int, default=13)
    parser.add_argument("--large", type=int, default=8192, help="pixels of a side of the large TIFF")
    parser.add_argument("--crop", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seconds", type=float, default=3, help="of each contender in each round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", help="file for the figures")
    args = parser.parse_args(argv)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, (path, reading, make) in write(Path(folder), args).items():
            pair: dict[str, Any] = {
                "loader": lambda path=path, reading=reading: loader(path, reading, args),
                "plain": lambda make=make: plain(make, args),
            }
            rounds = measure(pair, args.seconds, args.rounds)
            rates = {contender: statistics.median(rate for rate, _ in rounds[contender]) for contender in pair}
            ratio = statistics.median(a[0] / b[0] for a, b in zip(rounds["loader"], rounds["plain"]))
            rows.append({"format": name, "images_per_second": rates, "loader_over_plain": ratio})
            print(f"{name:>24}  {rates['loader']:8.0f}  {rates['plain']:8.0f}  {ratio:6.2f}x", flush=True)
    if args.json:
        facts = about(torch.device("cpu"), "uint8 and uint16") | {"threads": args.threads, "crop": args.crop}
        Path(args.json).write_text(json.dumps(facts | {"formats": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
