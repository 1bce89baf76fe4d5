"""One training at a time in a run's folder."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from datetime import datetime
from pathlib import Path
from typing import TextIO

from ijepa_fast.run.together import on_first


class FolderInUse(ValueError):
    """Another process trains in the run's folder; the message says which, where and since when."""


def hold(folder: Path) -> TextIO | None:
    """Hold the run's folder until the file that rank 0 gets is closed or its process ends. Called by every rank.

    The lock is the kernel's (flock), so that a killed process leaves none. Raises FolderInUse, OSError on all ranks.
    """
    held: list[TextIO] = []
    on_first(lambda: held.append(_take(folder / "checkpoints" / ".lock")))
    return held[0] if held else None


def leave(folder: Path) -> None:
    """Remove the folder of a run that cannot begin, where it has nothing but its lock. Called by who holds it."""
    checkpoints = folder / "checkpoints"
    if [path.name for path in folder.iterdir()] == ["checkpoints"] and len(list(checkpoints.iterdir())) == 1:
        (checkpoints / ".lock").unlink(missing_ok=True)
        checkpoints.rmdir()
        folder.rmdir()


def _take(path: Path) -> TextIO:
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "a+")  # noqa: SIM115 (open as long as the lock is held)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        who = _who(file.read())
        file.close()
        run = path.parents[1]
        raise FolderInUse(f"{run}: {who} trains there; wait for it, stop it, or set another name") from None
    file.truncate(0)
    since = datetime.now().isoformat(" ", "seconds")
    file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": since}) + "\n")
    file.flush()
    return file


def _who(held: str) -> str:
    try:
        owner = json.loads(held)
        return f"process {owner['pid']} on {owner['host']}, since {owner['since']},"
    except (ValueError, KeyError, TypeError):
        return "another process"
