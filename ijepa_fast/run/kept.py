"""What a method computes once of every crop of every image, before training, and reads in every step.

Such as a frozen teacher's targets. They lie in a folder, memory-mapped, for this run, its resumes and others that would
compute the same.

It is exact because the crops are few: `data.crops_per_image` of an image, which follow from the seed and its number.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ijepa_fast.config import Config, ConfigError, flatten, is_fixed
from ijepa_fast.data.crops import crop_keys
from ijepa_fast.data.importing import is_code
from ijepa_fast.data.order import SampleStream
from ijepa_fast.data.sources import Source
from ijepa_fast.engine.engine import DTYPES
from ijepa_fast.files import draft_of, publish
from ijepa_fast.masks.draw import Draw
from ijepa_fast.methods.method import Method
from ijepa_fast.run import pulse
from ijepa_fast.run.build import build_loader, micro_batch
from ijepa_fast.run.sources import contents, identity
from ijepa_fast.run.together import on_first, together

VALUES, WRITTEN, MADE_OF = "values", "written", "made_of.json"  # a row, and a byte, of each crop; see `_made_of`
IMAGES, SOURCE = "the images", "data.source"  # of MADE_OF: what they are, and where they were, which may change
# Of the section `data` what changes no pixel of a crop, or is told by the images' identity and by which are written.
UNREAD = (SOURCE, "data.where", "data.channel_names", "data.max_pixels")
UNABLE = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)  # of file systems that reserve no room


def kept_values(
    config: Config, method: Method, source: Source | None, device: torch.device, rank: int, ranks: int
) -> Callable[[Any, np.ndarray], Draw] | None:
    """What adds to a draw what is kept of its images, by their crop keys; None where the method keeps nothing.

    Called by every rank, when the networks are on the device; what is not there yet is computed first. Raises
    ConfigError for a folder that holds something else, has no room or cannot be written; what is returned raises it for
    an image that was not there or not usable when they were computed.
    """
    if method.kept_in is None:
        return None
    key = f"objective.options.{method.kept_in[0]}"
    if source is None:
        raise ConfigError(f"{key}: data.source={config.data.source} has no images to compute it of; set it to null")
    folder, dtype = Path(method.kept_in[1]), DTYPES[config.engine.precision]
    shape = (len(source) * config.data.crops_per_image, *method.kept_shape)
    made_of = on_first(partial(_made_of, key, config, method, source))
    held: list[torch.Tensor] = []

    def open_all() -> None:
        held.append(_mapped(key, folder, VALUES, shape, dtype))
        held.append(_mapped(key, folder, WRITTEN, shape[:1], torch.uint8))

    with ExitStack() as stack:  # of rank 0, which publishes the folder when it is closed
        began = time.perf_counter()
        if not on_first(partial(_begin, key, stack, folder, made_of, shape, dtype)):
            together(partial(_fill, key, draft_of(folder), shape, dtype, config, method, source, device, rank, ranks))
            on_first(partial(_end, key, draft_of(folder), made_of, began))
        on_first(partial(_close, key, folder, stack))
    together(open_all)

    def recall(draw: Any, keys: np.ndarray) -> Draw:
        values, written = held
        rows = torch.from_numpy(keys)
        if not written[rows].all():
            lacking = int(rows[written[rows] == 0][0]) // config.data.crops_per_image
            raise ConfigError(
                f"{key}: {folder} has no targets of {source.name(lacking)}, which could not be used when they were "
                f"computed, as it was damaged or over data.max_pixels; remove the folder, so that they are computed "
                f"again, or name another"
            )
        added: Draw = method.recall(draw, values, rows)
        return added.pin_memory() if device.type == "cuda" else added

    return recall


def _made_of(key: str, config: Config, method: Method, source: Source) -> dict[str, Any]:
    """All that the values follow from, by what messages call it, as JSON has it; and where the images are.

    Raises ConfigError for a data set whose items are others whenever they are read.
    """
    images = (identity(source) or {}) | {"contents": contents(source)}
    if is_code(config.data.source) and contents(source) != images["contents"]:
        raise ConfigError(
            f"{key}: the items of data.source={config.data.source} have other pixels whenever they are read, and what "
            f"is kept would be of one reading; take what is random out of the data set, or set it to null"
        )
    settings = {name: value for name, value in flatten(config).items() if name.startswith("data.") and is_fixed(name)}
    found: dict[str, Any] = {IMAGES: images, SOURCE: config.data.source}
    found |= {"seed": config.seed, "model.patch": config.model.patch}
    found |= {name: value for name, value in settings.items() if name not in UNREAD}
    found |= {"engine.precision": config.engine.precision} | method.keeps()
    plain: dict[str, Any] = json.loads(json.dumps(found))
    return plain


@contextmanager
def _on_disk(key: str, folder: Path) -> Iterator[None]:
    """What the file system refuses becomes one sentence."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"{key}: {folder}: {error.strerror or error}; name a folder that can be written and has room, or set it to "
            f"null"
        ) from None


def _begin(
    key: str, stack: ExitStack, folder: Path, made_of: dict[str, Any], shape: tuple[int, ...], dtype: torch.dtype
) -> bool:
    """Whether the values are there. Where not, a draft of their size is begun, which `stack` publishes."""
    with _on_disk(key, folder):
        if folder.exists():  # looked for without a lock, for which its disk may be read-only
            _check(key, folder, made_of)
            return True
        draft = stack.enter_context(publish(folder, lock=True, durable=True))
        if folder.exists():
            _check(key, folder, made_of)
            return True
        needed, free = math.prod(shape) * dtype.itemsize, shutil.disk_usage(folder.parent).free
        if needed > free:
            raise ConfigError(
                f"{key}: {folder} would take {needed / 1e9:.1f} GB, of {shape[0]:,} crops, and has room for "
                f"{free / 1e9:.1f}; name another folder, lower data.crops_per_image, or set it to null"
            )
        draft.mkdir()
        _reserve(draft / VALUES, needed)
        _reserve(draft / WRITTEN, shape[0])
    print(f"{key}: computing {needed / 1e9:.2f} GB of {shape[0]:,} crops into {folder}", file=sys.stderr)
    return False


def _reserve(path: Path, size: int) -> None:
    """A file of `size` zero bytes that have their room on the disk, where the file system can promise it."""
    with open(path, "wb") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            if error.errno not in UNABLE:
                raise
            file.truncate(size)


def _end(key: str, draft: Path, made_of: dict[str, Any], began: float) -> None:
    with _on_disk(key, draft):
        (draft / MADE_OF).write_text(json.dumps(made_of, indent=1), encoding="utf-8")
    print(f"{key}: computed in {time.perf_counter() - began:.0f} s", file=sys.stderr)


def _close(key: str, folder: Path, stack: ExitStack) -> None:
    with _on_disk(key, folder):
        stack.close()


def _check(key: str, folder: Path, made_of: dict[str, Any]) -> None:
    """ConfigError unless `folder` holds what `made_of` says."""
    there: Any = None
    with suppress(OSError, ValueError):
        there = json.loads((folder / MADE_OF).read_text(encoding="utf-8"))
    if not isinstance(there, dict) or not isinstance(there.get(IMAGES), dict) or not (folder / WRITTEN).is_file():
        raise ConfigError(f"{key}: {folder} exists and holds no kept targets; name another folder")
    if there[IMAGES] != made_of[IMAGES]:
        theirs, ours = (f"{made[IMAGES].get('images')} of {made.get(SOURCE)}" for made in (there, made_of))
        changed = ", whose names or contents have changed" if theirs == ours else ""
        raise ConfigError(
            f"{key}: {folder} was made of other images ({theirs}) than this run's ({ours}{changed}); name another "
            f"folder"
        )
    for name in [*made_of, *(there.keys() - made_of.keys())]:
        if name != SOURCE and there.get(name) != made_of.get(name):
            raise ConfigError(
                f"{key}: {folder} was made with another {name}, {there.get(name)}, and this run has "
                f"{made_of.get(name)}; name another folder"
            )


def _check_size(key: str, path: Path, size: int) -> None:
    """ConfigError unless `path` is a file of `size` bytes."""
    if not path.is_file() or path.stat().st_size != size:
        raise ConfigError(
            f"{key}: {path}: expected a file of {size} bytes, which all machines see; remove the folder, and name one "
            f"that they share"
        )


def _mapped(key: str, folder: Path, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """The file `name`, mapped into memory to be read; only so may it be larger than memory."""
    with _on_disk(key, folder):
        _check_size(key, folder / name, math.prod(shape) * dtype.itemsize)
        raw = np.memmap(folder / name, np.uint8, "r")
    with warnings.catch_warnings(action="ignore"):  # torch warns of memory that must not be written
        return torch.from_numpy(raw).view(dtype).view(shape)


def _write(descriptor: int, data: memoryview, place: int) -> None:
    while data:
        count = os.pwrite(descriptor, data, place)
        data, place = data[count:], place + count


@torch.no_grad()
def _fill(
    key: str,
    draft: Path,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    config: Config,
    method: Method,
    source: Source,
    device: torch.device,
    rank: int,
    ranks: int,
) -> None:
    """Write this rank's part of the values: of the batches that training would see, each crop once.

    A sample that stands in for a bad file is left to its own place, so that a value does not depend on who meets it.
    """
    size, per_image, total = micro_batch(config, ranks), config.data.crops_per_image, shape[0]
    width = math.prod(shape[1:]) * dtype.itemsize
    stream = SampleStream(len(source), config.seed, source.groups)
    with ExitStack() as stack:
        # Not mapped: rows of two machines may share a page, and a page that one of them writes back is whole. A disk
        # that is full is an error here, and a signal there.
        files = []
        for name, length in ((VALUES, total * width), (WRITTEN, total)):
            with _on_disk(key, draft):
                _check_size(key, draft / name, length)
                files.append(os.open(draft / name, os.O_WRONLY | os.O_CLOEXEC))
            stack.callback(os.close, files[-1])
        loader = build_loader(config, method, source, device, rank, ranks, draws=False, beside=lambda _, keys: keys)
        stack.enter_context(closing(loader))
        for first in range(rank * size, total + rank * size, ranks * size):
            pulse.at(0, "computing what is kept")
            batch, positions = next(loader), np.arange(first, first + size)
            own = crop_keys(positions, stream[positions], len(source), per_image)
            assert isinstance(batch.images, torch.Tensor)
            kept = method.keep(batch.images).to(dtype).cpu().reshape(size, -1).contiguous().view(torch.uint8).numpy()
            with _on_disk(key, draft):
                for row in np.flatnonzero((own == batch.draw) & (positions < total)):
                    _write(files[0], kept[row].data, int(own[row]) * width)
                    _write(files[1], memoryview(b"\1"), int(own[row]))
        with _on_disk(key, draft):
            for file in files:
                os.fsync(file)  # here, as another machine's flush does not reach what this one holds
