"""The ranks of a run meet before they compute: each says on which machine it is and what it is about to run.

Rank 0 compares, in the store where they meet and before any group of processes is made, and all ranks hear what is
wrong: one that cannot begin, another version or configuration on one machine, and which ranks have not come.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

import ijepa_fast
from ijepa_fast import kernels
from ijepa_fast.config import Config, ConfigError, flatten
from ijepa_fast.engine import engine
from ijepa_fast.run import pulse
from ijepa_fast.run.together import on_first, together

T = TypeVar("T")
EVERY = 0.2  # seconds between two looks into the store
SAY = 30.0  # seconds after which rank 0 says whom it waits for
GRACE = 5.0  # seconds in which the others may say their error, once one rank has
SHOWN = 5.0  # seconds between two clocks that are worth a line
UNLIKE = 30.0  # seconds in which what one machine wrote must be seen by the others
# Keys that each machine may have its own value of: where things lie, and who reads them.
OWN = ("runs", "data.source", "data.cache", "data.threads", "data.prefetch", "probe.train", "probe.test")


class NotAlike(ConfigError):
    """The ranks cannot begin together; all of them raise it."""

    met_by_all = True


@dataclass
class Met:
    """rank: this one. store: where the ranks have met; None for one rank alone. hosts: of each rank."""

    rank: int
    store: Any
    hosts: list[str]


def meet(config: Config | None, device: str = "", error: str = "") -> Met:
    """Wait for all ranks and compare what they are about to run. Called by every rank.

    device: kind of device of this rank. error: why this rank cannot begin, with which config may be None.
    Raises NotAlike on all ranks, with one sentence that names the machine, and RuntimeError where the rank that keeps
    the store does not answer.
    """
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    host = socket.gethostname()
    if ranks == 1:
        return Met(0, None, [host])
    seconds = max(engine.RENDEZVOUS, config.engine.timeout) if config is not None else 4 * GRACE
    store = _store(rank, seconds)
    store.set(f"rank/{rank}", json.dumps({"host": host, "error": error, "same": _same(config, device)}))
    verdict = _judge(store, ranks, seconds) if rank == 0 else _hear(store, seconds + SAY)
    if verdict["error"]:
        raise NotAlike(verdict["error"])
    if config is not None:
        store.set_timeout(datetime.timedelta(seconds=config.engine.timeout))  # from here on, nobody is late
    os.environ.setdefault("LOCAL_WORLD_SIZE", str(verdict["hosts"].count(host)))  # DeepSpeed's launcher sets none
    return Met(rank, store, verdict["hosts"])


def give_up(error: str) -> str:
    """Tell the others why this rank cannot begin. Returns what it is to say itself: rank 0 speaks for all."""
    try:
        meet(None, error=error)
    except NotAlike as told:
        return str(told) if os.environ["RANK"] == "0" else ""
    except (ConfigError, RuntimeError):
        pass
    return f"{socket.gethostname()}: {error}" if os.environ.get("LOCAL_RANK", "0") == "0" else ""


def alike(prepare: Callable[[], T]) -> T:
    """What `prepare` returns here. Where it raises ValueError or OSError on any rank, all raise the first one's.

    The error says which machine, where others did not meet it.
    """
    made: list[T] = []

    def work() -> str:
        try:
            made.append(prepare())
        except (ValueError, OSError) as error:
            return str(error)
        return ""

    errors = together(work)
    met = [rank for rank, error in enumerate(errors) if error]
    if met:
        where = "" if len(met) == len(errors) else f"{pulse.name(met[0])}: "
        raise NotAlike(where + errors[met[0]])
    return made[0]


def alone(met: Met, work: Callable[[], Any]) -> None:
    """Do `work` on rank 0, however long it takes; where it raises ValueError or OSError, all ranks do.

    The others do not wait in a group of processes, whose limit is that of a step.
    """
    error: Exception | None = None
    if met.rank == 0:
        try:
            work()
        except (ValueError, OSError) as found:
            error = found
        finally:
            if met.store is not None:
                met.store.set("alone", "done")
    else:
        while not met.store.check(["alone"]):
            time.sleep(EVERY)

    def tell() -> None:
        if error is not None:
            raise error

    try:
        on_first(tell)
    finally:
        _part(met)


def _part(met: Met) -> None:
    """Let rank 0, with which the store may end, go last: the others have then heard all that it said."""
    if met.store is None:
        return
    deadline = time.monotonic() + GRACE
    with suppress(RuntimeError):
        met.store.add("parted", int(met.rank > 0))
        while met.rank == 0 and met.store.add("parted", 0) < len(met.hosts) - 1 and time.monotonic() < deadline:
            time.sleep(EVERY)


def same_data(data: dict[str, Any] | None, source: str) -> None:
    """Raise NotAlike on all ranks where one of them has other training images. data: as run.sources.identity."""
    found = together(lambda: data)
    for rank, other in enumerate(found):
        if other != found[0]:
            counts = [f"{each['images']} images" if each else "random images" for each in (other, found[0])]
            more = ", as many, of other names or in another order" if counts[0] == counts[1] else ""
            raise NotAlike(
                f"data.source={source}: {pulse.name(rank)} has {counts[0]}{more}, where {pulse.name(0)} has "
                f"{counts[1]}; copy the same images to all machines, or name a folder that they share"
            )


def same_folder(folder: Path, met: Met) -> None:
    """Raise NotAlike on all ranks where a machine does not see the run's folder, which rank 0 holds by its lock."""
    if len(set(met.hosts)) == 1:
        return
    lock = folder / "checkpoints" / ".lock"
    written = together(lambda: _read(lock))[0]
    deadline = time.monotonic() + UNLIKE

    def look() -> bool:
        while _read(lock) != written and time.monotonic() < deadline:  # file systems of a network show it later
            time.sleep(1)
        return _read(lock) == written

    for rank, seen in enumerate(together(look)):
        if not seen:
            raise NotAlike(
                f"runs: {pulse.name(rank)} does not see {folder} of {pulse.name(0)}; set runs to a folder that all "
                f"machines share"
            )


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _store(rank: int, seconds: float) -> Any:
    """Where the ranks meet: kept by torchrun where that started them, else by rank 0."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    kept = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        store = torch.distributed.TCPStore(
            address,
            port,
            is_master=rank == 0 and not kept,
            timeout=datetime.timedelta(seconds=seconds),
            wait_for_workers=False,
            multi_tenant=True,
        )
    except RuntimeError as error:
        raise engine.port_in_use(error) or error from None
    return torch.distributed.PrefixStore(f"start-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def _same(config: Config | None, device: str) -> dict[str, Any]:
    """What must be the same on all ranks, by what it is called in a message."""
    if config is None:
        return {}
    found: dict[str, Any] = {
        "ijepa_fast ": f"{ijepa_fast.__version__}, code {_digest()}",
        "torch ": torch.__version__,
        "a device of kind ": device,
    }
    settings = {f"{key}=": value for key, value in flatten(config).items() if key not in OWN}
    plain: dict[str, Any] = json.loads(json.dumps(found | settings, default=str))
    return plain


def _digest() -> str:
    """A short digest of the package's Python files, and of the kernels', which a checkout has beside it."""
    digest = hashlib.sha256()
    for folder in dict.fromkeys([str(Path(ijepa_fast.__file__).parent), *kernels.__path__]):
        for path in sorted(Path(folder).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:8]


def _judge(store: Any, ranks: int, seconds: float) -> dict[str, Any]:
    """Wait for every rank's record, tell all of them what comes of it, and wait until they have heard it."""
    began, said, failed = time.monotonic(), False, 0.0
    records: dict[int, dict[str, Any]] = {}
    while len(records) < ranks:
        for rank in set(range(ranks)) - records.keys():
            if store.check([f"rank/{rank}"]):
                records[rank] = json.loads(store.get(f"rank/{rank}"))
        now = time.monotonic()
        if any(record["error"] for record in records.values()):
            failed = failed or now
            if now - failed > GRACE:
                break
        if now - began > seconds:
            break
        if now - began > SAY and not said:
            said = True
            print(f"waiting for all {ranks} ranks to start: {_absent(records, ranks)}", file=sys.stderr, flush=True)
        time.sleep(EVERY if len(records) < ranks else 0)
    error = _wrong(records, ranks)
    if not error and len(records) < ranks:
        error = (
            f"waited in vain for all {ranks} ranks to start: {_absent(records, ranks)} after {seconds:.0f} s; is each "
            f"machine up, can it reach {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}, and did its rank end?"
        )
    hosts = [records[rank]["host"] for rank in sorted(records)]
    verdict = {"error": error, "hosts": hosts, "time": time.time()}
    store.set("verdict", json.dumps(verdict))
    deadline = time.monotonic() + GRACE
    while error and store.add("heard", 0) < len(records) - 1 and time.monotonic() < deadline:
        time.sleep(EVERY)  # the store may end with this process
    return verdict


def _hear(store: Any, seconds: float) -> dict[str, Any]:
    """What rank 0 has found. Says where this machine's clock is another."""
    deadline = time.monotonic() + seconds
    while not store.check(["verdict"]):
        if time.monotonic() > deadline:
            raise RuntimeError(f"timed out: rank 0 has not come in {seconds:.0f} s")
        time.sleep(EVERY)
    verdict: dict[str, Any] = json.loads(store.get("verdict"))
    ahead = time.time() - verdict["time"]
    store.add("heard", 1)
    if abs(ahead) > SHOWN and os.environ.get("LOCAL_RANK", "0") == "0":
        way = "ahead of" if ahead > 0 else "behind"
        print(
            f"{socket.gethostname()}: its clock is {abs(ahead):.0f} s {way} that of {verdict['hosts'][0]}; let both "
            f"follow one time server",
            file=sys.stderr,
        )
    return verdict


def _wrong(records: dict[int, dict[str, Any]], ranks: int) -> str:
    """What keeps the ranks from beginning together, as one sentence; "" where nothing does."""
    failed = {rank: record for rank, record in records.items() if record["error"]}
    if failed:
        texts = {record["error"] for record in failed.values()}
        if len(texts) == 1 and len(failed) == ranks:
            return texts.pop()
        told = {(record["host"], record["error"]): None for _, record in sorted(failed.items())}
        return "; ".join(f"{host}: {text}" for host, text in told)
    first = records[0]
    for rank, record in sorted(records.items()):
        for what in first["same"].keys() | record["same"].keys():
            here, there = first["same"].get(what, "not set"), record["same"].get(what, "not set")
            if here != there:
                other = record["host"] if record["host"] != first["host"] else f"rank {rank}"
                own = first["host"] if record["host"] != first["host"] else "rank 0"
                return f"{other} has {what}{there}, where {own} has {what}{here}; start the same on all machines"
    return ""


def _absent(records: dict[int, dict[str, Any]], ranks: int) -> str:
    """Which ranks are there, by machine, and which are not."""
    there: dict[str, list[int]] = {}
    for rank, record in sorted(records.items()):
        there.setdefault(record["host"], []).append(rank)
    absent = [rank for rank in range(ranks) if rank not in records]
    present = "; ".join(f"{_numbers(numbers)} of {host}" for host, numbers in there.items())
    return f"{_numbers(absent)} {'has' if len(absent) == 1 else 'have'} not come ({present} there)"


def _numbers(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> ranks 0 to 2, 5."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][-1] + 1 == number:
            parts[-1].append(number)
        else:
            parts.append([number])
    words = [str(part[0]) if len(part) == 1 else f"{part[0]} to {part[-1]}" for part in parts]
    return f"rank{'s' if len(numbers) > 1 else ''} {', '.join(words)}"
