"""Several ranks of one machine, without a launcher of others: `train --ranks 2`."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGQUIT)
STARTED_BY = "IJEPA_FAST_STARTED_BY"  # in a rank's environment: the process that started it
GRACE = 30.0  # seconds for the other ranks to say why they end, once one has failed


def start(count: int, arguments: list[str]) -> int:
    """Start `count` ranks of `train` on this machine and wait for them. Returns the exit status of the first to fail.

    Signals are passed on. Where a rank fails, the others get GRACE seconds, then SIGTERM, then SIGKILL.
    """
    world = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), STARTED_BY: str(os.getpid())}
    world |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, str(Path(__file__).with_name("train.py")), *arguments]
    environment = os.environ | world
    ranks: list[subprocess.Popen] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        for rank in ranks:
            if rank.poll() is None:
                rank.send_signal(number)

    heard = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, pass_on) for number in heard}
    try:
        for name in map(str, range(count)):
            ranks.append(subprocess.Popen(command, env=environment | {"RANK": name, "LOCAL_RANK": name}))
        return _wait(ranks)
    finally:
        for rank in ranks:
            rank.kill()
        for number, handler in before.items():
            signal.signal(number, handler)


def free_port() -> int:
    """A port of this machine that nobody uses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def _wait(ranks: list[subprocess.Popen]) -> int:
    status, failed = 0, 0.0
    while None in [rank.poll() for rank in ranks]:
        ended = [rank.returncode for rank in ranks if rank.returncode]
        if ended and not failed:
            status, failed = ended[0], time.monotonic()
        if failed and time.monotonic() - failed > GRACE:
            for rank in ranks:
                rank.terminate()
            time.sleep(GRACE / 10)
            break
        time.sleep(0.05)
    status = status or next((rank.returncode for rank in ranks if rank.returncode), 0)
    return 128 - status if status < 0 else status
