"""The checkpoint that a run goes on from: the newest one that is what was written."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from ijepa_fast.interop.weights import checkpoints, step_of
from ijepa_fast.run.checkpoint import CheckpointError, Damaged, clear, read_state
from ijepa_fast.run.digests import damage
from ijepa_fast.run.together import on_first, together


def choose(folder: Path, resume: bool | str) -> Path | None:
    """The checkpoint of the run in `folder` to go on from, None where it has none. Called by every rank.

    resume: true: the newest that verifies, and what is wrong with newer ones is said; "step-<number>": that one; false:
    the run must be a new one. Every rank reads its share of the files. Raises CheckpointError on all ranks.
    """
    on_first(lambda: clear(folder))
    found = on_first(lambda: checkpoints(folder))
    if not found:
        if isinstance(resume, str):
            raise CheckpointError(f"resume={resume}: {folder} holds no checkpoint")
        return None
    if resume is False:
        raise CheckpointError(f"{folder} holds a run (resume=false): set another name, or remove it")
    if isinstance(resume, str):
        path = next((path for path in found if step_of(path) == int(resume.removeprefix("step-"))), None)
        if path is None:
            there = ", ".join(path.name for path in found)
            raise CheckpointError(f"resume={resume}: {folder} has no such checkpoint; there are {there}")
        if wrong := wrong_with(path):
            raise CheckpointError(f"{wrong}; resume=true goes on from the newest checkpoint that verifies")
        return path
    all_wrong: list[str] = []
    for path in reversed(found):
        wrong = wrong_with(path)
        if wrong is None:
            if all_wrong:
                lost = step_of(found[-1]) - step_of(path)
                _say(f"WARNING: {'; '.join(all_wrong)}. Going on from {path}, which verifies: {lost} steps before.")
            return path
        all_wrong.append(wrong)
    raise CheckpointError(
        f"{'; '.join(all_wrong)}: no checkpoint of the run verifies; restore one, or set another name"
    )


def wrong_with(path: Path) -> str | None:
    """What makes the checkpoint unfit to go on from, None where it verifies. Called by every rank."""
    try:
        state = on_first(lambda: read_state(path))
    except Damaged as error:
        return str(error)
    if state["format"] < 3:
        _say(
            f"{path} was written by an earlier version, which drew masks by rank and micro-batch: from here they are "
            f"drawn by an image's place in the batch, of the same distribution"
        )
    if state["format"] == 1:
        _say(f"{path} was written by an earlier version, which kept no digests: it cannot be verified")
        return None
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    mine = list(state["files"].items())[rank::ranks]
    found = together(lambda: [wrong for name, known in mine if (wrong := damage(path / name, known))])
    wrong = [name for names in found for name in names]
    return f"{path}: {', '.join(wrong)}" if wrong else None


def set_newer_aside(path: Path) -> None:
    """Rename the run's checkpoints that are newer than `path`, which the run goes on from: they are of another future.

    step-00000500 becomes step-00000500.aside, which nothing reads or removes. Called by rank 0.
    """
    for newer in checkpoints(path.parents[1]):
        if step_of(newer) > step_of(path):
            aside, number = newer.with_name(f"{newer.name}.aside"), 1
            while aside.exists():
                number += 1
                aside = newer.with_name(f"{newer.name}.aside{number}")
            newer.rename(aside)
            _say(f"{newer} is set aside as {aside.name}")


def _say(text: str) -> None:
    if torch.distributed.get_rank() == 0:
        print(text, file=sys.stderr)
