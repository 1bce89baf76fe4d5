"""Images a second of the training loader in each format, beside a plain DataLoader.

    python bench/formats.py [--json bench/results/formats-cpu.json] [--against CHECKOUT]

Sets of `--count` images of `--size` pixels are written to a temporary folder: RGB of eight bits in JPEG and PNG, and
`--channels` channels of 16 bits in TIFF, NPY, HDF5 and Zarr; and one large tiled TIFF, read by windows. Each is read by
ijepa_fast's loader and by what one would write without it: a torch Dataset that reads the whole image with the format's
library, cuts the same window and resizes it, behind torch's DataLoader with as many workers. Of the large TIFF it reads
the tiles under a window, through tifffile's Zarr interface. Both make random resized crops of `--crop` pixels, in
turns, round by round. As it stands it is made to take less than five minutes on two cores.

--against names a checkout of an earlier revision, with its extension built, whose loader takes turns with this one's on
the JPEG and PNG files, each in a process of its own:

    git worktree add /tmp/earlier 390fa3b && (cd /tmp/earlier && python setup.py -q build_ext --inplace)
    python bench/formats.py --against /tmp/earlier
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
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
from bench.report import ROOT, formats_table
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


def in_windows(path: Path, side: int) -> Open:
    """Windows of a large tiled TIFF, at places drawn by their number."""

    def make() -> Callable[[int], np.ndarray]:
        import tifffile
        import zarr

        whole: Any = zarr.open(tifffile.imread(path, aszarr=True), mode="r")

        def read(i: int) -> np.ndarray:
            rng = np.random.default_rng(i)
            y, x = (int(rng.integers(length - side + 1)) for length in whole.shape[:2])
            return np.asarray(whole[y : y + side, x : x + side])

        return read

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
    sets["windows of a large tif"] = folder / "large.tif", how, in_windows(folder / "large.tif", args.size)
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


# What a checkout runs of itself: images/s and CPU milliseconds an image of its loader, as bench.data.measure has them.
RATE = """
import sys, time
from ijepa_fast.data.dali import TrainLoader
from ijepa_fast.data.sources import open_source
path, batch, crop, threads, seconds = sys.argv[1], *map(int, sys.argv[2:5]), float(sys.argv[5])
options = {"scale": (0.3, 1.0), "ratio": (3 / 4, 4 / 3), "threads": threads, "cache_bytes": 0}
loader = TrainLoader(open_source(path), batch_size=batch, crop=crop, **options)
for _ in range(8):
    next(loader)
images, begin, cpu = 0, time.perf_counter(), time.process_time()
while time.perf_counter() - begin < seconds:
    images += len(next(loader).images)
rate, cpu = images / (time.perf_counter() - begin), time.process_time() - cpu
loader.close()
print(rate, 1e3 * cpu / images)
"""


def rate_of(checkout: Path, path: Path, args: argparse.Namespace) -> tuple[float, float]:
    """Images/s, and CPU milliseconds an image, of the loader of a checkout on the images at `path`."""
    options = [str(value) for value in (path, args.batch_size, args.crop, args.threads, args.seconds)]
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    done = subprocess.run(
        [sys.executable, "-c", RATE, *options], cwd=checkout, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"{checkout}: {done.stderr.strip().splitlines()[-1]}")
    rate, cpu = map(float, done.stdout.split()[-2:])
    return rate, cpu


def against(before: Path, path: Path, args: argparse.Namespace) -> dict[str, Any]:
    """This checkout's loader and an earlier one's, by turns: medians, and medians of the ratios of each round."""
    pairs = [(rate_of(ROOT, path, args), rate_of(before, path, args)) for _ in range(args.rounds)]
    sides = dict(zip(("now", "then"), zip(*pairs)))
    rate, cpu = ({side: statistics.median(x[i] for x in taken) for side, taken in sides.items()} for i in (0, 1))
    return {
        "images_per_second": rate,
        "cpu_ms_per_image": cpu,
        "now_over_then": statistics.median(a[0] / b[0] for a, b in pairs),
        "now_over_then_by_cpu_time": statistics.median(b[1] / a[1] for a, b in pairs),
    }


def earlier(folder: str) -> tuple[Path, str]:
    """A checkout and its commit. Raises ValueError where it is none, or its extension is not built."""
    path = Path(folder).resolve()
    if not list((path / "ijepa_fast").glob("_C*.so")):
        raise ValueError(
            f"--against {folder}: expected a checkout with its extension built: python setup.py build_ext --inplace"
        )
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=path, capture_output=True, text=True)
    return path, done.stdout.strip() or "unknown"


def main(argv: list[str] | None = None) -> int:
    """The command line; its exit status, 1 where a format could not be measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=256)
    parser.add_argument("--size", type=int, default=256, help="pixels of a side, a multiple of 16")
    parser.add_argument("--channels", type=int, default=13)
    parser.add_argument("--large", type=int, default=8192, help="pixels of a side of the large TIFF")
    parser.add_argument("--crop", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seconds", type=float, default=2, help="of each contender in each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--against", metavar="CHECKOUT", help="an earlier revision, for the RGB files")
    parser.add_argument("--json", default=str(ROOT / "bench" / "results" / "formats-cpu.json"), help="for the figures")
    args = parser.parse_args(argv)
    rows: list[dict[str, Any]] = []
    result = about(torch.device("cpu"), "uint8 and uint16") | {"threads": args.threads, "crop": args.crop}
    result |= {"size": args.size, "channels": args.channels, "batch_size": args.batch_size, "formats": rows}
    before = None if args.against is None else earlier(args.against)
    with tempfile.TemporaryDirectory() as folder:
        for name, (path, reading, make) in write(Path(folder), args).items():
            pair: dict[str, Any] = {
                "loader": lambda path=path, reading=reading: loader(path, reading, args),
                "plain": lambda make=make: plain(make, args),
            }
            try:
                rounds = measure(pair, args.seconds, args.rounds)
            except Exception as error:  # one format that fails costs the others nothing
                rows.append({"format": name, "failed": f"{type(error).__name__}: {error}".splitlines()[0]})
                print(f"{name}: {rows[-1]['failed']}", file=sys.stderr, flush=True)
                continue
            rates = {contender: statistics.median(rate for rate, _ in rounds[contender]) for contender in pair}
            ratio = statistics.median(a[0] / b[0] for a, b in zip(rounds["loader"], rounds["plain"]))
            by_cpu = statistics.median(b[1] / a[1] for a, b in zip(rounds["loader"], rounds["plain"]))
            row = {"format": name, "images_per_second": rates, "loader_over_plain": ratio}
            rows.append(row | {"loader_over_plain_by_cpu_time": by_cpu})
            if before is not None and name in ("jpg", "png"):
                rows[-1]["against"] = against(before[0], path, args) | {"commit": before[1]}
            print(f"{name}: {rates['loader']:.0f} images/s, plain {rates['plain']:.0f}", file=sys.stderr, flush=True)
            Path(args.json).write_text(json.dumps(result, indent=1) + "\n")
    print("\n".join(formats_table(result)))
    return int(any("failed" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
