"""Train I-JEPA, or another method, on a folder of images.

    deepspeed ijepa_fast/train.py --config configs/quickstart.yaml key=value ...

Results are in runs/<name>/: config.yaml, log.jsonl, checkpoints/, summary.json, loss.png, masks.png, tensorboard/.
The same command continues a run that was interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
from contextlib import closing
from pathlib import Path
from types import ModuleType
from typing import Any

# On a CPU, decoding shares the cores with the step's threads: one that spins while it waits would starve them.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if __package__ in (None, ""):
    # Started as a file by the launcher: this folder must not be on the path, where its modules would hide others.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from ijepa_fast import kernels
from ijepa_fast.config import Config, flatten, load_config, save_config
from ijepa_fast.engine.engine import Engine, choose_device, start
from ijepa_fast.engine.schedules import Schedule
from ijepa_fast.eval.online import OnlineProbe
from ijepa_fast.interop.load import read
from ijepa_fast.report.summary import finish
from ijepa_fast.run import checkpoint, lock
from ijepa_fast.run import forecast as planning
from ijepa_fast.run.build import Length, build_engine, build_loader, build_method, with_options, with_precision
from ijepa_fast.run.log import Meter, RunLog, check_loggers
from ijepa_fast.run.recover import choose, set_newer_aside
from ijepa_fast.run.sources import identity, label_columns, probe_folders, training_source, with_depth
from ijepa_fast.run.stop import Stop, Stopped, follow_launcher
from ijepa_fast.run.together import on_first, sentence


def train(config: Config) -> None:
    """Run `config` to its end, from its last checkpoint where there is one. Called by every rank."""
    began = time.perf_counter()
    kernels.use(config.kernels)
    check_loggers(config.log)
    device = choose_device(config.engine.device)
    source, folders = training_source(config), probe_folders(config)
    config = with_depth(config, source)
    length = Length.of(config, None if source is None else len(source))
    schedule, total = Schedule(config.optim, length.steps_per_epoch), length.steps
    method = build_method(config, length.steps_per_epoch)
    config = with_options(config, method)
    rank, ranks = start(device, config.engine.timeout)
    _held = lock.hold(config.folder)
    last = choose(config.folder, config.resume)
    config, precision = with_precision(config, last, device, rank)
    engine = build_engine(config, method, device, ranks)
    data = identity(source)
    try:
        step, changed = resume(config, last, engine, data, rank)
    except ValueError:
        if rank == 0:
            lock.leave(config.folder)
        raise
    micro_steps = config.engine.accumulation
    loader = build_loader(config, method, source, device, rank, ranks, first=step * micro_steps)
    log = RunLog(config.folder, config.name, config.log, flatten(config), rank, step, total)
    if changed:
        log.write(step, {"changed": changed})
    meter, logged = Meter(device), step
    online = OnlineProbe(method, config.probe.every, *label_columns(source), rank, step, log.say)
    with Stop(config.log.checkpoint_minutes, config.engine.timeout) as stop, closing(log), closing(loader):
        while step < total:
            lr, weight_decay, ema = schedule.at(step)
            for _ in range(micro_steps):
                begin = time.perf_counter()
                batch = next(loader)
                wait = time.perf_counter() - begin
                draw = batch.draw.to(device, non_blocking=True)
                loss, terms = engine.backward(batch.images, draw)
                engine.step(lr, weight_decay, ema)
                meter.add(loss, terms, draw, wait)
                online.add(batch.indices)
            step += 1
            log.advance()
            signal, due = stop.after(step)
            saving = signal or due or step % config.log.checkpoint_every == 0 or step == total
            if saving or step % config.log.every == 0:
                record: dict[str, Any] = {"epoch": batch.epoch, "replaced": loader.replaced}
                record |= {"lr": lr, "weight_decay": weight_decay} | ({"ema": ema} if method.averaged else {})
                window = meter.read((logged + 1, step), engine.health(), engine.skipped)
                log.write(step, window | record | online.read(step))
                logged = step
            if saving:
                save(config, engine, data, step)
                stop.saved()
                meter.restart()
            if signal and step < total:
                raise Stopped(signal, step)
    if rank == 0:
        finish(config, method, source, folders, device, began, precision)
    torch.distributed.barrier()


def save(config: Config, engine: Engine, data: dict[str, Any] | None, step: int) -> None:
    """Write a checkpoint of the run. Called by every rank."""
    arch = checkpoint.architecture(engine, config.model, config.data, config.objective.method, step)
    keep, keep_every = config.log.keep, config.log.keep_every
    checkpoint.save(config.folder, engine, flatten(config), arch, step, keep, keep_every, data)


def resume(
    config: Config, last: Path | None, engine: Engine, data: dict[str, Any] | None, rank: int
) -> tuple[int, dict[str, tuple[Any, Any]]]:
    """Load the checkpoint `last` into `engine`, the weights of `init` where there is none.

    Returns the step to go on from, and the settings of training that are others than before, {key: (then, now)}.
    """
    step = 0
    changed: dict[str, tuple[Any, Any]] = {}
    if last is not None:
        step, changed = checkpoint.load(last, engine, flatten(config), data)
        on_first(lambda: set_newer_aside(last))
    elif config.init is not None:
        weights = read(config.init, config.model.heads)
        checkpoint.begin(weights, engine, config.model.heads, config.data.crop)
        if rank == 0:
            fresh = ", ".join(sorted(engine.method.trained.keys() - weights.networks.keys()))
            anew = f", with a new {fresh}" if fresh else ""
            print(f"starting from {config.init}{anew}", file=sys.stderr)
    if rank == 0 and step:
        print(f"continuing {config.folder} from step {step}", file=sys.stderr)
        for key, (then, now) in changed.items():
            print(f"{key}: {then} -> {now} from step {step}", file=sys.stderr)
    on_first(lambda: save_config(config, config.folder / "config.yaml"))
    return step, changed


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and train. Returns the exit status; what a user can mend ends in one sentence."""
    usage = "%(prog)s --config FILE [key=value ...]"
    parser = argparse.ArgumentParser(description="Train I-JEPA, or another method.", usage=usage)
    parser.add_argument("--config", required=True, help="a YAML file, or the name of a ready one such as quickstart")
    parser.add_argument("--plan", action="store_true", help="print memory, work and hours; start nothing")
    parser.add_argument("--gpu", default="H200", help="of --plan: the GPU its hours are for")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 8], help="of --plan: numbers of ranks")
    parser.add_argument("--images", type=int, help="of --plan: images of an epoch; default ImageNet-1k's number")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # set by the launcher
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="configuration keys to change")
    args = parser.parse_intermixed_args(argv)
    follow_launcher()
    try:
        config = load_config(args.config, args.overrides)
        if args.plan:
            print(planning.report(config, planning.make(config, args.images, args.gpu, tuple(args.ranks)), args.gpu))
        else:
            train(config)
        return 0
    except Stopped as stopped:
        if os.environ.get("RANK", "0") == "0":
            print(stopped, file=sys.stderr, flush=True)
        return stopped.status
    except (ValueError, ImportError, OSError, RuntimeError) as error:
        text = sentence(error)
        if text is None or os.environ.get("IJEPA_FAST_TRACEBACK") == "1":
            raise
        if text:
            print(text, file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command continues from the last checkpoint", file=sys.stderr)
        return 130


class _Callable(ModuleType):
    """This module, which is called as a function too: `ijepa_fast.train(...)` is what `ijepa_fast.api.train` does."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return importlib.import_module("ijepa_fast.api").train(*arguments, **options)


sys.modules[__name__].__class__ = _Callable

if __name__ == "__main__":
    sys.exit(main())
