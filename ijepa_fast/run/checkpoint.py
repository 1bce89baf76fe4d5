"""Checkpoints: atomic, written in parallel by all ranks, readable under another ZeRO stage or number of ranks.

    checkpoints/step-00000500/
        rank-00000.safetensors   this rank's fragments of weights, moments and EMA: "<parameter>|<key>|<first element>",
                                 and in the first one, whole, what the method carries: "<name>|carried|0"
        weights.safetensors      every network and its average, whole, fp32, under the published names
        state.json               step, images seen, shapes, configuration, data, size and digest of every file

A folder is written under another name, flushed to disk and renamed: a kill at any moment leaves the last one good.
run/recover.py chooses the one to go on from, and verifies it.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open

from ijepa_fast import config
from ijepa_fast.config import is_fixed, present
from ijepa_fast.engine.engine import Engine
from ijepa_fast.engine.optim import STATES
from ijepa_fast.engine.partitions import Partition
from ijepa_fast.files import draft_of, publish
from ijepa_fast.interop.tensors import write_tensors
from ijepa_fast.interop.weights import Arch, checkpoints, header, position_key, step_of, today
from ijepa_fast.models.vit import Encoder
from ijepa_fast.run.digests import is_sealed, seal
from ijepa_fast.run.together import on_first, together

T = TypeVar("T")
FORMAT = 4
# Those that are read: the first had no digests, the first two were of runs that drew masks by rank, the first three of
# runs that had one batch size.
FORMATS = (1, 2, 3, 4)
KEYS = {"step": int, "shapes": dict, "config": dict}  # of every state.json
WHOLE = "weights.safetensors"


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or does not fit the run; the message names what and what to do."""


class Damaged(CheckpointError):
    """A checkpoint that is not what was written."""


@dataclass(frozen=True)
class Snapshot:
    """What a rank has to write of the state after `step` steps, in host memory that nothing else changes."""

    step: int
    tensors: dict[str, torch.Tensor]  # of this rank's file, flat; none where it has no file
    positions: dict[str, torch.Tensor]  # position tables (1, N, width) by name; of rank 0
    shapes: dict[str, tuple[int, ...]]  # of all parameters
    averaged: frozenset[str]  # networks that have an average

    @property
    def size(self) -> int:
        """Bytes of the whole checkpoint, but for headers: fragments and whole weights, all in fp32."""
        sizes = {name: 4 * torch.Size(shape).numel() for name, shape in self.shapes.items()}
        return sum(size * (6 if name.partition(".")[0] in self.averaged else 4) for name, size in sizes.items())


def snapshot(engine: Engine, step: int) -> Snapshot:
    """Copy this rank's share of the state to host memory, and what the method carries on rank 0."""
    rank, tensors = torch.distributed.get_rank(), {}
    for partition in engine.layout.partitions if rank == 0 or not engine.layout.replicated else ():
        engine.optimizer.init_state(partition.master, partition.ema)
        for key in _keys(partition):
            flat = _copy(partition_tensor(engine, partition, key).reshape(-1))
            for f in partition.fragments:
                tensors[f"{f.name}|{key}|{f.start}"] = flat[f.offset : f.offset + f.stop - f.start]
    positions = {}
    if rank == 0:
        tensors |= {f"{name}|carried|0": _copy(tensor.reshape(-1)) for name, tensor in engine.method.carried.items()}
        tables = engine.positions.items()
        positions = {f"{name}.{position_key(name)}": _copy(table)[None] for name, table in tables}
    return Snapshot(step, tensors, positions, engine.shapes, frozenset(engine.method.averaged))


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True)


def write(
    folder: Path,
    taken: Snapshot,
    images: int,
    settings: Mapping[str, Any],
    arch: Arch,
    keep: int,
    keep_every: int = 0,
    data: Mapping[str, Any] | None = None,
    group: Any = None,
) -> Path:
    """Write a checkpoint and remove old ones. Called by every rank.

    folder: the run's. taken: by each rank, after the same step. images: seen until then, each as often as it was seen.
    settings: the run's flattened configuration. arch: of its encoder. keep: the newest that stay. keep_every: every
    checkpoint of a multiple of so many steps stays too; 0: none. data: what the run trains on (run/sources.py). group:
    of all ranks, on the host, where the default one is in use meanwhile. Raises CheckpointError on all ranks where one
    cannot write; earlier checkpoints stay as they are.
    """
    final = folder / "checkpoints" / f"step-{taken.step:08d}"
    draft = draft_of(final)
    with ExitStack() as stack:

        def begin() -> None:
            _check_room(folder, taken.size)
            stack.enter_context(publish(final, durable=True)).mkdir()

        def finish() -> None:
            files[WHOLE] = write_tensors(draft / WHOLE, _whole_weights(draft, taken), header(arch))
            state = {"format": FORMAT, "step": taken.step, "images": images, "shapes": taken.shapes}
            state |= {"config": dict(settings), "data": data, "files": files}
            (draft / "state.json").write_text(seal(state))
            stack.close()  # flushed and renamed

        def tidy() -> None:
            try:
                prune(folder, keep, keep_every)
            except OSError as error:
                raise CheckpointError(
                    f"{final} is written, but an older checkpoint cannot be removed: {error}; see that it can be, and "
                    f"start the same command again"
                ) from None

        def mended(work: Callable[[], T]) -> Callable[[], T]:
            return lambda: _said(work, folder, final, taken.size)

        on_first(mended(begin), group)
        written = together(mended(lambda: _write_fragments(draft, taken)), group)
        files = {name: known for ranks in written for name, known in ranks.items()}
        on_first(mended(finish), group)
        on_first(tidy, group)
    return final


def _said(work: Callable[[], T], folder: Path, final: Path, needed: int) -> T:
    """What `work` returns. What it raises, whatever that is, becomes a CheckpointError that all ranks can be given."""
    try:
        return work()
    except Exception as error:
        why, full = f"{type(error).__name__}: {error}", False
        if isinstance(error, OSError):
            why, full = error.strerror or why, error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        by = f" by rank {torch.distributed.get_rank()}" if torch.distributed.get_world_size() > 1 else ""
        try:
            free = f"{_free(folder):,} free"
        except OSError:
            free = "how many are free cannot be told"
        raise CheckpointError(
            f"{final} cannot be written{by}: {why} ({needed:,} bytes needed, {free}); earlier checkpoints are "
            f"intact: {'make room there' if full else 'see that it can be written'}, and start the same command again"
        ) from None


def prune(folder: Path, keep: int, keep_every: int) -> None:
    """Remove all but the newest `keep` checkpoints and those of a multiple of `keep_every` steps."""
    for path in checkpoints(folder)[:-keep]:
        if not (path.is_symlink() or (keep_every and step_of(path) % keep_every == 0)):
            shutil.rmtree(path.rename(path.with_name(f".{path.name}.removed")))


def clear(folder: Path) -> None:
    """Remove what a process left that was killed while it wrote or removed a checkpoint."""
    for path in (folder / "checkpoints").glob(".step-*"):
        if re.fullmatch(r"\.step-[0-9]{8,}\.(draft|removed)", path.name):
            shutil.rmtree(path)


def _free(folder: Path) -> int:
    """Bytes free for this user on the file system of `folder`."""
    status = _file_system(folder)
    return status.f_bavail * status.f_frsize


def _file_system(folder: Path) -> os.statvfs_result:
    while not folder.exists():
        folder = folder.parent
    return os.statvfs(folder)


def _check_room(folder: Path, needed: int) -> None:
    if _free(folder) < needed:
        raise OSError(errno.ENOSPC, "No space left on device")
    status, files = _file_system(folder), torch.distributed.get_world_size() + 3
    if status.f_files and status.f_favail < files:  # some file systems count none
        raise OSError(errno.ENOSPC, f"No inodes left on device ({files} needed, {status.f_favail} free)")


def load(
    path: Path, engine: Engine, settings: Mapping[str, Any], data: Mapping[str, Any] | None = None
) -> tuple[int, int, dict[str, tuple[Any, Any]]]:
    """Bring `engine` to the state in `path`. Raises CheckpointError before anything is changed.

    settings: the flattened configuration of the run that goes on. data: what it trains on. What is read is taken for
    verified. Returns the step, the images seen until then, and the settings of training that have another value now:
    {key: (then, now)}.
    """
    state = read_state(path)
    then, now = present(state["config"]), json.loads(json.dumps(dict(settings)))
    changed = _check_settings(path, then, now, check_data(path, state.get("data"), data, now))
    images = state["images"] if "images" in state else state["step"] * then["batch_size"]
    _check_batch(path, images, now, images if data is None else data["images"])
    names = {name: today(name, engine.method.former_names) for name in state["shapes"]}
    shapes = {names[name]: shape for name, shape in state["shapes"].items()}
    ours = {name: list(shape) for name, shape in engine.shapes.items()}
    for name in sorted(ours.keys() | shapes.keys()):
        if ours.get(name) != shapes.get(name):
            raise CheckpointError(
                f"{path}: parameter {name} has shape {shapes.get(name)} there, {ours.get(name)} in this model"
            )
    reader = _Reader(path, names)
    for partition in engine.layout.partitions:
        reader.check(partition)
    carried = {name: reader.read(name, "carried", tensor.shape) for name, tensor in engine.method.carried.items()}
    engine.place(_positions(path, engine))
    for partition in engine.layout.partitions:
        optimizer_state = engine.optimizer.init_state(partition.master, partition.ema)
        optimizer_state["step"] = state["step"]
        for key in _keys(partition):
            reader.fill(partition, key, partition_tensor(engine, partition, key))
    for name, tensor in carried.items():
        engine.method.carried[name].copy_(tensor)
    engine.restored()
    return state["step"], images, changed


def _check_batch(path: Path, images: int, settings: Mapping[str, Any], most: int) -> None:
    """CheckpointError unless `images` seen are whole steps of the run's batch size, which is at most `most`."""
    batch, parts = settings["batch_size"], torch.distributed.get_world_size() * settings["engine.accumulation"]
    if images % batch == 0:
        return
    below = (size for size in range(batch - 1, 0, -1) if images % size == 0 == size % parts)
    above = (size for size in range(batch + 1, most + 1) if images % size == 0 == size % parts)
    nearest = " or ".join(str(size) for size in (next(below, None), next(above, None)) if size is not None)
    advice = (
        f"batch_size={nearest}, the nearest that fit"
        if nearest
        else f"fewer ranks or less accumulation: no multiple of {parts} fits"
    )
    raise CheckpointError(
        f"{path}: the run has seen {images:,} images, which are no whole number of steps of batch_size={batch}; set "
        f"{advice}"
    )


def check_data(
    path: Path, then: Mapping[str, Any] | None, now: Mapping[str, Any] | None, settings: Mapping[str, Any]
) -> bool:
    """Whether the images are known to be those that the run began with; CheckpointError where they are known not to be.

    They may lie at another place then. data.changed=accept lets others pass.
    """
    if then is None or now is None:
        return False
    if then != now and settings["data.changed"] != "accept":
        counts = then["images"], now["images"]
        what = f"{counts[0]:,} images -> {counts[1]:,}" if counts[0] != counts[1] else "as many images, other names"
        raise CheckpointError(
            f"{path}: data.source={settings['data.source']} is not what the run began with ({what}); restore it, "
            f"set another name, or go on with data.changed=accept: order and epochs are then those of the new images"
        )
    return True


def _check_settings(
    path: Path, then: Mapping[str, Any], now: Mapping[str, Any], same_data: bool
) -> dict[str, tuple[Any, Any]]:
    """Settings of training that have another value now; CheckpointError where one of them is fixed.

    same_data: the images are known, so that they may lie elsewhere.
    """
    methods = then.get("objective.method"), now["objective.method"]
    if methods[0] not in (None, methods[1]):
        raise CheckpointError(
            f"{path} is a checkpoint of objective.method={methods[0]}, this run has {methods[1]}; set another name, or "
            f"objective.method={methods[0]}"
        )
    changed = [
        f"{key}: {json.dumps(then.get(key))} -> {json.dumps(value)}"
        for key, value in now.items()
        if is_fixed(key) and then.get(key, value) != value and not (same_data and key == "data.source")
    ]
    if changed:
        raise CheckpointError(
            f"{path} was written by another run ({'; '.join(changed)}); restore these keys, or set another name"
        )
    return {
        key: (then[key], value)
        for key, value in now.items()
        if key.startswith(("batch_size", "optim.", "engine.", "data.source")) and key in then and then[key] != value
    }


def read_state(path: Path) -> dict[str, Any]:
    """The state.json of a checkpoint. Raises Damaged where it is not what was written, CheckpointError for another
    format.
    """
    try:
        state = json.loads((path / "state.json").read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise Damaged(f"{path}: no readable state.json ({error}); is it a checkpoint folder?") from None
    if not isinstance(state, dict) or "format" not in state:
        raise Damaged(f"{path}: state.json does not say its format")
    # First of all, as what says that there are no digests may itself be damaged.
    if (state["format"] != 1 or "sha256" in state) and not is_sealed(state):
        raise Damaged(f"{path}: state.json is not what was written (sha256 differs)")
    if state["format"] not in FORMATS:
        raise CheckpointError(f"{path}: format {state['format']}, this version reads {FORMATS}")
    needed = KEYS | ({"files": dict} if state["format"] > 1 else {}) | ({"images": int} if state["format"] > 3 else {})
    if missing := sorted(key for key, kind in needed.items() if not isinstance(state.get(key), kind)):
        raise Damaged(f"{path}: state.json has no {', '.join(missing)}")
    if path.name.startswith("step-") and path.name != f"step-{state['step']:08d}":
        raise Damaged(f"{path}: state.json is of step {state['step']}")
    return state


def architecture(encoder: Encoder, model: config.Model, data: config.Data, method: str, step: int) -> Arch:
    """What is needed to rebuild the encoders of a run from weights.safetensors. method: objective.method."""
    return Arch(
        image_size=data.crop if isinstance(data.crop, int) else data.size,
        patch=model.patch,
        dim=model.dim,
        depth=model.depth,
        heads=model.heads,
        mlp_ratio=model.mlp_ratio,
        predictor_dim=model.predictor_dim,
        predictor_depth=model.predictor_depth,
        mean=tuple(data.mean),
        std=tuple(data.std),
        interpolation=data.interpolation,
        step=step,
        method=method,
        class_token=encoder.cls_token is not None,
        learned_positions=encoder.pos_embed is not None,
        mask_token=encoder.masked_embed is not None,
        readout=encoder.readout,
        **encoder.kind,
        stretch=data.stretch,
        low=data.pixels.low,
        high=data.pixels.high,
        channel_names=data.pixels.names,
        reading=replace(data.reading, where=None, depth="uint8" if data.depth == "auto" else data.depth),
    )


def _keys(partition: Partition) -> list[str]:
    return ["weight", *(key for key in STATES if key != "ema" or partition.ema)]


def partition_tensor(engine: Engine, partition: Partition, key: str) -> torch.Tensor:
    """This rank's flat part of the weights, of their average or of a moment, by `key`."""
    return partition.master.data if key == "weight" else engine.optimizer.state[partition.master][key]


def _write_fragments(draft: Path, taken: Snapshot) -> dict[str, dict[str, Any]]:
    """Write this rank's file, where it has one: {its name: size and digest}."""
    if not taken.tensors:
        return {}
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    name = f"rank-{rank:05d}.safetensors"
    metadata = {"step": str(taken.step), "rank": f"{rank} of {ranks}"}
    return {name: write_tensors(draft / name, taken.tensors, metadata)}


def _whole_weights(folder: Path, taken: Snapshot) -> dict[str, torch.Tensor]:
    reader, out = _Reader(folder), {}
    for name, shape in taken.shapes.items():
        out[name] = reader.read(name, "weight", shape)
        if name.partition(".")[0] in taken.averaged:
            out["target_" + name] = reader.read(name, "ema", shape)
    return out | taken.positions


def _positions(path: Path, engine: Engine) -> dict[str, torch.Tensor]:
    """The fixed position tables (N, width) of a checkpoint, by network; none in one that has the usual ones."""
    if not (path / WHOLE).is_file():
        raise CheckpointError(f"{path}: weights.safetensors is missing; go back to another checkpoint")
    with safe_open(path / WHOLE, "pt") as file:
        held = set(file.keys())
        keys = {name: f"{name}.{position_key(name)}" for name in engine.positions}
        return {name: file.get_tensor(key)[0] for name, key in keys.items() if key in held}


class _Reader:
    """Reads elements of a parameter from the fragments of all ranks."""

    def __init__(self, folder: Path, names: Mapping[str, str] | None = None):
        """names: today's name of each parameter, where some have another in the files."""
        self._folder = folder
        self._files = []
        for path in sorted(folder.glob("rank-*.safetensors")):
            if not re.fullmatch(r"rank-[0-9]{5,}\.safetensors", path.name):  # somebody's copy
                continue
            try:
                self._files.append(safe_open(path, "pt"))
            except (SafetensorError, OSError) as error:
                raise Damaged(f"{path} cannot be read: {error}") from None
        self._index: dict[tuple[str, str], list[tuple[int, int, int, str]]] = {}
        for number, file in enumerate(self._files):
            for entry in file.keys():  # noqa: SIM118 (not a mapping)
                name, key, start = entry.split("|")
                name = name if names is None else names.get(name, name)
                length = file.get_slice(entry).get_shape()[0]
                self._index.setdefault((name, key), []).append((int(start), int(start) + length, number, entry))

    def check(self, partition: Partition) -> None:
        for key in _keys(partition):
            for f in partition.fragments:
                held = sum(
                    min(b, f.stop) - max(a, f.start) for a, b, *_ in self._covering(f.name, key, f.start, f.stop)
                )
                if held != f.stop - f.start:
                    raise CheckpointError(
                        f"{self._folder}: {f.stop - f.start - held} of {f.stop - f.start} elements of {f.name} ({key}) "
                        f"are missing; is a rank's file gone?"
                    )

    def fill(self, partition: Partition, key: str, tensor: torch.Tensor) -> None:
        flat = tensor.view(-1)
        for f in partition.fragments:
            for a, b, number, entry in self._covering(f.name, key, f.start, f.stop):
                first, last = max(a, f.start), min(b, f.stop)
                piece = self._files[number].get_slice(entry)[first - a : last - a]
                flat[f.offset + first - f.start : f.offset + last - f.start] = piece.to(flat.device)

    def read(self, name: str, key: str, shape: tuple[int, ...]) -> torch.Tensor:
        pieces = sorted(self._index.get((name, key), []))
        held = [self._files[number].get_tensor(entry) for *_, number, entry in pieces]
        if sum(map(len, held)) != math.prod(shape):
            raise CheckpointError(
                f"{self._folder}: {name} ({key}) has {sum(map(len, held))} elements there, {math.prod(shape)} here; is "
                f"it of another version, or a rank's file gone?"
            )
        return torch.cat(held).view(shape)

    def _covering(self, name: str, key: str, start: int, stop: int) -> list[tuple[int, int, int, str]]:
        return [piece for piece in self._index.get((name, key), []) if piece[0] < stop and piece[1] > start]
