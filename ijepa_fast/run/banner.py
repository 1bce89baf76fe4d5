"""What a run says before its first step: on what, in what, of what, how much and where."""

from __future__ import annotations

import torch

from ijepa_fast.config import Config
from ijepa_fast.data.sources import Source
from ijepa_fast.kernels.common import chosen
from ijepa_fast.methods.method import Method
from ijepa_fast.run.build import SYNTHETIC_IMAGES, Length, micro_batch
from ijepa_fast.run.provenance import device_name
from ijepa_fast.run.speed import Speed


def banner(
    config: Config,
    method: Method,
    source: Source | None,
    device: torch.device,
    ranks: int,
    length: Length,
    speed: Speed,
) -> str:
    """Lines of `name  value`; hours are said with the first line of the log, which measures them."""
    images = SYNTHETIC_IMAGES if source is None else len(source)
    classes = {name: len(names) for name, names in source.index.classes.items()} if source is not None else {}
    labels = ", ".join(f"{count} classes of {name}" for name, count in classes.items()) or "no classes"
    sizes = {name: sum(p.numel() for p in network.parameters()) / 1e6 for name, network in method.trained.items()}
    networks = " + ".join(f"{name} {size:.1f} M" for name, size in sizes.items())
    averaged = f"; average of {', '.join(method.averaged)}" if method.averaged else ""
    accumulation = config.engine.accumulation
    rows = {
        "device": f"{device_name(device)}, {config.engine.precision}" + (f", {ranks} ranks" if ranks > 1 else ""),
        "images": f"{images} of {config.data.source}, {labels}; crops of {config.data.crop} pixels",
        "method": f"{config.objective.method}: {networks} = {sum(sizes.values()):.1f} M trained parameters{averaged}",
        "batch": f"{config.batch_size} = {ranks} rank{'s' if ranks > 1 else ''} x {accumulation} accumulation x "
        f"{micro_batch(config, ranks)} images",
        "steps": f"{length.steps}, {length.steps_per_epoch} an epoch; time left comes with every line of the log",
        "speed": f"as a share of {speed.peak[1]}" if speed.peak else "no data sheet of this GPU is known here",
        "folder": f"{config.folder}/",
        "kernels": chosen.summary(device.type),
    }
    if device.type == "cpu" and (lacking := chosen.missing()):
        rows["missing"] = lacking
    return "\n".join(f"{name:<8} {value}" for name, value in rows.items())
