"""How long a newcomer waits: for an error, for the first step, for the first figure; a Markdown table.

    python bench/stopwatch.py

Each is a process of its own, started as a user would, on the embedded scenes, which are rendered before the clock
starts.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
SMALL = [
    "data.scenes=512",
    "optim.epochs=1",
    "optim.warmup_epochs=0",
    "optim.steps=4",
    "log.every=1",
    "probe.images=200",
]
TRAIN = ["train", "--config", "quickstart"]
ROWS = {
    "a mistyped key": ([*TRAIN, "lr=1"], "error: "),
    "a value out of range": ([*TRAIN, "optim.lr=-1"], "error: "),
    "a folder that is not there": ([*TRAIN, "data.source=/nowhere"], "error: "),
    "the banner": ([*TRAIN, *SMALL, "probe.enabled=false"], "device "),
    "the first step": ([*TRAIN, *SMALL, "probe.enabled=false"], "step=1/"),
    "the first figure of a probe (4 steps, 200 images)": ([*TRAIN, *SMALL], "task "),
}


def seconds(arguments: list[str], words: str) -> float:
    """Seconds until the command `arguments` prints a line that begins with `words`, on stderr."""
    command = [sys.executable, "-m", "ijepa_fast", *arguments]
    with tempfile.TemporaryDirectory() as runs:
        runs_here = [f"runs={runs}"] if "lr=1" not in arguments else []
        begin = time.perf_counter()
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        process = subprocess.Popen([*command, *runs_here], stderr=subprocess.PIPE, env=environment, text=True)
        try:
            for line in process.stderr:
                if line.startswith(words):
                    return time.perf_counter() - begin
        finally:
            process.kill()
            process.wait()
    raise RuntimeError(f"{' '.join(arguments)}: no line began with {words!r}")


def main() -> None:
    """Print the table."""
    print("| until | seconds |\n|---|---|")
    for what, (arguments, words) in ROWS.items():
        seconds(arguments, words)  # what is rendered and cached for good
        print(f"| {what} | {seconds(arguments, words):.1f} |", flush=True)


if __name__ == "__main__":
    main()
