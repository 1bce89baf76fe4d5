"""Start runs that last until somebody ends them, and look at what is left of them."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from tests.launch import ROOT, TINY, hear_signals, unlaunched

LONG = ("optim.steps=100000", "optim.epochs=1000", "log.checkpoint_every=100000", "log.keep=9")


def wait_for(condition, seconds=120):
    """What `condition` returns once that is true; it is asked until then."""
    deadline = time.time() + seconds
    while time.time() < deadline:
        if found := condition():
            return found
        time.sleep(0.05)
    raise AssertionError("waited in vain")


def logged(folder: Path) -> int:
    """The last step in the run's log, 0 for none."""
    log = folder / "log.jsonl"
    lines = [line for line in log.read_text().splitlines() if line.endswith("}")] if log.is_file() else []
    return json.loads(lines[-1])["step"] if lines else 0


def saved(folder: Path) -> list[int]:
    """Steps of the run's checkpoints."""
    return sorted(int(path.name[5:]) for path in (folder / "checkpoints").glob("step-????????"))


def launch(runs: Path, *overrides: str, ranks: int) -> subprocess.Popen:
    """Start a run by DeepSpeed's launcher, in a session of its own."""
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", str(ranks), "--master_port", _port()]
    script = ["ijepa_fast/train.py", "--config", "configs/quickstart.yaml", f"runs={runs}", *TINY, *overrides]
    environment = unlaunched(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", TRITON_INTERPRET="0")
    environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.Popen(
        [*launcher, *script],
        cwd=ROOT,
        env={**environment, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=open(runs / "stderr", "w"),
        start_new_session=True,
        preexec_fn=hear_signals,
    )


def tree(session: int) -> dict[str, list[int]]:
    """The living processes of a launch: the launcher, what it starts on this machine, and the ranks."""
    found = {"deepspeed": [], "launch.py": [], "ranks": []}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            words = (folder / "cmdline").read_bytes().decode().split("\0")
        except (OSError, UnicodeDecodeError):
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            name = "ranks" if any(word.startswith("--local_rank") for word in words) else "deepspeed"
            name = "launch.py" if "deepspeed.launcher.launch" in words else name
            found[name].append(int(folder.name))
    return found


def _port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])
