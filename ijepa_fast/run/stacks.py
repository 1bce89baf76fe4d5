"""What every thread of this rank is doing, on SIGQUIT (Ctrl-\\, `kill -QUIT`): for a run that hangs. It goes on.

The stacks are taken in C, as Python's own handlers do not run while the main thread waits for other ranks; a thread
puts the rank before each line, since launchers mix the output of all.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading

from ijepa_fast.run import pulse


def follow() -> None:
    """Listen to SIGQUIT from now on, where this process does not ignore it."""
    if signal.getsignal(signal.SIGQUIT) == signal.SIG_IGN:
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)  # who takes the stacks never waits for who prints them
    faulthandler.register(signal.SIGQUIT, file=writer, all_threads=True)
    threading.Thread(target=_tell, args=(reader,), name="stacks", daemon=True).start()


def _tell(reader: int) -> None:
    with open(reader, errors="replace") as lines:
        for line in lines:
            rank = pulse.name(int(os.environ.get("RANK", 0)))
            if "most recent call first" in line:
                line = f"{line.rstrip()} {pulse.doing()}\n"
            sys.stderr.write(f"{rank} | {line}")
            sys.stderr.flush()
