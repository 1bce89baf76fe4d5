"""How many steps of a run fit into so many minutes of training on this machine."""

from __future__ import annotations

import json
import time

import torch

from bench.compare.images import Images
from bench.compare.presets import Preset, settings
from bench.compare.runs import find, has_teacher
from bench.compare.train import tokens
from ijepa_fast import configs
from ijepa_fast.config import ConfigError, load_config
from ijepa_fast.data import size_of
from ijepa_fast.engine.engine import DTYPES, choose_device
from ijepa_fast.engine.precision import choose_precision
from ijepa_fast.run.build import build_method

TIMED = 3  # steps, after one more
OTHER_SHARE = 0.15  # of a step beside forward and backward: optimiser, average, data


def steps_in(minutes: float, name: str, preset: Preset, images: Images, extra: list[str]) -> int:
    """Steps of a run in so many minutes of training on this machine: timed once, and kept with the images."""
    run = find(name)
    assert run is not None
    if has_teacher(name):
        raise ConfigError(f"--minutes: {name} has a teacher that is not there when steps are timed; give --steps")
    path = configs.find(images.config(run))
    given = settings(name, preset, images.count(run), images.config(run), images.overrides, extra)
    kept, timed = images.out / f"{name}-steps.json", {"minutes": minutes, "settings": given}
    if kept.is_file() and (found := json.loads(kept.read_text())).items() >= timed.items():
        return found["steps"]
    config = load_config(path, [*given, *tokens(load_config(path, given), images.of(run)[0], images.out)])
    device = choose_device(config.engine.device)
    method, precision = build_method(config), choose_precision(config.engine.precision, device).name
    for network in method.networks.values():
        network.to(device, DTYPES[precision])
    method.carried = {key: value.to(device) for key, value in method.carried.items()}
    views = method.views()
    sides = [size_of(view.crop) for view in views] or [method.setup.data.size]
    drawn = [torch.randint(256, (preset.batch, *side, 3), dtype=torch.uint8, device=device) for side in sides]
    for step in range(1 + TIMED):
        if step == 1:
            start = time.perf_counter()
        loss, _ = method(drawn if views else drawn[0], method.draw(preset.batch, 0, step).to(device))
        loss.backward()
        method.zero_grad()
        loss.item()  # waits for the device
    seconds = (time.perf_counter() - start) / TIMED * (1 + OTHER_SHARE)
    steps = max(preset.probes, round(60 * minutes / seconds))
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(timed | {"steps": steps, "seconds_per_step": seconds}))
    return steps
