"""What a method computes once of every crop of every image, before training, and reads in every step.

Such as a frozen teacher's targets. They lie in a folder, memory-mapped, for this run, its resumes and others that would
compute the same.

It is exact because the crops are few: `data.crops_per_image` of an image, which follow from the seed and its number.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ijepa_fast.config import Config, ConfigError, flatten, is_fixed
from ijepa_fast.data.crops import crop_keys
from ijepa_fast.data.order import SampleStream
from ijepa_fast.data.sources import Source
from ijepa_fast.engine.engine import DTYPES
from ijepa_fast.files import draft_of, publish
from ijepa_fast.masks.draw import Draw
from ijepa_fast.methods.method import Method
from ijepa_fast.run import pulse
from ijepa_fast.run.build import build_loader, micro_batch
from ijepa_fast.run.sources import identity
from ijepa_fast.run.together import on_first, together

VALUES, MADE_OF = "values", "made_of.json"
# Of the section `data` what changes no pixel of a crop, or is told by the images' identity.
UNREAD = ("data.source", "data.where", "data.channel_names", "data.max_pixels")


def kept_values(
    config: Config, method: Method, source: Source | None, device: torch.device, rank: int, ranks: int
) -> Callable[[Any, np.ndarray], Draw] | None:
    """What adds to a draw what is kept of its images, by their crop keys; None where the method keeps nothing.

    Called by every rank, when the networks are on the device; what is not there yet is computed first. Raises
    ConfigError for a folder that holds something else, or that has no room.
    """
    if method.kept_in is None:
        return None
    key = f"objective.options.{method.kept_in[0]}"
    if source is None:
        raise ConfigError(f"{key}: data.source={config.data.source} has no images to compute it of; set it to null")
    folder, dtype = Path(method.kept_in[1]).expanduser(), DTYPES[config.engine.precision]
    shape = (len(source) * config.data.crops_per_image, *method.kept_shape)
    made_of = json.loads(json.dumps(_made_of(config, method, source)))
    held: list[torch.Tensor] = []

    def fill() -> None:
        values = _mapped(key, draft_of(folder), shape, dtype, shared=True)
        _fill(values, config, method, source, device, rank, ranks)

    with ExitStack() as stack:  # of rank 0, which publishes the folder when it is closed
        began = time.perf_counter()
        if not on_first(partial(_begin, key, stack, folder, made_of, shape, dtype)):
            together(fill)
            on_first(partial(_end, key, draft_of(folder), made_of, began))
        on_first(stack.close)
    together(lambda: held.append(_mapped(key, folder, shape, dtype)))

    def recall(draw: Any, keys: np.ndarray) -> Draw:
        added: Draw = method.recall(draw, held[0], torch.from_numpy(keys))
        return added.pin_memory() if device.type == "cuda" else added

    return recall


def _made_of(config: Config, method: Method, source: Source) -> dict[str, Any]:
    """All that the values follow from, by what messages call it."""
    settings = {name: value for name, value in flatten(config).items() if name.startswith("data.") and is_fixed(name)}
    found: dict[str, Any] = {"the images": identity(source), "seed": config.seed, "model.patch": config.model.patch}
    found |= {name: value for name, value in settings.items() if name not in UNREAD}
    return found | {"engine.precision": config.engine.precision} | method.keeps()


def _begin(
    key: str, stack: ExitStack, folder: Path, made_of: dict[str, Any], shape: tuple[int, ...], dtype: torch.dtype
) -> bool:
    """Whether the values are there. Where not, a draft of their size is begun, which `stack` publishes."""
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
    with open(draft / VALUES, "wb") as file:
        file.truncate(needed)
    print(f"{key}: computing {needed / 1e9:.2f} GB of {shape[0]:,} crops into {folder}", file=sys.stderr)
    return False


def _end(key: str, draft: Path, made_of: dict[str, Any], began: float) -> None:
    (draft / MADE_OF).write_text(json.dumps(made_of, indent=1), encoding="utf-8")
    print(f"{key}: computed in {time.perf_counter() - began:.0f} s", file=sys.stderr)


def _check(key: str, folder: Path, made_of: dict[str, Any]) -> None:
    """ConfigError unless `folder` holds what `made_of` says."""
    try:
        there = json.loads((folder / MADE_OF).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ConfigError(f"{key}: {folder} exists and holds no kept targets; name another folder") from None
    for name in [*made_of, *(there.keys() - made_of.keys())]:
        if there.get(name) != made_of.get(name):
            raise ConfigError(
                f"{key}: {folder} was made with another {name}, {there.get(name)}, and this run has "
                f"{made_of.get(name)}; name another folder"
            )


def _mapped(key: str, folder: Path, shape: tuple[int, ...], dtype: torch.dtype, shared: bool = False) -> torch.Tensor:
    """The values, mapped into memory. shared: what is written to them is written to the file."""
    path, count = folder / VALUES, math.prod(shape)
    if not path.is_file() or path.stat().st_size != count * dtype.itemsize:
        raise ConfigError(
            f"{key}: {path}: expected a file of {count * dtype.itemsize} bytes, which all machines see; remove the "
            f"folder, and name one that they share"
        )
    return torch.from_file(str(path), shared=shared, size=count, dtype=dtype).view(shape)


@torch.no_grad()
def _fill(
    values: torch.Tensor,
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
    size, per_image, total = micro_batch(config, ranks), config.data.crops_per_image, len(values)
    stream = SampleStream(len(source), config.seed, source.groups)
    loader = build_loader(config, method, source, device, rank, ranks, draws=False, beside=lambda _, keys: keys)
    with closing(loader):
        for first in range(rank * size, total + rank * size, ranks * size):
            pulse.at(0, "computing what is kept")
            batch, positions = next(loader), np.arange(first, first + size)
            own = crop_keys(positions, stream[positions], len(source), per_image)
            rows = torch.from_numpy((own == batch.draw) & (positions < total))
            assert isinstance(batch.images, torch.Tensor)
            values[torch.from_numpy(own)[rows]] = method.keep(batch.images).cpu()[rows]
