"""One training at a time in a run's folder.

The lock is the kernel's (flock), which is gone with its process. Some file systems have none, or one for each machine
alone; so the owner also gives a sign of life every few seconds, the time of the lock file, which a start on another
machine looks at. An owner that finds another in its place, as it was cut off for long, ends.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import sys
import threading
import time
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

from ijepa_fast.run.together import on_first

BEAT = 15.0  # seconds between two signs of life
STALE = 60.0  # seconds without one, after which an owner on another machine is taken for gone
SETTLE = 1.0  # seconds in which another start may write over what this one wrote, where there are no locks
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)


class FolderInUse(ValueError):
    """Another process trains in the run's folder; the message says which, where and since when."""


def hold(folder: Path) -> None:
    """Hold the run's folder until `release` or the end of this process. Called by every rank; rank 0 holds it.

    Raises FolderInUse, OSError on all ranks.
    """
    on_first(lambda: _held.append(Lock(folder / "checkpoints" / ".lock")))


def release() -> None:
    """Give the folder back, where this process holds one."""
    while _held:
        _held.pop().release()


def lost() -> bool:
    """Whether another process has taken the folder that this one held."""
    return any(lock.thief is not None for lock in _held)


def check() -> None:
    """Raise FolderInUse where the folder is `lost`."""
    for lock in _held:
        if lock.thief is not None:
            raise FolderInUse(f"{lock.run}: {lock.thief} took it over, as this run gave no sign for {STALE:.0f} s")


def leave(folder: Path) -> None:
    """Remove the folder of a run that cannot begin, where it has nothing but its lock. Called by who holds it."""
    checkpoints = folder / "checkpoints"
    if [path.name for path in folder.iterdir()] == ["checkpoints"] and len(list(checkpoints.iterdir())) == 1:
        (checkpoints / ".lock").unlink(missing_ok=True)
        checkpoints.rmdir()
        folder.rmdir()


class Lock:
    """The lock file `path`, held. thief: who has written over it. Raises FolderInUse, OSError."""

    def __init__(self, path: Path):
        self.run, self._path = path.parents[1], path
        self.thief: str | None = None
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "a+")  # noqa: SIM115 (open as long as the lock is held)
        try:
            self._take()
        except BaseException:
            self._file.close()
            raise
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lock", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Leave the file without an owner."""
        self._ended.set()
        self._thread.join()
        with suppress(OSError):
            if self.thief is None:
                self._file.truncate(0)
            self._file.close()

    def _take(self) -> None:
        locks = True
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise self._in_use(_read(self._file)) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            locks = False
        owner = _read(self._file)
        if owner and self._lives(owner, locks):
            raise self._in_use(owner)
        since = datetime.now().isoformat(" ", "seconds")
        me = {"host": socket.gethostname(), "pid": os.getpid(), "since": since, "born": _born(os.getpid())}
        self._text = json.dumps(me) + "\n"
        self._file.truncate(0)
        self._file.write(self._text)
        self._file.flush()
        if not locks:
            print(f"{self.run}: its file system has no locks; a file's time is used instead", file=sys.stderr)
            time.sleep(SETTLE)
            if thief := self._other():
                raise self._in_use(thief)

    def _lives(self, owner: dict[str, Any], locks: bool) -> bool:
        """Whether the process that wrote itself into the file is at work."""
        if owner["host"] == socket.gethostname():
            return not locks and _born(owner["pid"]) is not None and _born(owner["pid"]) == owner.get("born")
        beat = os.fstat(self._file.fileno()).st_mtime_ns
        left = STALE - (self._now() - beat) / 1e9
        if left > 0:
            print(
                f"{self.run}: {_who(owner)} may train there; a sign of it is waited for, {left:.0f} s", file=sys.stderr
            )
        deadline = time.monotonic() + left
        while time.monotonic() < deadline:
            time.sleep(min(1.0, STALE / 10))
            with open(self._path) as file:  # opened anew: file systems of a network look at the time then
                if os.fstat(file.fileno()).st_mtime_ns != beat:
                    return True
        return False

    def _now(self) -> int:
        """The time by the clock that the file system gives its files, nanoseconds."""
        probe = self._path.with_name(f".lock.{os.getpid()}")
        try:
            probe.touch()
            return probe.stat().st_mtime_ns
        finally:
            probe.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._ended.wait(BEAT):
            try:
                if thief := self._other():
                    self.thief = _who(thief)
                    return
                os.utime(self._file.fileno())
            except OSError:  # of the storage: the run itself will say so
                continue

    def _other(self) -> dict[str, Any] | None:
        """Who else is written in the file."""
        try:
            with open(self._path) as file:
                text = file.read()
        except FileNotFoundError:
            return None
        return None if text == self._text else _parse(text)

    def _in_use(self, owner: dict[str, Any] | None) -> FolderInUse:
        return FolderInUse(f"{self.run}: {_who(owner)} trains there; wait for it, stop it, or set another name")


_held: list[Lock] = []


def _read(file: TextIO) -> dict[str, Any] | None:
    file.seek(0)
    return _parse(file.read())


def _parse(text: str) -> dict[str, Any] | None:
    """The owner that a lock file names, None where it names none."""
    try:
        owner = json.loads(text)
        return owner if {"host", "pid", "since"} <= owner.keys() else None
    except (ValueError, AttributeError):
        return None


def _who(owner: dict[str, Any] | None) -> str:
    if owner is None:
        return "another process"
    return f"process {owner['pid']} on {owner['host']}, since {owner['since']},"


def _born(process: int) -> str | None:
    """When a process of this machine was started, in the kernel's count; None where it is gone."""
    try:
        with open(f"/proc/{process}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[19].decode()
    except (OSError, IndexError):
        return None
