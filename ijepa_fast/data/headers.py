"""What the first bytes of a JPEG, PNG, WebP or PPM file say: its format, and its size as a viewer shows it.

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

from ijepa_fast.data.kinds import kind_of

MAX_PIXELS = 50_000_000  # 150 MB of RGB for each decoding thread; a progressive JPEG takes twice that beside it

# Start-of-frame markers; C4, C8 and CC in their range are tables and extensions.
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_STANDALONE = frozenset([0x01, *range(0xD0, 0xD8)])
_SCAN = 0xDA  # image data begin
_JPEG_END = b"\xff\xd9"
_MARGIN = 64  # bytes that may follow the end marker of a whole file


# Tags of EXIF whose values DALI looks at: 16-bit words, text, and rationals with their numbers.
_WORDS = frozenset([0x112, 0x128, 0x213])
_TEXTS = frozenset([0x10E, 0x10F, 0x110, 0x131, 0x132, 0x8298])
_RATIONALS = {0x11A: 1, 0x11B: 1, 0x13E: 2, 0x13F: 6, 0x211: 3, 0x214: 6}


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
    elif data[:3] == b"P6\n":
        height, width, orientation, cut_short = _ppm(data)
    elif not data:
        raise BadImage("empty file")
    else:
        what = kind_of(data[:512])
        raise BadImage("not a JPEG, PNG or WebP image" + (f" but {what}" if what else ""))
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
    size: tuple[int, ...] = ()
    exif, at, end = b"", 2, len(data)
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
        if marker == _SCAN:
            break
        length = data[at + 2] << 8 | data[at + 3]
        if marker in _FRAMES and not size:
            if at + 9 > end:
                break
            size = struct.unpack_from(">HH", data, at + 5)
        elif marker == 0xE1 and data[at + 4 : at + 10] == b"Exif\0\0":  # the last block counts
            exif = data[at + 10 : at + 2 + length]
        at += 2 + length
    if not size:
        raise BadImage("no image size in the header")
    height, width = size
    orientation, damaged = _orientation(exif)
    return height, width, 1 if damaged else orientation, data.rfind(_JPEG_END, max(0, end - _MARGIN)) < 0


def _png(data: bytes) -> tuple[int, int, int, bool]:
    if len(data) < 33 or data[12:16] != b"IHDR":
        raise BadImage("no image size in the header")
    width, height = struct.unpack_from(">II", data, 16)
    orientation = _png_orientation(data) if b"eXIf" in data else 1
    return height, width, orientation, data.rfind(b"IEND", max(0, len(data) - _MARGIN)) < 0


def _png_orientation(data: bytes) -> int:
    """The orientation of a PNG's eXIf chunk, 1 where it has none.

    Raises BadImage for a second chunk and for one with damage: both end DALI's process in a segmentation fault.
    """
    orientation, found, at = 1, False, 8
    while at + 8 <= len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        if data[at + 4 : at + 8] == b"eXIf":
            if found:
                raise BadImage("has two eXIf chunks")
            orientation, damaged = _orientation(data[at + 8 : at + 8 + length])
            if damaged:
                raise BadImage("its eXIf chunk is damaged")
            found = True
        at += 12 + length
    return orientation


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


def _ppm(data: bytes) -> tuple[int, int, int, bool]:
    """As formats.as_ppm writes it."""
    size, most, pixels = data[3:].split(b"\n", 2)
    width, height = map(int, size.split())
    return height, width, 1, most != b"255" or len(pixels) < 3 * height * width


def _webp_orientation(data: bytes) -> int:
    at = 12
    while at + 8 <= len(data):
        length = int.from_bytes(data[at + 4 : at + 8], "little")
        if data[at : at + 4] == b"EXIF":
            return _orientation(data[at + 8 : at + 8 + length])[0]
        at += 8 + length + (length & 1)
    return 1


def _orientation(tiff: bytes) -> tuple[int, bool]:
    """The orientation, 1 to 8, of an EXIF block, 1 (upright) where it has none; and whether the block is damaged.

    As DALI reads it, or windows would be drawn for an image turned otherwise: of the first directory alone, the first
    entry with the orientation's tag, whatever its type, until an entry that points outside the block.
    """
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None or len(tiff) < 10:
        return 1, False
    unpack, found, damaged = struct.unpack_from, -1, False
    try:
        (directory,) = unpack(order + "I", tiff, 4)
        (entries,) = unpack(order + "H", tiff, directory)
        for at in range(directory + 2, directory + 2 + 12 * entries, 12):
            (tag,) = unpack(order + "H", tiff, at)
            if tag in _WORDS:
                (word,) = unpack(order + "H", tiff, at + 8)
                if tag == 0x112:
                    found = word if found < 0 else found
            elif tag in _TEXTS or tag in _RATIONALS:
                size, begin = unpack(order + "II", tiff, at + 4)
                size = 8 * _RATIONALS[tag] if tag in _RATIONALS else size if size > 4 else 0
                damaged = size > 0 and begin + size > len(tiff)
                if damaged:
                    break
    except struct.error:
        damaged = True
    return found if 1 <= found <= 8 else 1, damaged
