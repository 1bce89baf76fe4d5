"""`python -m ijepa_fast stats SOURCE`: what the images of a source are, and the configuration's lines for them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from tqdm import tqdm

from ijepa_fast.command import one_sentence, whole
from ijepa_fast.data import DEPTHS, STRETCHES
from ijepa_fast.data.arguments import add_arguments, reading_of
from ijepa_fast.data.check import Seen, describe
from ijepa_fast.data.headers import BadImage
from ijepa_fast.data.pixels import Pixels
from ijepa_fast.data.reading import Reading
from ijepa_fast.data.sources import Source, open_source

_PIXELS = 20_000  # of an image that percentiles are taken of
PERCENTILES = (0, 1, 50, 99, 100)
# The ends of a stretch, as percentiles of each channel: asinh is linear up to the median and nearly a logarithm above.
ENDS = {"percentile": (1, 99), "asinh": (1, 50)}


@dataclass
class Stats:
    """Of the pixels of some images, in units of the depth's range, of stretched values where there is a stretch.

    percentiles: (PERCENTILES, channels). low, high: of the stretch, () where there is none.
    """

    reading: Reading
    images: int
    mean: np.ndarray
    std: np.ndarray
    percentiles: np.ndarray
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    seen: str = ""

    def lines(self, stretch: str = "none") -> str:
        """The YAML of the configuration's section `data`."""
        reading = self.reading
        keys = {"channels": reading.channels, "depth": reading.depth, "bands": reading.bands, "axes": reading.axes}
        keys |= {"array": reading.key, "page": reading.page, "nodata": reading.nodata, "window": reading.window}
        out = [f"  {name}: {_yaml(value)}" for name, value in keys.items() if value is not None]
        if stretch != "none":
            out += [f"  stretch: {stretch}", f"  low: {_numbers(self.low)}", f"  high: {_numbers(self.high)}"]
        return "\n".join(["data:", *out, f"  mean: {_numbers(self.mean)}", f"  std: {_numbers(self.std)}"])


def measure(source: Source, images: int = 1000, stretch: str = "none", seed: int = 0) -> Stats:
    """Statistics of `images` images of `source`, drawn by `seed`. Images that cannot be used are left out.

    Raises ValueError where none can, or where a channel is the same everywhere.
    """
    reading, unit = source.reading, DEPTHS[source.reading.depth]
    problem = ""
    rows = np.sort(np.random.default_rng(seed).permutation(len(source))[:images])
    generator, seen, drawn = np.random.default_rng(seed), Seen(), []
    for row in tqdm(rows.tolist(), desc="measuring", unit=" images", mininterval=1, disable=None, delay=2):
        try:
            raster = source.raster(row)
            pixels = raster.read(0, 0, raster.height, raster.width).reshape(-1, reading.channels)
        except (BadImage, OSError) as error:
            problem = f"{source.name(row)}: {error}"
            continue
        seen.add(source.index.names[row], raster.height, raster.width)
        if reading.nodata is not None:
            pixels = pixels[~(pixels == 0).all(1)]  # where it was filled, with zeros
        if len(pixels):
            drawn.append(pixels[generator.integers(0, len(pixels), min(_PIXELS, len(pixels)))])
    if not drawn:
        raise ValueError(f"{source.root}: none of {len(rows)} images has pixels to measure; the last: {problem}")
    values = np.concatenate(drawn).astype(np.float64) / unit
    ends: np.ndarray | None = None
    if stretch != "none":
        ends = np.percentile(values, ENDS[stretch], axis=0)
        if (flat := np.flatnonzero(ends[0] >= ends[1])).size:
            raise ValueError(f"--stretch {stretch}: channel {flat[0]} has the same value in most pixels; leave it out")
        low, high = (tuple(end.tolist()) for end in ends)
        scale = Pixels(low, high, stretch, low, high)
        values = scale.stretched(torch.from_numpy(values.astype(np.float32))[None, None])[0, 0].double().numpy()
    mean, std = values.mean(0), values.std(0)
    if (flat := np.flatnonzero(std == 0)).size:
        raise ValueError(f"{source.root}: channel {flat[0]} is {mean[flat[0]]:g} everywhere; leave it out: --bands")
    low, high = (tuple(end.tolist()) for end in ends) if ends is not None else ((), ())
    return Stats(reading, len(drawn), mean, std, np.percentile(values, PERCENTILES, axis=0), low, high, f"{seen}")


def _numbers(values: Sequence[float] | np.ndarray) -> str:
    return "[" + ", ".join(f"{value:.6g}" for value in values) + "]"


def _yaml(value: object) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(str, value))}]"
    return ".nan" if value != value else str(value)


@one_sentence()
def main(argv: list[str] | None = None) -> int:
    """The command line; its exit status."""
    parser = argparse.ArgumentParser(prog="python -m ijepa_fast stats", description=__doc__)
    parser.add_argument("path", help="whatever data.source takes")
    parser.add_argument("--images", type=whole(), default=1000, help="that are measured (default %(default)s)")
    parser.add_argument("--stretch", choices=STRETCHES, default="none")
    add_arguments(parser)
    args = parser.parse_args(argv)
    reading = reading_of(args)
    source = open_source(args.path, reading=reading)
    source.reading = replace(source.reading, fill=())
    found = measure(source, args.images, args.stretch)
    print(f"{found.images} of {len(source)} images: {found.seen}; {describe(source.reading)}")
    print("channel  " + "  ".join(f"{name:>9}" for name in ("mean", "std", "least", "1%", "median", "99%", "most")))
    for channel in range(source.reading.channels):
        numbers = (found.mean[channel], found.std[channel], *found.percentiles[:, channel])
        print(f"{channel:>7}  " + "  ".join(f"{number:>9.4g}" for number in numbers))
    print(f"\n{found.lines(args.stretch)}")
    return 0
