"""Where, when and with what results were made: the head of every JSON file of figures, and a run's launches."""

from __future__ import annotations

import datetime
import json
import os
import platform
import shlex
import socket
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import ijepa_fast
from ijepa_fast.ranks import STARTED_BY

LAUNCHES = "launches.jsonl"  # in a run's folder: a line for each time that it was started
FORMAT = 2  # of the files: summary.json of a run, the probe command's, bench/learning.py's; 1 had no number


def provenance(device: torch.device | str) -> dict[str, Any]:
    """The version of the format, the UTC date, host, device, versions of the libraries, and the checkout's commit."""
    versions = {"python": platform.python_version(), "ijepa_fast": ijepa_fast.__version__}
    return {
        "version": FORMAT,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "host": socket.gethostname(),
        "device": device_name(device),
        "versions": versions | {name: _version(name) for name in ("torch", "triton", "deepspeed")},
        "commit": commit(),
    }


def note_launch(folder: Path, device: torch.device | str, step: int, ranks: int) -> None:
    """Add a line to launches.jsonl of a run: where, when and how it was started, and at which step it goes on."""
    found = provenance(device) | {"command": command_line(), "step": step, "ranks": ranks}
    with open(folder / LAUNCHES, "a") as file:
        file.write(json.dumps(found) + "\n")


def command_line() -> str:
    """The command that this process was started with, as a person types it: launchers with their number of ranks."""
    program, *words = sys.argv
    words = [word for word in words if not word.startswith("--local_rank")]
    ranks, path = os.environ.get("WORLD_SIZE", "1"), Path(program)
    if path.name == "__main__.py":
        start = ["python", "-m", "ijepa_fast"]
    elif path.name != "train.py" or path.resolve().parent != Path(ijepa_fast.__file__).parent.resolve():
        start = ["python"] * (path.suffix == ".py") + [path.name]
    elif STARTED_BY in os.environ:
        start = ["ijepa-fast", "train", "--ranks", ranks]
    elif "TORCHELASTIC_RUN_ID" in os.environ:
        start = ["torchrun", "--nproc-per-node", os.environ.get("LOCAL_WORLD_SIZE", "1"), "ijepa_fast/train.py"]
    else:
        start = ["deepspeed" if len(words) < len(sys.argv) - 1 else "python", "ijepa_fast/train.py"]
    return shlex.join([*start, *words])


def device_name(device: torch.device | str) -> str:
    """The name of the GPU, or of the CPU with the number of threads."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    threads = torch.get_num_threads()
    return f"{names[0] if names else platform.processor()}, {threads} thread{'s' if threads > 1 else ''}"


def commit(root: Path = Path(ijepa_fast.__file__).parents[1]) -> str | None:
    """The commit of the checkout `root`, with -dirty behind it where files differ from it; None for an installation."""
    if not ((root / "setup.py").is_file() and (root / ".git").exists()):
        return None
    words = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        found = subprocess.run(words, capture_output=True, text=True)
    except OSError:  # no git
        return None
    return found.stdout.strip() or None


def _version(name: str) -> str | None:
    if name == "torch":
        return torch.__version__  # with the build's suffix
    try:
        return version(name)
    except PackageNotFoundError:
        return None
