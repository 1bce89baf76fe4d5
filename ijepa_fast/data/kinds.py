"""What a file is, by its first bytes, for messages about files that are not what they should be."""

from __future__ import annotations

import os
import re
import stat

_BEGINNINGS = (
    (b"\x1f\x8b", "a gzip-compressed file: unpack it (tar -xzf, gunzip)"),
    (b"PK\x03\x04", "a zip archive: unpack it"),
    (b"PK\x05\x06", "an empty zip archive"),
    (b"\x28\xb5\x2f\xfd", "a zstd-compressed file: unpack it (zstd -d)"),
    (b"\xfd7zXZ\0", "an xz-compressed file: unpack it (xz -d)"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive: unpack it"),
    (b"Rar!\x1a\x07", "a rar archive: unpack it"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"\x89PNG\r\n\x1a\n", "a PNG image"),
    (b"GIF87a", "a GIF image"),
    (b"GIF89a", "a GIF image"),
    (b"II*\0", "a TIFF image"),
    (b"MM\0*", "a TIFF image"),
    (b"%PDF-", "a PDF document"),
    (b"\x89HDF", "an HDF5 file"),
    (b"PAR1\x15", "a Parquet file: open it in a function, data.source=module:function"),
    (b"SIMPLE  =      ", "a FITS file: save its array as .npy, or give it by data.source=module:function"),
    (b"MATLAB 5.0 MAT-file", "a MATLAB file: save its array as .npy or HDF5"),
    *((b"\x80" + bytes([version]), "a Python pickle, which may hold code and is not read") for version in range(2, 6)),
    *((b"\0\0\x08" + bytes([axes]), "an IDX file, as MNIST's: save its array as .npy") for axes in range(1, 5)),
    (b"<svg", "an SVG drawing"),
    (b"\x93NUMPY", "a NumPy array: its name should end in .npy"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself: fetch it with git lfs pull"),
    (b"\xff\xfe", "text in UTF-16: save it as UTF-8"),
    (b"\xfe\xff", "text in UTF-16: save it as UTF-8"),
)
_HEIC = (b"heic", b"heix", b"hevc", b"mif1", b"msf1")
_HTML = (b"<!doctype html", b"<html", b"<head")


def kind_of(head: bytes) -> str | None:
    """What a file is that begins with `head`, some 512 bytes, in words; None where nothing known begins so."""
    for beginning, words in _BEGINNINGS:
        if head.startswith(beginning):
            return words
    if head[:3] == b"BZh" and head[4:10] == b"1AY&SY":
        return "a bzip2-compressed file: unpack it (bunzip2)"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "a WebP image"
    if head[4:8] == b"ftyp":
        brand = head[8:12]
        if brand in (b"avif", b"avis"):
            return "an AVIF image"
        return "a HEIC image: convert it to JPEG" if brand in _HEIC else "a video or another file of MPEG-4's form"
    if head[128:132] == b"DICM":
        return "a DICOM file: save its array as .npy, or give it by data.source=module:function"
    if head[4:9] == b"\0\0\0\0{":
        return "a safetensors file"
    if head[257:262] == b"ustar":
        return "a tar archive: its name should end in .tar"
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith(_HTML):
        return "an HTML page, perhaps the error page or the login of a download"
    if not head:
        return "an empty file"
    return None


def kind_of_file(path: str | os.PathLike) -> str | None:
    """`kind_of` a file's first bytes; None also where it cannot be read or is no regular file."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            return kind_of(os.read(file, 512)) if stat.S_ISREG(os.fstat(file).st_mode) else None
        finally:
            os.close(file)
    except OSError:
        return None


def printable(text: str) -> str:
    """`text` with control characters, turned writing direction and bytes that are no UTF-8 written as escapes.

    Names come from strangers: printed raw, they could command the terminal or fail to be encoded.
    """
    return text if text.isascii() and text.isprintable() else _UNSAFE.sub(_escaped, text)


_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def _escaped(match: re.Match) -> str:
    code = ord(match[0])
    if 0xDC80 <= code <= 0xDCFF:  # a byte that is no UTF-8, as Python holds it in a string
        code -= 0xDC00
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
