"""When a run saves or ends before its time: signals, a launcher that is gone, the clock, a checkpoint that cannot be
written. All ranks decide alike.

A signal sets a flag. After each step the ranks exchange their flags, on the host, while the device goes on: what they
agreed on is read a step later, when it has long arrived. So all of them save after the same step. A thread does the
listening, because Python's own handlers do not run while the main thread waits for other ranks.
"""

from __future__ import annotations

import ctypes
import datetime
import os
import select
import signal
import sys
import threading
import time
from types import TracebackType

import torch

from ijepa_fast.ranks import STARTED_BY

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
SAME = 2.0  # seconds in which further signals are the first again: a launcher passes on what its ranks already got
PATIENCE = 120.0  # seconds, at least, in which a step must end after a signal; three steps where those are longer
LAUNCHERS = (b"deepspeed", b"torchrun", b"torch.distributed")
_PR_SET_PDEATHSIG = 1


class Stopped(Exception):
    """The run was saved after a signal. status: the exit status, 128 + the signal's number."""

    def __init__(self, number: int, step: int):
        super().__init__(f"stopped by {_name(number)} after step {step}, saved; the same command continues")
        self.status = 128 + number


def follow_launcher() -> None:
    """Let this process get SIGTERM when the launcher that started it ends; without a launcher, do nothing."""
    if _launched(os.getppid()):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


class Stop:
    """What `after(step)` says once a step is done: which signal ends the run there, whether a checkpoint is due, and
    whether something beside the steps failed on a rank, such as writing the last one.

    A context; inside of it, SIGNALS do no more than set the flag, but a second one (after two seconds) ends the process
    at once. One that was ignored before stays so.

    minutes: between two checkpoints; 0: the clock asks for none. timeout: seconds to wait for the other ranks.
    """

    def __init__(self, minutes: float, timeout: int):
        self._period, self._saved = 60 * minutes, time.monotonic()
        self._signal, self._came, self._noticed, self._saving = 0, 0.0, False, False
        self._step_ended, self._longest = time.monotonic(), 0.0
        alone = torch.distributed.get_world_size() == 1
        bound = datetime.timedelta(seconds=timeout)
        self._group = None if alone else torch.distributed.new_group(backend="gloo", timeout=bound)
        self._asked: tuple[torch.distributed.Work, torch.Tensor] | None = None

    def __enter__(self) -> Stop:
        self._launcher = _launcher()
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._before = {n: signal.getsignal(n) for n in SIGNALS if signal.getsignal(n) is not signal.SIG_IGN}
        for number in self._before:
            signal.signal(number, lambda *_: None)  # the thread has it from the wakeup descriptor
            signal.siginterrupt(number, False)
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():  # once stopped, what the launcher passes on later is no news
            signal.signal(number, signal.SIG_IGN if isinstance(error, Stopped) else handler)
        signal.set_wakeup_fd(self._wakeup)
        os.write(self._writer, b"\0")
        self._thread.join()
        os.close(self._reader)
        os.close(self._writer)

    def after(self, step: int, failed: bool) -> tuple[int, bool, bool]:
        """(number of the signal to end by, or 0; whether a checkpoint is due; whether any rank has failed beside its
        steps), the same on all ranks.

        failed: whether this rank has. Called by every rank when step `step` is done. With several ranks it is what
        they had to say a step ago.
        """
        now = time.monotonic()
        self._longest, self._step_ended = max(self._longest, now - self._step_ended), now
        due = self._period > 0 and now - self._saved >= self._period
        mine = torch.tensor([self._signal, due, failed], dtype=torch.int32)
        if self._group is None:
            agreed = mine
        else:
            agreed = torch.zeros_like(mine) if self._asked is None else _answer(*self._asked)
            work = torch.distributed.all_reduce(mine, torch.distributed.ReduceOp.MAX, self._group, async_op=True)
            self._asked = work, mine
        self._noticed = bool(agreed[0])
        return int(agreed[0]), bool(agreed[1]), bool(agreed[2])

    def saving(self) -> None:
        """A checkpoint is begun, which may wait for the last one: no step has to end until `saved`."""
        self._saving = True

    def saved(self) -> None:
        """The state was copied: the clock starts again. Called by every rank."""
        self._saving = False
        if self._asked is not None:
            _answer(*self._asked)[1] = 0
        self._saved = self._step_ended = time.monotonic()

    def _listen(self) -> None:
        while True:
            if select.select([self._reader], [], [], 1.0)[0]:
                for number in os.read(self._reader, 64):
                    if number == 0:
                        return
                    if number in SIGNALS:
                        self._hear(number)
            elif not self._signal and _launcher() != self._launcher:
                self._hear(signal.SIGTERM)
            patience = max(PATIENCE, 3 * self._longest)
            if self._signal and not (self._noticed or self._saving) and time.monotonic() - self._came > patience:
                self._end(self._signal, f"no step ended for {patience:.0f} s after {_name(self._signal)}")

    def _hear(self, number: int) -> None:
        if number == signal.SIGHUP:
            _leave_terminal()
        if not self._signal:
            self._signal, self._came = number, time.monotonic()
        elif time.monotonic() - self._came > SAME:
            self._end(number, f"a second signal, {_name(number)}")

    @staticmethod
    def _end(number: int, why: str) -> None:
        print(f"\nstopped at once: {why}; the same command continues from the last checkpoint", file=sys.stderr)
        os._exit(128 + number)


def _name(number: int) -> str:
    return signal.Signals(number).name


def _leave_terminal() -> None:
    """Write no more to a terminal that is gone, which would be an error."""
    with open(os.devnull, "w") as nowhere:
        for descriptor in (1, 2):
            if os.isatty(descriptor):
                os.dup2(nowhere.fileno(), descriptor)


def _answer(work: torch.distributed.Work, agreed: torch.Tensor) -> torch.Tensor:
    work.wait()
    return agreed


def _launcher() -> tuple[int, int]:
    """The process that started this one and, where it is a launcher, the one that started that; both change at an end.

    `deepspeed` starts a launch.py on each machine, which starts the ranks.
    """
    parent = os.getppid()
    return parent, _parent_of(parent) if _launched(parent) else 0


def _launched(parent: int) -> bool:
    if os.environ.get(STARTED_BY) == str(parent):
        return True
    try:
        with open(f"/proc/{parent}/cmdline", "rb") as file:
            command = file.read()
    except OSError:
        return False
    return any(name in command for name in LAUNCHERS)


def _parent_of(process: int) -> int:
    try:
        with open(f"/proc/{process}/stat", "rb") as file:
            return int(file.read().rpartition(b")")[2].split()[1])
    except OSError:
        return 0
