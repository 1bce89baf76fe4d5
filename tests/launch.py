"""Start the trainer as a user would, on one or several CPU ranks, and read what a run left."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
TINY = [
    "data.source=synthetic",
    "data.crop=32",
    "batch_size=8",
    "model.dim=32",
    "model.depth=2",
    "model.heads=2",
    "model.patch=4",
    "model.predictor_dim=16",
    "model.predictor_depth=2",
    "mask.min_keep=4",
    "optim.epochs=1",
    "optim.warmup_epochs=0.1",
    "log.every=1",
    "log.tensorboard=false",
    "probe.enabled=false",
    "engine.precision=fp32",
]
# Blocks of the published sizes, in place of the quickstart's, of which some are empty on a grid of 4 x 4 patches.
PUBLISHED_MASKS = ["mask.targets=null", "mask.target_scale=null", "mask.context_scale=null"]

LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def unlaunched(**more: str) -> dict[str, str]:
    """This environment for a job of its own, as a trainer in this process may have left another's; and `more`."""
    return {name: value for name, value in os.environ.items() if name not in LAUNCHER} | more


def command(runs: Path, *overrides: str, config: str = "quickstart") -> list[str]:
    """The command line of a run in `runs`, without a launcher."""
    script = [sys.executable, "ijepa_fast/train.py", "--config", f"configs/{config}.yaml", f"runs={runs}"]
    return [*script, *TINY, *overrides]


def start(
    runs: Path, *overrides: str, ranks: int = 1, config: str = "quickstart", first: str | None = None
) -> list[subprocess.Popen]:
    """Start a run's ranks. first: code that they run before the trainer's."""
    arguments = command(runs, *overrides, config=config)
    if first is not None:
        main = "import sys; from ijepa_fast.train import main; sys.exit(main(sys.argv[1:]))"
        arguments = [sys.executable, "-c", f"{first}\n{main}", *arguments[2:]]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    world = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_WORLD_SIZE": str(ranks)}
    environment = unlaunched(**world, DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", TRITON_INTERPRET="0")
    return [
        subprocess.Popen(
            arguments,
            cwd=ROOT,
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=hear_signals,
        )
        for rank in range(ranks)
    ]


def hear_signals() -> None:
    """A shell's background job ignores Ctrl-C, what nohup starts a terminal's end; and so would all that they start."""
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def finish(processes: list[subprocess.Popen], timeout: float = 300) -> tuple[list[int], str]:
    """Wait for the ranks: their exit statuses, and what they wrote to stderr."""
    try:
        outputs = [process.communicate(timeout=timeout)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], "\n".join(outputs)


def run(runs: Path, *overrides: str, ranks: int = 1, config: str = "quickstart") -> Path:
    """Run to the end and expect success; the run's folder."""
    statuses, errors = finish(start(runs, *overrides, ranks=ranks, config=config))
    assert statuses == [0] * ranks, errors[-3000:]
    name = next((o.removeprefix("name=") for o in reversed(overrides) if o.startswith("name=")), config)
    return runs / name


def on_two_ranks(work: Callable, folder: Path) -> list[Any]:
    """What `work(rank, folder)` saved in `folder`/<rank>.pt, in two processes that are one group of ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    started = [context.Process(target=_one_of_two, args=(work, rank, port, folder)) for rank in range(2)]
    for process in started:
        process.start()
    for process in started:
        process.join(120)
        assert process.exitcode == 0
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def _one_of_two(work: Callable, rank: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    work(rank, folder)
    torch.distributed.destroy_process_group()


def losses(folder: Path) -> list[float]:
    """The losses of a run's log."""
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if "loss" in record]


def rank_files(folder: Path, step: int) -> list[Path]:
    """The rank files of a checkpoint."""
    return sorted((folder / "checkpoints" / f"step-{step:08d}").glob("rank-*.safetensors"))


def some(values: Iterable, *tried: Any) -> list:
    """Values of a parameter, of which `tried` are always tried, and all by `make test-all`."""
    values = list(values)
    assert set(tried) <= set(values)
    return [value if value in tried else _thorough(value) for value in values]


def _thorough(value: Any):
    return pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.thorough)
