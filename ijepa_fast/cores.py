"""How many cores this process may use: those it is bound to, and no more than its container was given."""

from __future__ import annotations

import os
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")


def cores(cgroups: Path = CGROUPS) -> int:
    """Cores that this process may use, at least one: its affinity, and the CPU quota of its cgroup, rounded up."""
    bound = len(os.sched_getaffinity(0))
    limit = _quota(cgroups)
    return bound if limit is None else max(1, min(bound, limit))


def threads(ranks: int, cgroups: Path = CGROUPS) -> int:
    """Threads of one of `ranks` processes of this machine: OMP_NUM_THREADS where it is set, else its share of cores."""
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    if asked.isdigit() and int(asked) > 0:
        return int(asked)
    return max(1, cores(cgroups) // ranks)


def _quota(root: Path) -> int | None:
    """CPUs that the tightest of this process's cgroups may use, rounded up; None without a limit."""
    limits = []
    for version, path in _groups():
        folder = root / path.lstrip("/") if version == 2 else root / "cpu" / path.lstrip("/")
        top = root if version == 2 else root / "cpu"
        # In a container the path may be that of the host, and the container's own group is mounted at the top.
        for place in {folder, top, *(parent for parent in folder.parents if parent.is_relative_to(top))}:
            limits += _read(place)
    return min(limits, default=None)


def _groups() -> list[tuple[int, str]]:
    """(version, path) of the cgroups that govern this process's CPU time."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            found.append((2, path))
        elif "cpu" in controllers.split(","):
            found.append((1, path))
    return found


def _read(folder: Path) -> list[int]:
    """The quota in a cgroup's folder, rounded up; [] where there is none."""
    try:
        if (folder / "cpu.max").is_file():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
        return [] if quota in ("max", "-1") else [-(-int(quota) // int(period))]
    except (OSError, ValueError, ZeroDivisionError):
        return []
