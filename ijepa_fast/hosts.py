"""Several machines by a hostfile: it is read, and each machine reached, before DeepSpeed's launcher starts ranks."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

LINE = re.compile(r"(\S+)\s+slots=([1-9]\d*)\s*(?:#.*)?$")
SECONDS = 10  # for a machine to answer


class HostsError(ValueError):
    """A hostfile, or a machine of it, that a user can mend."""


def start(hostfile: str, arguments: list[str]) -> NoReturn:
    """Become DeepSpeed's launcher of `train` with these arguments. Raises HostsError for what a user can mend."""
    check(hostfile)
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", hostfile]
    os.execv(sys.executable, [*launcher, str(Path(__file__).with_name("train.py")), *arguments])


def check(hostfile: str) -> None:
    """Raises HostsError, naming the machine, where one of a hostfile cannot be reached, or a line cannot be read."""
    machines = read(hostfile)
    if len(machines) > 1 and shutil.which("pdsh") is None:
        raise HostsError("--hostfile: there is no pdsh here, by which DeepSpeed starts ranks elsewhere; install pdsh")
    for name, reason in unreached(list(machines)).items():
        raise HostsError(
            f"{hostfile}: {name} cannot be reached by ssh ({reason}); mend its name in the hostfile, or see to it that "
            f"`ssh {name} true` works without a password"
        )


def read(hostfile: str) -> dict[str, int]:
    """The machines of a hostfile, with the number of ranks of each. Raises HostsError naming the line."""
    try:
        lines = Path(hostfile).read_text(errors="replace").splitlines()
    except OSError as error:
        raise HostsError(f"--hostfile: {hostfile} cannot be read: {error.strerror}") from None
    machines: dict[str, int] = {}
    for number, line in enumerate(map(str.strip, lines), 1):
        if not line or line.startswith("#"):
            continue
        found = LINE.match(line)
        if found is None:
            raise HostsError(f"{hostfile}, line {number}: expected a line such as `node-1 slots=8`, got {line!r}")
        name, slots = found.groups()
        if name in machines:
            raise HostsError(f"{hostfile}, line {number}: {name} is named twice; name it once, with all its slots")
        machines[name] = int(slots)
    if not machines:
        raise HostsError(f"{hostfile}: names no machine; write a line such as `node-1 slots=8` for each")
    return machines


def unreached(machines: list[str]) -> dict[str, str]:
    """Machines on which ssh cannot run a command without being asked something, and why; all are tried at once."""
    options = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={SECONDS}"]
    try:
        tries = {
            name: subprocess.Popen(
                ["ssh", *options, "--", name, "true"], stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
            )
            for name in machines
        }
    except FileNotFoundError:
        raise HostsError("--hostfile: there is no ssh here; install an OpenSSH client") from None
    said = {name: attempt.communicate()[1] for name, attempt in tries.items()}
    return {
        name: ([line for line in said[name].splitlines() if line.strip()] or ["no reason given"])[-1].removeprefix(
            "ssh: "
        )
        for name, attempt in tries.items()
        if attempt.returncode
    }
