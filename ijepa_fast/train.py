"""Train I-JEPA, or another method, on a folder of images.

    ijepa-fast train --config quickstart key=value ...          one rank, or --ranks 2
    deepspeed ijepa_fast/train.py --config quickstart key=value ...

Results are in runs/<name>/: config.yaml, log.jsonl, checkpoints/, summary.json, loss.png, masks.png, tensorboard/.
The same command continues a run that was interrupted.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
from contextlib import closing
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

if __name__ == "__main__":
    # Started as a file by a launcher: this folder must not be on the path, where its modules would hide others. The
    # command says what is wrong with the configuration before it imports this file again, and with it torch.
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    sys.exit(importlib.import_module("ijepa_fast.front").main())
# On a CPU, decoding shares the cores with the step's threads. One that spins for long while it waits would starve it;
# one that sleeps at once is woken hundreds of times in a small step, which took 1.6 times as long (docs/LOG.md).
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # of other OpenMP libraries than GNU's

import torch

from ijepa_fast import kernels
from ijepa_fast.config import Config, flatten, save_config
from ijepa_fast.data.sources import Source
from ijepa_fast.engine.engine import Engine, choose_device, start
from ijepa_fast.engine.schedules import Schedule
from ijepa_fast.eval.online import OnlineProbe
from ijepa_fast.front import main
from ijepa_fast.interop.load import read
from ijepa_fast.methods.method import Method
from ijepa_fast.report.summary import finish
from ijepa_fast.run import auto, checkpoint, initial, lock, machines, pulse
from ijepa_fast.run.banner import banner
from ijepa_fast.run.build import (
    Length,
    build_engine,
    build_loader,
    build_method,
    make_ready,
    with_options,
    with_precision,
)
from ijepa_fast.run.imported import functions
from ijepa_fast.run.kept import kept_values
from ijepa_fast.run.log import Meter, RunLog, check_loggers, newest
from ijepa_fast.run.provenance import note_launch
from ijepa_fast.run.recover import choose, set_newer_aside
from ijepa_fast.run.saver import Saver
from ijepa_fast.run.sources import Evaluated, evaluated, identity, label_columns, training_source, with_depth
from ijepa_fast.run.speed import Speed
from ijepa_fast.run.stop import Stop, Stopped
from ijepa_fast.run.together import on_first

__all__ = ["main", "train"]


def train(config: Config) -> None:
    """Run `config` to its end, from its last checkpoint where there is one. Called by every rank."""
    began = time.perf_counter()
    kernels.use(config.kernels)
    check_loggers(config.log)
    device = choose_device(config.engine.device)
    met = machines.meet(config, device.type)
    pulse.begin(met.rank, met.hosts, met.store)
    rank, ranks = start(device, config.engine.timeout, met.store)
    config, source, labelled, method, hooks = machines.alike(partial(prepare, config, device, rank, ranks))
    count = None if source is None else len(source)
    length = Length.of(config, count)
    schedule = Schedule(config.optim, length.steps_per_epoch)
    data = identity(source)
    machines.same_data(data, config.data.source)
    lock.hold(config.folder)
    try:
        machines.same_folder(config.folder, met)
        last = choose(config.folder, config.resume)
        config, precision = with_precision(config, last, device, rank)
        engine = build_engine(config, method, device, ranks)
        step, images, changed = resume(config, last, engine, data, rank)
        kept = kept_values(config, method, source, device, rank, ranks)
    except (ValueError, OSError):
        if rank == 0:
            lock.leave(config.folder)
        raise
    # Steps are counted on where the batch size was changed; schedule, order and draws are those of the images seen.
    more = step - images // config.batch_size
    length = Length.of(config, count, more)
    total, micro_steps = length.steps, config.engine.accumulation
    at = (step - more) * micro_steps
    loader = build_loader(config, method, source, device, rank, ranks, first=at, beside=kept)
    log = RunLog(config.folder, config.name, config.log, flatten(config), rank, step, total)
    if changed:
        log.write(step, {"changed": changed})
    speed = Speed(method, device, precision.name, total, config.batch_size, ranks)
    log.say(banner(config, method, source, device, ranks, length, speed))
    meter, logged = Meter(device), step
    first = newest(config.folder / "log.jsonl", "probe", "untrained") if step else None
    online = OnlineProbe(method, config.probe.every, *label_columns(source), rank, step, log.say, first)
    stopping = Stop(config.log.checkpoint_minutes, config.engine.timeout)
    saving = Saver(engine, partial(save, config, engine, data, more), config.engine.timeout)
    with stopping as stop, saving as saver, closing(log), closing(loader):
        while step < total:
            lr, weight_decay, ema = schedule.at(step - more)
            logging = (step + 1) % config.log.every == 0
            for _ in range(micro_steps):
                begin = time.perf_counter()
                pulse.at(step, "waiting for images")
                batch = next(loader)
                pulse.at(step, "computing")
                wait = time.perf_counter() - begin
                draw = batch.draw.to(device, non_blocking=True)
                loss, terms = engine.backward(batch.images, draw)
                engine.step(lr, weight_decay, ema, norm=logging)
                meter.add(loss, terms, draw, wait)
                online.add(batch.indices)
            step += 1
            log.advance()
            signal, due, failed = stop.after(step, saver.failed or lock.lost())
            if failed:
                on_first(lock.check)
                saver.wait()
            to_save = signal or due or step % config.log.checkpoint_every == 0 or step == total
            if to_save or logging:
                record: dict[str, Any] = {"images": (step - more) * config.batch_size, "epoch": batch.epoch}
                record["replaced"] = loader.replaced
                record |= {"lr": lr, "weight_decay": weight_decay} | ({"ema": ema} if method.averaged else {})
                window = meter.read((logged + 1, step), engine.health(), engine.skipped, engine.gradient_squares())
                record = window | record | speed.record(step, batch.draw, window) | online.read(step)
                if graphs := engine.graphs():
                    record["graphs"] = graphs
                if to_save:
                    stop.saving()
                    pulse.at(step, "saving")
                    record["saving_blocked"] = saver.save(step)
                    stop.saved()
                log.write(step, record)
                for hook in hooks:
                    hook(step, record, method)
                logged = step
            if to_save:
                meter.restart()
            if signal and step < total:
                saver.wait()
                raise Stopped(signal, step)
    pulse.at(step, "evaluating" if rank == 0 else "waiting for rank 0")
    machines.alone(met, partial(finish, config, method, source, labelled, device, began, precision))


def prepare(
    config: Config, device: torch.device, rank: int, ranks: int
) -> tuple[Config, Source | None, Evaluated | None, Method, list[Any]]:
    """The configuration with what images, machine and method add to it; the images, None: random ones; method and
    hooks.

    Between them the images that the encoder is evaluated with when the run ends, None: none.
    """
    source = training_source(config)
    config, average = auto.begin(with_depth(config, source), source, device.type == "cuda", rank, ranks)
    labelled = evaluated(config, source, device)
    length = Length.of(config, None if source is None else len(source))
    hooks = functions("hooks", config.hooks)
    method = build_method(config, length.steps_per_epoch)
    if rank == 0 and average and method.averaged:
        print(average, file=sys.stderr)
    make_ready(method)
    return with_options(config, method), source, labelled, method, hooks


def save(
    config: Config, engine: Engine, data: dict[str, Any] | None, more: int, taken: checkpoint.Snapshot, group: Any
) -> None:
    """Write a checkpoint of the run. Called by every rank, in a thread. more: see Length.of."""
    arch = checkpoint.architecture(
        engine.method.encoder, config.model, config.data, config.objective.method, taken.step
    )
    keep, keep_every = config.log.keep, config.log.keep_every
    images = (taken.step - more) * config.batch_size
    checkpoint.write(config.folder, taken, images, flatten(config), arch, keep, keep_every, data, group)


def resume(
    config: Config, last: Path | None, engine: Engine, data: dict[str, Any] | None, rank: int
) -> tuple[int, int, dict[str, tuple[Any, Any]]]:
    """Load the checkpoint `last` into `engine`, the weights of `init` where there is none.

    Returns the step to go on from, the images seen until then, and the settings of training that are others than
    before, {key: (then, now)}.
    """
    step = images = 0
    changed: dict[str, tuple[Any, Any]] = {}
    if last is not None:
        step, images, changed = checkpoint.load(last, engine, flatten(config), data)
        on_first(lambda: set_newer_aside(last))
    elif config.init is not None:
        weights = read(config.init, config.model.heads)
        initial.begin(weights, engine, config.model.heads, config.data.crop)
        if rank == 0:
            fresh = ", ".join(sorted(engine.method.trained.keys() - weights.networks.keys()))
            anew = f", with a new {fresh}" if fresh else ""
            print(f"starting from {config.init}{anew}", file=sys.stderr)
    if rank == 0 and step:
        print(f"continuing {config.folder} from step {step}, after {images:,} images", file=sys.stderr)
        for key, (then, now) in changed.items():
            print(f"{key}: {then} -> {now} from step {step}", file=sys.stderr)
    on_first(lambda: save_config(config, config.folder / "config.yaml"))
    on_first(lambda: note_launch(config.folder, engine.device, step, torch.distributed.get_world_size()))
    return step, images, changed


class _Callable(ModuleType):
    """This module, which is called as a function too: `ijepa_fast.train(...)` is what `ijepa_fast.api.train` does."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return importlib.import_module("ijepa_fast.api").train(*arguments, **options)


sys.modules[__name__].__class__ = _Callable
