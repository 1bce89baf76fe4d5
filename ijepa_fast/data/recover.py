"""The list of files that cannot be decoded, and the bound on their share."""

from __future__ import annotations

import fcntl
import os
import threading
from pathlib import Path
from typing import TextIO


class TooManyBadFiles(ValueError):
    """More files of a source than the allowed share cannot be decoded. last: the last of them, with the reason."""

    def __init__(self, message: str, last: str = ""):
        super().__init__(message)
        self.last = last


class BadFiles:
    """The names of bad files with the reasons, each file once. Several threads may use it.

    total: files of the source. max_share: `add` raises TooManyBadFiles when more than this share of them is bad. path:
    a file that keeps the list, one line `name<TAB>reason` per bad file; all ranks append to it, and a resumed run reads
    it. None: the list is kept in memory only.
    """

    def __init__(self, total: int, max_share: float, path: str | Path | None = None):
        self.total, self.max_share = total, max_share
        self.path = Path(path) if path is not None else None
        self._reasons: dict[str, str] = {}
        self._lock = threading.Lock()
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a+", errors="surrogateescape") as file:
                self._read(file)

    def __len__(self) -> int:
        return len(self._reasons)

    def __contains__(self, name: str) -> bool:
        return _line(name) in self._reasons

    def add(self, name: str, reason: str) -> None:
        """List a bad file. Raises TooManyBadFiles."""
        name, reason = _line(name), _line(reason)
        with self._lock:
            if self.path is None:
                self._reasons.setdefault(name, reason)
            else:
                with open(self.path, "a+", errors="surrogateescape") as file:
                    fcntl.flock(file, fcntl.LOCK_EX)
                    self._read(file)
                    if name not in self._reasons:
                        self._reasons[name] = reason
                        file.seek(0, os.SEEK_END)
                        file.write(f"{name}\t{reason}\n")
        if len(self) > self.max_share * self.total:
            listed = f"they are listed in {self.path}" if self.path else f"the last is {name}: {reason}"
            raise TooManyBadFiles(
                f"{len(self)} of {self.total} files cannot be decoded, more than max_bad_share = {self.max_share:g}; "
                f"{listed}. Repair or remove them (python -m ijepa_fast check-data PATH finds them all), "
                "or raise max_bad_share",
                last=f"{name}: {reason}",
            )

    def _read(self, file: TextIO) -> None:
        file.seek(0)
        for line in file:
            name, _, reason = line.rstrip("\n").partition("\t")
            if not reason.startswith("cannot be read"):  # storage was away: earlier versions listed good files for that
                self._reasons.setdefault(name, reason)


def _line(text: str) -> str:
    """`text` in one line, without tabs."""
    return " ".join(text.split())
