"""Members of tar archives, found without unpacking: ustar, GNU long names, pax paths and sizes.

Only headers are read. Python's tarfile takes ten times as long.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from ijepa_fast.data.kinds import kind_of

_BLOCK = 512
_LONGEST = 1 << 24  # bytes of an extended header


def members(file: int, path: str, first: int = 0, end: int | None = None) -> Iterator[tuple[str, int, int]]:
    """(name, first byte, size) of each regular file in the tar archive that the descriptor `file` reads.

    first, end: where the archive lies in the file, by default all of it.

    Raises ValueError, with the archive's path and the offset, where it is no uncompressed tar archive, where a number
    or a name makes no sense, and where it ends before its end mark.
    """
    at, end = first, os.fstat(file).st_size if end is None else end
    override: dict[str, str] = {}
    while True:
        header = os.pread(file, max(0, min(_BLOCK, end - at)), at)
        if at > first and len(header) < _BLOCK:
            raise ValueError(
                f"{path}: cut short: it ends at byte {end} without tar's end mark, so members may be missing; "
                "fetch or write it again"
            )
        if len(header) == _BLOCK and not header.strip(b"\0"):
            return
        size = _number(header[124:136]) if len(header) == _BLOCK and _checksum_holds(header) else None
        if size is None:
            what = kind_of(header) if at == first else None
            raise ValueError(
                f"{path}: no tar header at byte {at}; expected an uncompressed tar file, got {what or 'other bytes'}"
            )
        kind, start = header[156:157], at + _BLOCK
        if kind in b"xL":
            if size > _LONGEST or start + size > end:
                raise ValueError(f"{path}: the extended header at byte {at} has {size} bytes, which makes no sense")
            override |= _extended(kind, os.pread(file, size, start), f"{path}: the extended header at byte {at}")
            at = start + _padded(size)
            continue
        size = int(override.get("size", size))
        if start + size > end:
            raise ValueError(
                f"{path}: cut short; its member at byte {at} ends {start + size - end} bytes after the file"
            )
        if kind in (b"0", b"\0", b"7"):
            name, prefix = _text(header[:100]), _text(header[345:500]) if header[257:262] == b"ustar" else ""
            if header[257:265] == b"ustar  \0":  # GNU has times in the place of the prefix
                prefix = ""
            yield override.get("path", f"{prefix}/{name}" if prefix else name).removeprefix("./"), start, size
        if kind != b"g":
            override = {}
        at = start + _padded(size)


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _checksum_holds(header: bytes) -> bool:
    expected = _number(header[148:156])
    return expected == sum(header) - sum(header[148:156]) + 8 * 0x20


def _number(digits: bytes) -> int | None:
    """A number of a tar header: octal, or base 256 with the top bit set. None where it is neither, or negative."""
    if digits[0] & 0x80:
        return int.from_bytes(digits[1:], "big") if digits[0] == 0x80 else None
    digits = digits.strip(b" \0") or b"0"
    return int(digits, 8) if digits.strip(b"01234567") == b"" else None


def _text(data: bytes) -> str:
    return os.fsdecode(data.split(b"\0", 1)[0])


def _extended(kind: bytes, data: bytes, where: str) -> dict[str, str]:
    """The path and the size that a GNU long name (L) or a pax header (x) gives the next member."""
    if kind == b"L":
        return {"path": _text(data)}
    fields = {}
    data = data.rstrip(b"\0")
    while data:
        length, space, _ = data.partition(b" ")
        size = int(length) if length.isdigit() and len(length) < 9 else 0
        key, equals, value = data[len(length) + 1 : size].partition(b"=")
        if not space or not equals or size > len(data) or data[size - 1 : size] != b"\n":
            raise ValueError(f"{where} is no list of pax records: {data[:40]!r}")
        if key in (b"path", b"size"):
            fields[key.decode()] = os.fsdecode(value[:-1])
        data = data[size:]
    if "size" in fields and not (fields["size"].isdecimal() and len(fields["size"]) < 19):
        raise ValueError(f"{where} says that the next member has {fields['size'][:40]!r} bytes")
    return fields
