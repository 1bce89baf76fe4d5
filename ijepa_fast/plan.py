"""`ijepa-fast plan`: memory, work and hours of a run before it runs; with --measure, its speed in five steps here."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ijepa_fast.command import one_sentence
from ijepa_fast.config import Config, ConfigError, load_config, save_config
from ijepa_fast.front import RANDOM_OR_EMBEDDED, check_method_early, parser

if TYPE_CHECKING:
    from ijepa_fast.data.sources import Source
    from ijepa_fast.run.forecast import Device

STEPS = 5  # measured, after one that is left out


@one_sentence()
def main(argv: list[str] | None = None) -> int:
    """Print the plan. Returns the exit status."""
    p = parser("plan", "Memory, work and hours of a run, before anything runs.")
    p.add_argument("--gpu", help="the GPU its memory and hours are for; default: the one here, else an H200")
    p.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 8], help="numbers of ranks")
    p.add_argument("--images", type=int, help="images of an epoch; default: those of data.source, where it is here")
    p.add_argument("--measure", action="store_true", help=f"run {STEPS} steps on this machine and give their hours")
    args = p.parse(argv)
    for name, numbers in (("--ranks", args.ranks), ("--images", [] if args.images is None else [args.images])):
        if min(numbers, default=1) < 1:
            raise ConfigError(f"{name}: expected at least 1, got {min(numbers)}")
    config = load_config(args.config, args.overrides)
    check_method_early(config)
    source, said = (None, "") if args.images is not None else _source(config)
    images = args.images if source is None else len(source)
    import torch

    from ijepa_fast.run import auto, forecast
    from ijepa_fast.run.build import Length

    gpu: str | None = args.gpu
    device: Device | None = None
    if gpu is None:
        gpu, device = _present()
    facts = auto.facts_of(config, source, config.engine.device != "cpu", 1)
    facts = facts if images is None else replace(facts, images=images)
    given, (config, reasons) = config, auto.filled(config, facts)
    plan = forecast.make(config, images, gpu, tuple(args.ranks))
    if not plan.parameters[0]:  # none has an average
        reasons.pop(auto.AVERAGE, None)
    print(forecast.report(config, plan, gpu, device))
    for text in filter(None, (said, auto.said(config, reasons))):
        print(f"\n{text}")
    if args.measure:
        here, _ = auto.filled(given, replace(facts, gpu=facts.gpu and torch.cuda.is_available()))
        print(f"\n{measured(here, Length.of(here, plan.images).steps)}")
    return 0


def _source(config: Config) -> tuple[Source | None, str]:
    """The images of the configuration, None where their number is the forecast's own; and what to say of it."""
    source = config.data.source
    if source in RANDOM_OR_EMBEDDED:
        return None, ""
    from ijepa_fast.data.sources import open_source

    try:
        found = open_source(source)
    except (ValueError, OSError) as error:
        return None, f"data.source: {error}; counted as ImageNet-1k's images, or name a number by --images"
    return found, f"data.source: {len(found)} images" + (f"; left out: {found.left_out}" if found.left_out else "")


def _present() -> tuple[str, Device | None]:
    """The name of the GPU here as the forecast knows it, and the device itself; an H200 where there is none."""
    import torch

    from ijepa_fast.models.flops import PEAKS
    from ijepa_fast.run.forecast import Device

    if not torch.cuda.is_available():
        return "H200", None
    name = torch.cuda.get_device_name()
    known = next((gpu for gpu in PEAKS if gpu in name.replace("-", " ").split()), "H200")
    return known, Device(f"{name}, here", float(torch.cuda.get_device_properties(0).total_memory))


def measured(config: Config, steps: int) -> str:
    """Seconds of a step of one rank on this machine, the median of STEPS, and the hours of `steps` of them.

    The run is a process of its own, in a folder that is removed; where data.source is not here, on random images.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(Path(__file__).with_name("train.py")), "--config", f"{folder}/config.yaml"]
        save_config(config, Path(folder) / "config.yaml")
        source = config.data.source
        here = source in RANDOM_OR_EMBEDDED or {"*", "{"} & set(source) or os.path.exists(source)
        short = [f"runs={folder}", "name=measured", f"optim.steps={STEPS + 1}", "log.every=1", "probe.enabled=false"]
        short += ["probe.every=0", "log.tensorboard=false", "log.wandb=null", "log.loggers=[]", "hooks=[]", "init=null"]
        short += ["resume=true", "log.checkpoint_every=1000000", "optim.warmup_epochs=0"]
        done = subprocess.run(
            [*command, *short, *([] if here else ["data.source=synthetic"])], capture_output=True, text=True
        )
        if done.returncode:
            raise ValueError(f"--measure: the run ended: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
        lines = (Path(folder) / "measured" / "log.jsonl").read_text().splitlines()
    rates = [record["images_per_second"] for record in map(json.loads, lines) if "loss" in record][1:]
    seconds = config.batch_size / statistics.median(rates)
    where = "" if here else ", on random images, as data.source is not here"
    return (
        f"measured on this machine, one rank{where}: {seconds:.3g} s a step of {config.batch_size} images (median of "
        f"{len(rates)}), so {steps} steps take {seconds * steps / 3600:.3g} hours"
    )
