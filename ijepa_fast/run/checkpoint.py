"""Checkpoints: atomic, written in parallel by all ranks, readable under another ZeRO stage or number of ranks.

    checkpoints/step-00000500/
        rank-00000.safetensors   this rank's fragments of weights, moments and EMA: "<parameter>|<key>|<first element>",
                                 and in the first one, whole, what the objective carries: "<name>|carried|0"
        weights.safetensors      encoder, predictor and target encoder, whole, fp32, under the published names
        state.json               step, shapes, and the configuration the run had

A folder is written under another name, flushed to disk and renamed: a kill at any moment leaves the last one good.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ijepa_fast.config import Config, flatten
from ijepa_fast.engine.engine import Engine
from ijepa_fast.engine.optim import STATES
from ijepa_fast.interop.weights import POSITIONS, Arch, Weights, check_state, header, with_image_size

FORMAT = 1
# A run resumed with another value of one of these would not be the run that was begun.
FIXED = ("seed", "init", "batch_size", "data.", "mask.", "model.", "objective.")
FREE = ("data.threads", "data.prefetch", "data.cache", "data.hw_decoder_load", "data.max_bad_share", "model.recompute")


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or does not fit the run; the message names what and what to do."""


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint under the run's `folder`, or None where there is none."""
    found = [p for p in (folder / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d+", p.name)]
    return max(found, key=lambda p: int(p.name.removeprefix("step-")), default=None)


def save(folder: Path, engine: Engine, config: Config, step: int) -> Path:
    """Write the state after `step` steps and drop all but the newest `log.keep` checkpoints. Called by every rank."""
    rank = torch.distributed.get_rank()
    final = folder / "checkpoints" / f"step-{step:08d}"
    draft = final.with_name(f"draft-{step:08d}")
    if rank == 0:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
    torch.distributed.barrier()
    if rank == 0 or not engine.layout.replicated:
        carried = {f"{name}|carried|0": tensor.cpu().clone() for name, tensor in engine.carried.items() if rank == 0}
        _write(draft / f"rank-{rank:05d}.safetensors", _fragments(engine) | carried)
    torch.distributed.barrier()
    if rank == 0:
        _write(
            draft / "weights.safetensors", _whole_weights(draft, engine), metadata=header(architecture(config, step))
        )
        state = {"format": FORMAT, "step": step, "shapes": engine.shapes, "config": flatten(config)}
        (draft / "state.json").write_text(json.dumps(state, indent=1))
        for path in (draft / "state.json", draft, final.parent):
            _flush(path)
        shutil.rmtree(final, ignore_errors=True)
        draft.rename(final)
        _flush(final.parent)
        for old in sorted(final.parent.glob("step-*"))[: -config.log.keep]:
            shutil.rmtree(old)
    torch.distributed.barrier()
    return final


def load(path: Path, engine: Engine, config: Config) -> int:
    """Bring `engine` to the state in `path`; its step. Raises CheckpointError before anything is changed."""
    state = read_state(path)
    changed = [
        f"{key}: {json.dumps(state['config'].get(key))} -> {json.dumps(value)}"
        for key, value in json.loads(json.dumps(flatten(config))).items()
        if key.startswith(FIXED) and key not in FREE and state["config"].get(key, value) != value
    ]
    if changed:
        raise CheckpointError(
            f"{path} was written by another run ({'; '.join(changed)}); restore these keys, or set another name"
        )
    ours = {name: list(shape) for name, shape in engine.shapes.items()}
    for name in sorted(ours.keys() | state["shapes"].keys()):
        if ours.get(name) != state["shapes"].get(name):
            raise CheckpointError(
                f"{path}: parameter {name} has shape {state['shapes'].get(name)} there, {ours.get(name)} in this model"
            )
    reader = _Reader(path)
    for partition in engine.layout.partitions:
        reader.check(partition)
    carried = {name: reader.read(name, "carried", tensor.shape) for name, tensor in engine.carried.items()}
    engine.place(_positions(path))
    for partition in engine.layout.partitions:
        optimizer_state = engine.optimizer.init_state(partition.master, partition.ema)
        optimizer_state["step"] = state["step"]
        for key in _keys(partition):
            reader.fill(partition, key, _tensor(engine, partition, key))
    for name, tensor in carried.items():
        engine.carried[name].copy_(tensor)
    engine.restored()
    return state["step"]


def begin(weights: Weights, engine: Engine, config: Config) -> None:
    """Bring `engine` to the networks of `weights`, the average to its target encoder; moments and step stay at zero.

    Positions are resampled where the crop is another. A predictor that `weights` lacks stays as it is initialised.
    Raises ValueError, naming the key and both shapes, before anything is changed.
    """
    if weights.arch.heads != config.model.heads:
        raise CheckpointError(f"init: the weights have {weights.arch.heads} heads, the model {config.model.heads}")
    states = {name: weights.network(name) for name in ("encoder", "target_encoder")}
    if weights.predictor:
        states["predictor"] = weights.predictor
    for name, state in states.items():
        module = name.removeprefix("target_") + "."
        shapes = {key.removeprefix(module): s for key, s in engine.shapes.items() if key.startswith(module)}
        check_state(name, shapes, state)
    whole = {f"{name}.{key}": tensor for name, state in states.items() for key, tensor in state.items()}
    for partition in engine.layout.partitions:
        engine.optimizer.init_state(partition.master, partition.ema)
        for key in ("weight", "ema") if partition.ema else ("weight",):
            flat = _tensor(engine, partition, key).view(-1)
            for f in partition.fragments:
                name = "target_" + f.name if key == "ema" else f.name
                if name in whole:
                    values = whole[name].reshape(-1)[f.start : f.stop]
                    flat[f.offset : f.offset + f.stop - f.start] = values.to(flat.device)
    resampled = with_image_size(weights, config.data.crop)
    engine.place({name: getattr(resampled, name)[POSITIONS[name]][0] for name in states if name in engine.positions})
    engine.restored()


def read_state(path: Path) -> dict:
    """The state.json of a checkpoint. Raises CheckpointError where there is none or it is of another format."""
    try:
        state = json.loads((path / "state.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: no readable state.json ({error}); is it a checkpoint folder?") from None
    if state.get("format") != FORMAT:
        raise CheckpointError(f"{path}: format {state.get('format')}, this version reads {FORMAT}")
    return state


def architecture(config: Config, step: int) -> Arch:
    """What is needed to rebuild the encoders of a run from weights.safetensors."""
    model, data = config.model, config.data
    return Arch(
        image_size=data.crop,
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
    )


def _keys(partition) -> list[str]:
    return ["weight", *(key for key in STATES if key != "ema" or partition.ema)]


def _tensor(engine: Engine, partition, key: str) -> torch.Tensor:
    return partition.master.data if key == "weight" else engine.optimizer.state[partition.master][key]


def _fragments(engine: Engine) -> dict[str, torch.Tensor]:
    out = {}
    for partition in engine.layout.partitions:
        engine.optimizer.init_state(partition.master, partition.ema)
        for key in _keys(partition):
            flat = _tensor(engine, partition, key).detach().reshape(-1)
            for f in partition.fragments:
                out[f"{f.name}|{key}|{f.start}"] = flat[f.offset : f.offset + f.stop - f.start].cpu().clone()
    return out


def _whole_weights(folder: Path, engine: Engine) -> dict[str, torch.Tensor]:
    reader, out = _Reader(folder), {}
    for name, shape in engine.shapes.items():
        out[name] = reader.read(name, "weight", shape)
        if name.startswith("encoder."):
            out["target_" + name] = reader.read(name, "ema", shape)
    return out | {f"{name}.{POSITIONS[name]}": table.cpu()[None] for name, table in engine.positions.items()}


def _positions(path: Path) -> dict[str, torch.Tensor]:
    """The position tables (N, width) of a checkpoint, by network; none in one that has the fixed tables."""
    if not (path / "weights.safetensors").is_file():
        raise CheckpointError(f"{path}: weights.safetensors is missing; go back to another checkpoint")
    with safe_open(path / "weights.safetensors", "pt") as file:
        held = set(file.keys())
        keys = {name: f"{name}.{key}" for name, key in POSITIONS.items()}
        return {name: file.get_tensor(key)[0] for name, key in keys.items() if key in held}


class _Reader:
    """Reads elements of a parameter from the fragments of all ranks."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._files = [safe_open(p, "pt") for p in sorted(folder.glob("rank-*.safetensors"))]
        self._index: dict[tuple[str, str], list[tuple[int, int, int, str]]] = {}
        for number, file in enumerate(self._files):
            for entry in file.keys():  # noqa: SIM118 (not a mapping)
                name, key, start = entry.split("|")
                length = file.get_slice(entry).get_shape()[0]
                self._index.setdefault((name, key), []).append((int(start), int(start) + length, number, entry))

    def check(self, partition) -> None:
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

    def fill(self, partition, key: str, tensor: torch.Tensor) -> None:
        flat = tensor.view(-1)
        for f in partition.fragments:
            for a, b, number, entry in self._covering(f.name, key, f.start, f.stop):
                first, last = max(a, f.start), min(b, f.stop)
                piece = self._files[number].get_slice(entry)[first - a : last - a]
                flat[f.offset + first - f.start : f.offset + last - f.start] = piece.to(flat.device)

    def read(self, name: str, key: str, shape: tuple[int, ...]) -> torch.Tensor:
        pieces = sorted(self._index[name, key])
        return torch.cat([self._files[number].get_tensor(entry) for *_, number, entry in pieces]).view(shape)

    def _covering(self, name: str, key: str, start: int, stop: int):
        return [piece for piece in self._index.get((name, key), []) if piece[0] < stop and piece[1] > start]


def _write(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    save_file(tensors, path, metadata)
    _flush(path)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
