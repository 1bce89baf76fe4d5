"""What one rank does, or fails to do, all ranks learn: none of them waits for another that has given up."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from ijepa_fast.run import pulse

T = TypeVar("T")
LOST = ("closed by peer", "reset by peer", "timed out", "timeout", "broken pipe", "refused", "nccl", "fullmesh")
HEAD_START = 2.0  # seconds in which the rank that met an error says it, before those that lost it do


def together(work: Callable[[], T], group: Any = None) -> list[T]:
    """What `work` returns on each rank, in their order. Called by every rank, and done on all of them when it returns.

    Where it raises ValueError or OSError on any rank, all raise the first one's. Results are small: they are pickled.
    group: of all ranks, by which they are told; None: the default one.
    """
    mine: tuple[Any, Any]  # what `work` returned, or the error
    try:
        mine = work(), None
    except (ValueError, OSError) as error:
        mine = None, error
    everyone: list[tuple[Any, Any]] = [mine] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, mine, group)
    for _, met in everyone:
        if met is not None:
            met.met_by_all = True
            raise met
    return [result for result, _ in everyone]


def on_first(work: Callable[[], T], group: Any = None) -> T:
    """What `work` returns on rank 0, where alone it is called; if it raises ValueError or OSError, all ranks do."""
    results: list[Any] = together(lambda: work() if torch.distributed.get_rank() == 0 else None, group)
    return results[0]


def sentence(error: Exception) -> str | None:
    """What a rank is to say of the error that ends it: "" where another says it, None where a traceback should.

    An error that all ranks meet is said by rank 0; one that a rank may have met alone, with its number; that another
    rank is gone, after that one had the time to say why.
    """
    rank = os.environ.get("RANK", "0")
    name = pulse.name(int(rank))
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    lost = several and isinstance(error, RuntimeError) and any(word in str(error).lower() for word in LOST)
    if isinstance(error, RuntimeError) and not lost:
        return None
    alike = isinstance(error, ValueError) and not torch.distributed.is_initialized()  # all of a machine read the same
    if alike and os.environ.get("LOCAL_RANK", "0") != "0" and not getattr(error, "of_this_rank", False):
        return ""
    if rank != "0" and getattr(error, "met_by_all", False):
        return ""
    if lost:
        time.sleep(HEAD_START)
        said = " ".join(str(error).split())
        heard = pulse.last_heard()
        if not torch.distributed.is_initialized():
            known = f" ({heard})" if heard else ""
            return f"error: {name} waited in vain for all {os.environ.get('WORLD_SIZE')} ranks to start{known}: {said}"
        return (
            f"error: {name} lost another rank, which ended or was silent for engine.timeout seconds "
            f"({heard or 'which is not known'}): {said}"
        )
    if rank == "0":
        return f"error: {error}"
    time.sleep(HEAD_START)
    return f"error: {name}: {error}"
