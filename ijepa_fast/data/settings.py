"""The section `data` of the configuration: what images a run sees, how files become them, how they are cropped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ijepa_fast.data import DEPTHS, IMAGENET_MEAN, IMAGENET_STD, STRETCHES, Size, size_of
from ijepa_fast.given import MISSING, RATIOS, SHARES, ConfigError, fixed, key

if TYPE_CHECKING:  # they import torch, which a mistake in a configuration needs not wait for
    from ijepa_fast.data.pixels import Pixels
    from ijepa_fast.data.reading import Reading

GREY_MEAN, GREY_STD = (0.449,), (0.226,)  # the averages of ImageNet's over the channels
ANY: dict[str, Any] = {"least": -3e38, "most": 3e38}  # what float32 holds
LEAST_STD = 1e-35
LONGEST = 16_384  # pixels of a side of a crop
STATS = "python -m ijepa_fast stats {} --channels {} measures them and prints the lines"


@dataclass
class Data:
    source: str = fixed(
        MISSING,
        "a folder, archives, arrays, a text list of paths; module:function, which gives a data set of yours; "
        '"scenes", the embedded data set; "synthetic", random images',
        path=True,
    )
    channels: int = fixed(3, "of an image", least=1, most=10_000)
    depth: str = fixed("auto", "of a pixel; auto: as the first image has it", choices=("auto", *DEPTHS))
    bands: list[int] | None = fixed(
        None, "channels of the files that are used, from 0, in this order; null: all", least=0
    )
    channel_names: list[str] | None = fixed(None, "kept in checkpoints and exports")
    axes: str | None = fixed(None, "of arrays, one letter each: N images, H, W, C; null: by the number of channels")
    array: str | None = fixed(None, "the array in a file of several (HDF5, NPZ, Zarr)")
    page: Any = fixed(None, 'of a TIFF file; "each": every page is an image; null: the first image, of all its pages')
    nodata: float | None = fixed(
        None, "pixels of this value, and NaN, are filled with the mean; null: there are none", **ANY
    )
    window: int | None = fixed(None, "large images are sampled by squares of so many pixels", least=1, most=10**6)
    where: str | None = fixed(
        None, "a map of where windows and targets lie (not zero): a file, or a folder of one per image", path=True
    )
    stretch: str = fixed("none", "of pixels, before mean and std", choices=STRETCHES)
    low: list[float] | None = fixed(None, "of the stretch, for each channel", **ANY)
    high: list[float] | None = fixed(None, "of the stretch, for each channel", **ANY)
    memory: Any = key(
        False, "images are decoded once and kept: true, in the host's memory; device, on the GPU, which crops them"
    )
    crop: Any = fixed(224, "side of the square crop, or [height, width], pixels")
    scale: list[float] = fixed([0.3, 1.0], "range of the crop's share of the image's area", **SHARES)
    ratio: list[float] = fixed([3 / 4, 4 / 3], "range of the crop's width over its height", **RATIOS)
    interpolation: str = fixed("bilinear", "of the resizing", choices=("bilinear", "bicubic"))
    flip: bool = fixed(False, "whether half of the crops are mirrored")
    crops_per_image: int = fixed(
        0, "different crops of an image, taken in turn by epoch; 0: another one in every epoch", least=0, most=1000
    )
    mean: list[float] = fixed(
        list(IMAGENET_MEAN), "of each channel, in units of 0..1; of floats as they are stored", **ANY
    )
    std: list[float] = fixed(list(IMAGENET_STD), "of each channel, likewise", above=0, most=3e38)
    threads: int = key(0, "decoding threads of a rank; 0: the rank's share of the cores", least=0, most=4096)
    prefetch: int = key(2, "batches decoded ahead", least=1, most=1000)
    cache: str = key("~/.cache/ijepa_fast", "where the embedded data set is written")
    scenes: int = fixed(4000, "images of the embedded data set", least=1, most=10**7)
    scenes_size: int = fixed(64, "their side, pixels", least=1, most=4096)
    hw_decoder_load: float = key(0.65, "share of the JPEGs for the GPU's decode engine", least=0, most=1)
    changed: str = key("refuse", "when a run goes on: other images than it began with", choices=("refuse", "accept"))
    max_bad_share: float = key(0.01, "unreadable files beyond this share end the run", least=0, most=1)
    max_pixels: int = fixed(
        50_000_000, "a file that declares more counts as unreadable (a decompression bomb)", least=1
    )

    @property
    def size(self) -> Size:
        """Height and width of a crop."""
        return size_of(self.crop)

    @property
    def reading(self) -> Reading:
        """How files become images."""
        from ijepa_fast.data.reading import Reading

        fill = self.mean if self.stretch == "none" else self.low or ()
        bands = None if self.bands is None else tuple(self.bands)
        where = (self.axes, self.array, self.page, self.nodata)
        return Reading(self.channels, self.depth, bands, *where, self._fill(fill), self.window, self.where)

    def _fill(self, values: Sequence[float]) -> tuple[float, ...]:
        return () if self.nodata is None else tuple(values)

    @property
    def pixels(self) -> Pixels:
        """What a model makes of pixels first."""
        from ijepa_fast.data.pixels import Pixels

        ends = tuple(self.low or ()), tuple(self.high or ())
        return Pixels(tuple(self.mean), tuple(self.std), self.stretch, *ends, tuple(self.channel_names or ()))


def is_measured(data: Data) -> bool:
    """Whether mean and std are somebody's, and not those of photographs of eight bits, which are the defaults."""
    return (data.mean, data.std) not in [
        (list(IMAGENET_MEAN), list(IMAGENET_STD)),
        (list(GREY_MEAN), list(GREY_STD)),
    ]


def check(data: Data, patch: int) -> None:
    """What the keys of the section must agree on, with each other and with model.patch. Raises ConfigError."""
    sides = data.crop if isinstance(data.crop, list | tuple) else [data.crop]
    if not 1 <= len(sides) <= 2 or not all(type(side) is int and side > 0 for side in sides):
        raise ConfigError(f"data.crop: expected a whole number of pixels, or [height, width], got {data.crop!r}")
    if max(sides) > LONGEST:
        raise ConfigError(f"data.crop: expected sides of at most {LONGEST} pixels, got {data.crop}")
    if any(side % patch for side in sides):
        whole = [max(1, side // patch) * patch for side in sides]
        raise ConfigError(
            f"data.crop={data.crop} is not divisible by model.patch={patch}; "
            f"set data.crop to {whole[0] if len(whole) == 1 else whole}"
        )
    if data.where is not None and data.window is None:
        raise ConfigError(
            f"data.where={data.where}: expected data.window with it, as it says where windows lie; set both"
        )
    if not (isinstance(data.memory, bool) or data.memory == "device"):
        raise ConfigError(f"data.memory: expected true, false or device, got {data.memory!r}")
    _check_channels(data)
    if min(data.std) < LEAST_STD:
        raise ConfigError(f"data.std: expected at least {LEAST_STD}, which float32 can divide by, got {data.std}")
    for name in ("scale", "ratio"):
        ends = getattr(data, name)
        if ends[0] > ends[1]:
            raise ConfigError(f"data.{name}: expected two numbers, first <= second, got {ends}")


def check_shares(data: Data, depth: str) -> None:
    """Integers are shares of their range: ConfigError for a mean that is not within 0 and 1."""
    if data.stretch == "none" and depth != "float32" and not all(0 <= value <= 1 for value in data.mean):
        raise ConfigError(f"data.mean: expected shares of the range of {depth}, 0 to 1, got {data.mean}; divide them")


def _check_channels(data: Data) -> None:
    count = data.channels
    if data.bands is not None and len(data.bands) != count:
        raise ConfigError(
            f"data.bands: expected {count} bands, as data.channels says, got {len(data.bands)}; set "
            f"data.channels={len(data.bands)}"
        )
    if not (data.page is None or data.page == "each" or type(data.page) is int):
        raise ConfigError(f'data.page: expected a number, "each" or null, got {data.page!r}')
    if data.axes is not None and (
        not {"H", "W"} <= set(data.axes) <= set("NHWC") or len(set(data.axes)) < len(data.axes)
    ):
        raise ConfigError(f"data.axes: expected letters of NHWC, H and W among them, got {data.axes!r}")
    lists = {"mean": data.mean, "std": data.std}
    ends = {"low": data.low, "high": data.high}
    lists |= {name: values or [] for name, values in ends.items() if values is not None or data.stretch != "none"}
    if data.depth in ("uint8", "uint16"):
        check_shares(data, data.depth)
    for name, values in lists.items():
        if len(values) != count:
            raise ConfigError(
                f"data.{name}: expected {count} numbers, one for each of data.channels, got {len(values)}; "
                f"{STATS.format(data.source, count)}"
            )
    if data.stretch != "none" and any(low >= high for low, high in zip(data.low or [], data.high or [])):
        raise ConfigError(f"data.low, data.high: expected low < high in each channel, got {data.low} and {data.high}")
    if data.channel_names is not None and len(data.channel_names) != count:
        raise ConfigError(f"data.channel_names: expected {count} names, got {len(data.channel_names)}")
