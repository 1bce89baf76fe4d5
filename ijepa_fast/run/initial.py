"""Weights of elsewhere that a new run begins with (`init`)."""

from __future__ import annotations

from ijepa_fast.data import Size
from ijepa_fast.engine.engine import Engine
from ijepa_fast.interop.weights import State, Weights, check_state, position_key, with_image_size
from ijepa_fast.methods.method import Method
from ijepa_fast.run.checkpoint import CheckpointError, partition_tensor


def begin(weights: Weights, engine: Engine, heads: int, crop: int | Size) -> None:
    """Bring `engine` to the networks of `weights`, averages to theirs; moments and step stay at zero.

    Fixed positions are resampled where the crop is another. A network that `weights` lacks, a predictor say, stays as
    it is initialised; an average it lacks starts as its network. heads, crop: of the run.
    Raises ValueError, naming the key and both shapes, before anything is changed.
    """
    arch, encoder = weights.arch, engine.method.encoder
    if arch.heads != heads:
        raise CheckpointError(f"init: the weights have {arch.heads} heads, the model {heads}")
    if arch.class_token != (encoder.cls_token is not None):
        with_or_without = "a class token" if arch.class_token else "no class token"
        raise CheckpointError(
            f"init: the weights are {arch.method}'s, whose encoder has {with_or_without}, and the method's encoder is "
            f"another; begin from weights of the same method"
        )
    states = beginning(weights, engine.method, crop)
    whole: State = {}
    for name, state in states.items():
        prefix = name.removeprefix("target_") + "."
        shapes = {k.removeprefix(prefix): shape for k, shape in engine.shapes.items() if k.startswith(prefix)}
        if name in engine.positions:
            shapes[position_key(name)] = (1, *engine.positions[name].shape)
        check_state(name, shapes, state)
        whole |= {f"{name}.{key}": tensor for key, tensor in state.items()}
    for partition in engine.layout.partitions:
        engine.optimizer.init_state(partition.master, partition.ema)
        for key in ("weight", "ema") if partition.ema else ("weight",):
            flat = partition_tensor(engine, partition, key).view(-1)
            for f in partition.fragments:
                name = "target_" + f.name if key == "ema" else f.name
                if name in whole:
                    values = whole[name].reshape(-1)[f.start : f.stop]
                    flat[f.offset : f.offset + f.stop - f.start] = values.to(flat.device)
    engine.place({name: states[name][position_key(name)][0] for name in engine.positions if name in states})
    engine.restored()


def beginning(weights: Weights, method: Method, crop: int | Size) -> dict[str, State]:
    """Of `weights` what the networks of `method` begin with, by their names, positions resampled for `crop`."""
    resampled = with_image_size(weights, crop).renamed(method.former_names)
    if method.encoder.pos_embed is None:
        resampled = resampled.with_fixed_positions()
    states = {name: resampled.networks[name] for name in method.networks if resampled.networks.get(name)}
    for name in method.averaged:
        if name in states:
            states.setdefault(f"target_{name}", states[name])
    return states
