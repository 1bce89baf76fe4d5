"""A folder as a reader has it: images, a hostfile, `ijepa-fast` on the path; and what makes a run small."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
from PIL import Image

SMALL = ["model.arch=null", "model.dim=32", "model.depth=2", "model.heads=2", "model.predictor_dim=16"]
SMALL += ["model.predictor_depth=1", "data.crop=64", "batch_size=8", "optim.steps=2", "optim.epochs=40", "log.every=1"]
SMALL += ["engine.precision=fp32"]


def furnish(folder: Path) -> Path:
    """Put images into data/ and cat.jpg of `folder`, and `ijepa-fast` into its bin/; the folder."""
    generator = np.random.default_rng(0)
    for part, count in (("photos", 40), ("train", 24), ("val", 12)):
        for i in range(count):
            kind = folder / "data" / part / ("red" if i % 2 else "blue")
            kind.mkdir(parents=True, exist_ok=True)
            pixels = generator.integers(0, 200, (6, 8, 3), dtype=np.uint8)
            pixels[..., 0 if i % 2 else 2] = 255
            Image.fromarray(pixels).resize((96, 72), Image.Resampling.BICUBIC).save(kind / f"{i}.jpg")
    shutil.copy(folder / "data" / "train" / "red" / "1.jpg", folder / "cat.jpg")
    (folder / "hosts").write_text("localhost slots=1\n")
    (folder / "bin").mkdir()
    script = f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m ijepa_fast "$@"\n'
    (folder / "bin" / "ijepa-fast").write_text(script)
    (folder / "bin" / "ijepa-fast").chmod(0o755)
    return folder
