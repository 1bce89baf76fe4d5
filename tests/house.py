"""The package in the folders it is installed in, for tools that do not know that op folders stand elsewhere."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.launch import ROOT


def build(folder: Path) -> Path:
    """`folder`, with a copy of the package's Python files."""
    python = shutil.ignore_patterns("__pycache__", "*.so")
    shutil.copytree(ROOT / "ijepa_fast", folder / "ijepa_fast", ignore=python)
    shutil.copytree(ROOT / "kernels", folder / "ijepa_fast" / "kernels", ignore=python, dirs_exist_ok=True)
    return folder


def run(house: Path, *arguments: str) -> tuple[int, str]:
    """The exit status of `python ARGUMENTS` in the folder `house`, and what it prints."""
    alone = os.environ | {"PYTHONPATH": str(house)}
    done = subprocess.run([sys.executable, *arguments], cwd=house, env=alone, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr
