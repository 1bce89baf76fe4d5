"""Files and folders that are complete whenever they are there: written under another name, then renamed."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path


def draft_of(path: Path) -> Path:
    """Where `publish` has the contents of `path` written: a hidden name beside it."""
    return path.with_name(f".{path.name}.draft")


@contextmanager
def publish(path: str | Path, *, lock: bool = False, durable: bool = False) -> Iterator[Path]:
    """A draft to write, as a file or a folder; at the block's end it is renamed to `path`, and replaces what was there.

    An exception in the block removes the draft and leaves `path` as it was. A block that writes no draft changes
    nothing. A draft that a killed process left is removed first.

    lock: one process at a time; those that come later wait, and see in the block whether `path` is there by then.
    Without it the caller sees to it that nobody else writes `path`. durable: flushed to disk before the rename and
    after, so that the loss of power leaves the old contents or the new.
    """
    path = Path(path)
    draft = draft_of(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.with_name(f".{path.name}.lock")) if lock else nullcontext():
        _remove(draft)
        try:
            yield draft
            if draft.exists():
                if durable:
                    for written in [*draft.rglob("*"), draft]:
                        _flush(written)
                if path.is_dir():  # which a rename would not replace
                    shutil.rmtree(path)
                draft.replace(path)
                if durable:
                    _flush(path.parent)
        finally:
            _remove(draft)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path`, which is gone afterwards."""
    while True:
        with open(path, "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not _is_at(path, file.fileno()):  # removed by the process that held it: nobody else can wait for it
                continue
            try:
                yield
            finally:
                path.unlink()
            return


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
