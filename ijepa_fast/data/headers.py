"""What the first bytes of a JPEG, PNG or WebP file say: its format, and its size as a viewer shows it.

Reading a header takes a few microseconds per image and decodes nothing. It finds what would stop a decoder: empty
files, files that are no images, sizes that no memory holds. A file without its end marker is decoded once, to see
whether anything is missing.

Wrong bytes inside the data of a JPEG go unnoticed: every decoder used here makes a garbled picture of them.
"""

from __future__ import annotations

import io
import struct
import warnings
from typing import NamedTuple

from PIL import Image

MAX_PIXELS = 178_956_970  # Pillow's bound for decompression bombs: 512 MiB of RGB

# Start-of-frame markers; C4, C8 and CC in their range are tables and extensions.
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_STANDALONE = frozenset([0x01, *range(0xD0, 0xD8)])
_JPEG_END = b"\xff\xd9"
_MARGIN = 64  # bytes that may follow the end marker of a whole file


class BadImage(ValueError):
    """A file that cannot be used; the message is the reason."""


class Header(NamedTuple):
    """height, width: pixels, after the EXIF rotation. cut_short: whether the file lacks its end marker."""

    height: int
    width: int
    cut_short: bool


def read_header(data: bytes, max_pixels: int = MAX_PIXELS) -> Header:
    """The header of an encoded image. Raises BadImage where there is none, or it declares more than `max_pixels`."""
    if data[:2] == b"\xff\xd8":
        height, width, orientation, cut_short = _jpeg(data)
    elif data[:8] == b"\x89PNG\r\n\x1a\n":
        height, width, orientation, cut_short = _png(data)
    elif data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        height, width, orientation, cut_short = _webp(data)
    elif not data:
        raise BadImage("empty file")
    else:
        raise BadImage("not a JPEG, PNG or WebP image")
    if height <= 0 or width <= 0:
        raise BadImage("no image size in the header")
    if height * width > max_pixels:
        raise BadImage(f"declares {width} x {height} pixels, over the bound of {max_pixels}")
    return Header(width, height, cut_short) if orientation >= 5 else Header(height, width, cut_short)


def screen(data: bytes, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Height and width of an encoded image, pixels. Raises BadImage, with the reason, where it cannot be used."""
    header = read_header(data, max_pixels)
    if header.cut_short:
        if complaint := pillow_complaint(data):
            raise BadImage(f"cut short: {complaint}")
        # To a JPEG decoder zeros are image data. After the end marker they are only padding.
        content = data.rstrip(b"\0")
        if len(data) - len(content) > _MARGIN and not content.endswith(_JPEG_END):
            raise BadImage(f"cut short: its last {len(data) - len(content)} bytes are zeros")
    return header.height, header.width


def pillow_complaint(data: bytes) -> str | None:
    """Pillow's error when it decodes the whole image; None where it has none."""
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(data)) as image:
            image.load()
    except Exception as error:  # of whatever type its plug-ins raise
        return str(error) or type(error).__name__
    return None


def _jpeg(data: bytes) -> tuple[int, int, int, bool]:
    orientation, at, end = 1, 2, len(data)
    while at + 4 <= end:
        if data[at] != 0xFF:
            break
        marker = data[at + 1]
        if marker == 0xFF:  # padding
            at += 1
            continue
        if marker in _STANDALONE:
            at += 2
            continue
        length = data[at + 2] << 8 | data[at + 3]
        if marker in _FRAMES:
            if at + 9 > end:
                break
            height, width = struct.unpack_from(">HH", data, at + 5)
            return height, width, orientation, data.rfind(_JPEG_END, max(0, end - _MARGIN)) < 0
        if marker == 0xE1 and data[at + 4 : at + 10] == b"Exif\0\0":
            orientation = _exif_orientation(data[at + 10 : at + 2 + length])
        at += 2 + length
    raise BadImage("no image size in the header")


def _png(data: bytes) -> tuple[int, int, int, bool]:
    if len(data) < 33 or data[12:16] != b"IHDR":
        raise BadImage("no image size in the header")
    width, height = struct.unpack_from(">II", data, 16)
    return height, width, 1, data.rfind(b"IEND", max(0, len(data) - _MARGIN)) < 0


def _webp(data: bytes) -> tuple[int, int, int, bool]:
    if len(data) < 30:
        raise BadImage("no image size in the header")
    cut_short = len(data) < 8 + struct.unpack_from("<I", data, 4)[0]
    kind, orientation = data[12:16], 1
    if kind == b"VP8X":
        width = 1 + int.from_bytes(data[24:27], "little")
        height = 1 + int.from_bytes(data[27:30], "little")
        if data[20] & 0x08:
            orientation = _webp_orientation(data)
    elif kind == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        width, height = 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    elif kind == b"VP8 ":
        width, height = (size & 0x3FFF for size in struct.unpack_from("<HH", data, 26))
    else:
        raise BadImage("no image size in the header")
    return height, width, orientation, cut_short


def _webp_orientation(data: bytes) -> int:
    at = 12
    while at + 8 <= len(data):
        length = int.from_bytes(data[at + 4 : at + 8], "little")
        if data[at : at + 4] == b"EXIF":
            return _exif_orientation(data[at + 8 : at + 8 + length].removeprefix(b"Exif\0\0"))
        at += 8 + length + (length & 1)
    return 1


def _exif_orientation(tiff: bytes) -> int:
    """The orientation, 1 to 8: tag 0x112 of an EXIF block's first directory; 1 (upright) where there is none."""
    if len(tiff) < 10 or tiff[:2] not in (b"II", b"MM"):
        return 1
    order = "<" if tiff[:2] == b"II" else ">"
    directory = struct.unpack_from(order + "I", tiff, 4)[0]
    if directory + 2 > len(tiff):
        return 1
    entries = struct.unpack_from(order + "H", tiff, directory)[0]
    for at in range(directory + 2, min(directory + 2 + 12 * entries, len(tiff) - 11), 12):
        tag, kind = struct.unpack_from(order + "HH", tiff, at)
        if tag == 0x112 and kind == 3:
            value = struct.unpack_from(order + "H", tiff, at + 8)[0]
            return value if 1 <= value <= 8 else 1
    return 1
