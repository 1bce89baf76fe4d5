"""`ijepa-fast doctor`: what this machine has for training, whether it works, and what to do where it does not."""

from __future__ import annotations

import argparse
import importlib
import io
import os
import platform
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ijepa_fast import __version__
from ijepa_fast.cores import cores, threads

NEEDED = ("torch", "numpy", "omegaconf", "safetensors", "pillow", "matplotlib", "deepspeed", "nvidia-dali-cuda130")
OPTIONAL = ("triton", "tensorboard", "wandb", "transformers", "scikit-learn")
PORT = 29500  # which launchers of others take by themselves
SPACE = 5e9  # bytes that a run's checkpoints take easily
TOLERANCE = 1e-3  # of the loss, between what runs here and the reference, in fp32
Row = tuple[str, str]  # ("ok" | "note" | "bad", what was found and what to do)


def main(argv: list[str] | None = None) -> int:
    """Print a line for each thing looked at. Returns 0 where a run can train here, else 1."""
    parser = argparse.ArgumentParser(prog="ijepa-fast doctor", description="Say what this machine has, and try it.")
    parser.add_argument("--runs", default="runs", help="the folder of runs, whose disk is looked at")
    args = parser.parse_args(argv)
    from ijepa_fast.front import one_line_warnings

    one_line_warnings(first=True)
    worst = 0
    for name, look in looks(Path(args.runs)):
        for state, text in _safely(look):
            worst |= state == "bad"
            print(f"{state:<5}{name:<10}{text}", flush=True)
    print("a run can train here" if not worst else "a run cannot train here before what is bad is mended")
    return int(worst)


def looks(runs: Path) -> list[tuple[str, Callable[[], Iterator[Row]]]]:
    """What is looked at, by name, in this order."""
    return [
        ("versions", _versions),
        ("device", _device),
        ("csrc", _extension),
        ("kernels", _kernels),
        ("compiler", _compiler),
        ("dali", _dali),
        ("port", _port),
        ("disk", lambda: _disk(runs)),
        ("self-test", _self_test),
    ]


def _safely(look: Callable[[], Iterator[Row]]) -> Iterator[Row]:
    try:
        yield from look()
    except Exception as error:  # whatever a broken installation raises
        yield "bad", f"{type(error).__name__}: {' '.join(str(error).split())}"


def _versions() -> Iterator[Row]:
    found = {name: _version(name) for name in (*NEEDED, *OPTIONAL)}
    there = ", ".join(f"{name} {number}" for name, number in found.items() if number)
    yield "ok", f"ijepa_fast {__version__}, python {platform.python_version()}, {there}"
    if lacking := [name for name in NEEDED if found[name] is None]:
        yield "bad", f"not installed: {', '.join(lacking)}; pip install {' '.join(lacking)}"
    if lacking := [name for name in OPTIONAL if found[name] is None]:
        yield "note", f"not installed, and not needed to train: {', '.join(lacking)}"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _device() -> Iterator[Row]:
    import torch

    from ijepa_fast.run.provenance import device_name

    yield "ok", f"{device_name('cpu')}; {cores()} cores may be used, {threads(1)} threads by one rank"
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        yield "ok", f"GPU {index}: {name}, {total / 1e9:.0f} GB, of which {free / 1e9:.0f} are free"
    if not torch.cuda.device_count():
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is a CPU build"
        cure = "is the driver there (nvidia-smi)?" if torch.version.cuda else "for a GPU, install a CUDA build of torch"
        yield "note", f"no GPU: {built}; {cure}"


def _extension() -> Iterator[Row]:
    from ijepa_fast.kernels.common import chosen, native

    if (loops := native.loops()) is not None:
        yield "ok", f"the extension is built; its loops for this processor: {loops}"
    else:
        yield "note", chosen.missing() or "not built, and of use on x86-64 alone"


def _kernels() -> Iterator[Row]:
    import torch

    from ijepa_fast.kernels.common.chosen import chosen

    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        for op, (name, why) in chosen(device).items():
            yield "ok", f"{op} on {device}: {name} ({why})"


def _compiler() -> Iterator[Row]:
    from ijepa_fast.engine.compiler import NO_COMPILER, compiler

    if found := compiler():
        yield "ok", f"{found}: for csrc, torch.compile and, on a GPU, Triton"
    else:
        yield "note", f"none: {NO_COMPILER}"


def _dali() -> Iterator[Row]:
    import numpy as np
    from PIL import Image

    from ijepa_fast.data.check import check

    with tempfile.TemporaryDirectory() as folder:
        stream = io.BytesIO()
        Image.fromarray(np.full((32, 32, 3), 128, np.uint8)).save(stream, "JPEG")
        (Path(folder) / "grey.jpg").write_bytes(stream.getvalue())
        with _quiet():
            bad = check(folder, 1)
    yield ("bad", "a good JPEG could not be decoded") if bad else ("ok", "decodes a JPEG")


def _port() -> Iterator[Row]:
    with socket.socket() as mine:
        mine.bind(("127.0.0.1", 0))
    port = int(os.environ.get("MASTER_PORT", PORT))
    with socket.socket() as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind(("", port))
            yield "ok", f"{port}, which launchers take, is free"
        except OSError as error:
            cure = f"deepspeed --master_port {port + 1}, or train --ranks, which finds a free one"
            yield "note", f"{port}: {error.strerror}; {cure}"


def _disk(runs: Path) -> Iterator[Row]:
    there = next(path for path in (runs, *runs.resolve().parents) if path.exists())
    usage = shutil.disk_usage(there)
    few = "" if usage.free > SPACE else "; set runs= to another disk, or log.keep=1"
    yield ("note" if few else "ok"), f"{runs}/ would have {usage.free / 1e9:.0f} GB free{few}"
    if not os.access(there, os.W_OK):
        yield "bad", f"{there} cannot be written; set runs= to another folder"
    if Path("/dev/shm").is_dir() and (free := shutil.disk_usage("/dev/shm").free) < 64e6:
        yield "note", f"/dev/shm has {free / 1e6:.0f} MB free, and NCCL wants more: docker run --ipc=host"


def _self_test() -> Iterator[Row]:
    """Losses of a small I-JEPA by what runs here and by the references, and a step of the optimiser."""
    import torch

    begin = time.perf_counter()
    from ijepa_fast import kernels
    from ijepa_fast.config import load_config
    from ijepa_fast.engine.engine import choose_device
    from ijepa_fast.kernels.common import dispatch
    from ijepa_fast.run.build import build_method

    small = ["data.source=synthetic", "batch_size=8", "mask.min_keep=1"]
    sizes = [f"model.{name}" for name in ("dim=64", "depth=2", "heads=2", "predictor_depth=1")]
    method = build_method(load_config("quickstart", [*small, *sizes]))
    device = choose_device("auto")
    importlib.import_module("deepspeed")
    draw = method.draw(8, 0, 0)
    for network in method.networks.values():
        network.to(device)
    images = torch.randint(256, (8, 64, 64, 3), dtype=torch.uint8, device=device)
    before, losses = {op: dispatch.choice(op) for op in dispatch.OPS}, []
    for implementation in ("auto", "reference"):
        kernels.use(implementation)
        loss = method(images, draw.to(device, non_blocking=True))[0]
        method.zero_grad()
        loss.backward()
        losses.append(float(loss.detach()))
    kernels.use(before)
    finite = all(bool(p.grad.isfinite().all()) for p in method.parameters() if p.grad is not None)
    seconds = time.perf_counter() - begin
    if finite and abs(losses[0] - losses[1]) <= TOLERANCE * abs(losses[1]):
        yield "ok", f"loss and gradients of a small I-JEPA are those of the reference; {seconds:.0f} s"
    else:
        yield "bad", f"loss {losses[0]:.6f}, and {losses[1]:.6f} by the reference; set kernels=reference and report it"


class _quiet:
    """Nothing is printed in the block."""

    def __enter__(self) -> None:
        self._out, self._err = sys.stdout, sys.stderr
        sys.stdout = sys.stderr = io.StringIO()

    def __exit__(self, *error: object) -> None:
        sys.stdout, sys.stderr = self._out, self._err


if __name__ == "__main__":
    sys.exit(main())
