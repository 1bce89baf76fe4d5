"""When each rank was last heard of: once a second it says so, in the store where the ranks have met.

So a rank that loses the others, or waits for one in vain, can name it.
"""

from __future__ import annotations

import json
import threading
import time
from typing import Any

EVERY = 1.0  # seconds between two signs of a rank
ANSWER = 5.0  # seconds in which the store must answer
NAMED = 4  # ranks, at most, that `last_heard` names


class _Pulse:
    """This rank's own: the steps that it has done, and what it is at."""

    def __init__(self, rank: int, ranks: int, store: Any):
        self.rank, self.ranks = rank, ranks
        self.step, self.doing = 0, "starting"
        # Connections of their own: one that waits for a store that is gone holds up nobody.
        self._store, self._asked = store.clone(), store.clone()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._tell, name="pulse", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Say no more: a thread that comes back from the store while the interpreter ends would abort the process."""
        self._ended.set()
        self._thread.join(ANSWER)

    def _tell(self) -> None:
        try:
            while True:
                self._store.set(f"pulse/{self.rank}", json.dumps([time.time(), self.step, self.doing]))
                if self._ended.wait(EVERY):
                    return
        except Exception:  # rank 0, which keeps the store, is gone: so is the run
            return

    def heard(self) -> dict[int, tuple[float, int, str]]:
        """{rank: (seconds since its last sign, steps it had done, what it was at)}; empty without the store."""
        found: dict[int, tuple[float, int, str]] = {}

        def ask() -> None:
            for rank in range(self.ranks):
                if self._asked.check([f"pulse/{rank}"]):
                    told, step, doing = json.loads(self._asked.get(f"pulse/{rank}"))
                    found[rank] = max(0.0, time.time() - told), step, doing

        asking = threading.Thread(target=_quietly, args=(ask,), daemon=True)
        asking.start()
        asking.join(ANSWER)
        return dict(found)


_own: list[_Pulse] = []
_hosts: list[str] = []
_now: list[tuple[int, str]] = [(0, "starting")]  # of this rank, whether there are others or not


def name(rank: int) -> str:
    """For a message: rank 3, or rank 3 on node-1 where the ranks are known to be on several machines."""
    return f"rank {rank} on {_hosts[rank]}" if len(set(_hosts)) > 1 else f"rank {rank}"


def begin(rank: int, hosts: list[str], store: Any) -> None:
    """Tell the others from now on. Called by every rank that has met the others. hosts: the machine of each rank.

    store: where they have met; None for one rank alone.
    """
    _hosts[:] = hosts
    _own[:] = [_Pulse(rank, len(hosts), store)] if store is not None else []


def end() -> None:
    """Tell nothing any more. Called before the process ends."""
    while _own:
        _own.pop().end()


def at(step: int, doing: str) -> None:
    """What this rank is at, after `step` steps."""
    _now[0] = step, doing
    for own in _own:
        own.step, own.doing = step, doing


def doing() -> str:
    """For a message, what this rank is at."""
    return f"{_now[0][1]} after step {_now[0][0]}"


def last_heard() -> str:
    """For a message, which ranks were last heard of when, the longest silent first; "" on a run of one rank.

    The clocks of the machines are taken for equal.
    """
    if not _own:
        return ""
    heard = _own[0].heard()
    if not heard:
        return f"{name(0)}, which knows of all ranks, does not answer"
    silent = sorted(heard, key=lambda rank: (-round(heard[rank][0] / (3 * EVERY)), heard[rank][1], rank))
    words = [_words(rank, *heard[rank]) for rank in silent[:NAMED]]
    return f"last heard of: {'; '.join(words)}"


def _words(rank: int, ago: float, step: int, doing: str) -> str:
    return f"{name(rank)} {ago:.0f} s ago, {doing} after step {step}"


def _quietly(work: Any) -> None:
    try:
        work()
    except Exception:
        return
