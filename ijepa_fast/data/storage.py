"""Reading from storage: regular files of bounded size, and patience where storage is away for a moment."""

from __future__ import annotations

import errno
import os
import stat
import sys
import threading
from collections.abc import Callable
from typing import TypeVar

from ijepa_fast.data.headers import BadImage

Result = TypeVar("Result")

MAX_BYTES = 1 << 29  # of one encoded image: 50 million pixels of 16-bit RGBA take 400 MB uncompressed

WAITS = (1, 4, 16, 60)  # seconds between one try and the next

# What a file server that is restarted, a mount that is lost or a share that changes hands says of good files.
TROUBLE = frozenset([errno.ENOENT, errno.EIO, errno.ESTALE, errno.EACCES, errno.ETIMEDOUT, errno.ENOTCONN])


class StorageTrouble(ValueError):
    """Storage could not be read however often it was tried. No file is to blame."""


def read_file(path: str) -> bytes:
    """The content of a regular file. Raises OSError; BadImage for a file of another kind or of over MAX_BYTES."""
    # Without O_NONBLOCK, to open a FIFO is to wait for somebody who writes into it.
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode):
            raise BadImage(f"not a regular file but {_kind(status.st_mode)}")
        check_size(status.st_size)
        data = os.read(file, status.st_size)
        while 0 < len(data) < status.st_size:
            more = os.read(file, status.st_size - len(data))
            if not more:  # it has become shorter
                break
            data += more
        return data
    finally:
        os.close(file)


def check_size(size: int) -> None:
    """BadImage where an encoded image of `size` bytes is over the bound."""
    if size > MAX_BYTES:
        raise BadImage(f"has {size} bytes, over the bound of {MAX_BYTES} for one image")


def _kind(mode: int) -> str:
    kinds = {
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a FIFO",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
    }
    return kinds.get(stat.S_IFMT(mode), "something else")


class Patience:
    """Tries again where storage is in trouble, after each of `waits` seconds. Several threads may use it.

    `stop`, when it is set, ends the waiting.
    """

    def __init__(self, stop: threading.Event | None = None):
        self._stop, self._speaks = stop or threading.Event(), threading.Lock()

    def __call__(self, read: Callable[[], Result], name: Callable[[], str]) -> Result:
        """What `read` returns, at last. name: of what is read, for messages.

        Raises StorageTrouble after the last try; at once any OSError that is no trouble of storage.
        """
        waits, speaks = iter(WAITS), False
        try:
            while True:
                try:
                    return read()
                except OSError as error:
                    if error.errno not in TROUBLE:
                        raise
                    wait = next(waits, None)
                    if wait is None or self._stop.is_set():
                        raise StorageTrouble(
                            f"{name()}: cannot be read: is it mounted? {error.strerror}, tried {len(WAITS) + 1} times "
                            f"within {sum(WAITS):g} s"
                        ) from None
                    speaks = speaks or self._speaks.acquire(blocking=False)  # one thread for all
                    if speaks:
                        print(f"{name()}: {error.strerror}; trying again in {wait:g} s", file=sys.stderr, flush=True)
                    self._stop.wait(wait)
        finally:
            if speaks:
                self._speaks.release()
