"""Command-line options that say how images are read, of the commands that read a source without a run."""

from __future__ import annotations

import argparse

from ijepa_fast.command import whole
from ijepa_fast.data import DEPTHS
from ijepa_fast.data.reading import Reading


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options, which are the configuration's keys of the section `data`."""
    group = parser.add_argument_group("images that are not RGB of eight bits")
    group.add_argument("--channels", type=whole(), help="of an image (default: as the first file has them)")
    group.add_argument("--depth", choices=["auto", *DEPTHS], default="auto")
    group.add_argument("--bands", type=_numbers, help="channels of the files to take, from 0: 3,2,1")
    group.add_argument("--axes", help="of arrays, one letter each: N images, H, W, C")
    group.add_argument("--array", help="the array in a file of several")
    group.add_argument("--page", type=_page, help="of a TIFF; each: every page is an image")
    group.add_argument("--nodata", type=float, help="value of pixels without data")
    group.add_argument("--window", type=whole(), help="read large images by squares of so many pixels")
    group.add_argument("--where", help="a map of where windows may lie")


def reading_of(args: argparse.Namespace) -> Reading:
    """The reading that the options say."""
    bands = None if args.bands is None else tuple(args.bands)
    channels = args.channels or (0 if bands is None else len(bands))
    return Reading(
        channels, args.depth, bands, args.axes, args.array, args.page, args.nodata, (), args.window, args.where
    )


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _page(text: str) -> int | str:
    return text if text == "each" else int(text)
