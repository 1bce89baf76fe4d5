"""The search of a run's learning rate, by factors of two, until the best one is inside of what was tried.

A trial is a whole run, shorter than the others, with a seed that none of them has. Its encoder is probed on training
images alone, half of which fit the linear head and half of which judge it: test images choose nothing.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from bench.compare.presets import at_rate
from bench.compare.runs import find
from bench.compare.tables import final
from bench.compare.train import Job, do
from ijepa_fast import configs
from ijepa_fast.config import load_config

SEED = 1000
MOST = 9  # trials: four factors of two to each side
LOST = float("-inf")


def first_rate(job: Job) -> float:
    """Where a search begins: the preset's rate, else the config's."""
    rate = job.preset.rate(job.name)
    return load_config(configs.find(job.images.config(job.run))).optim.lr if rate is None else rate


def search(job: Job, teachers: dict[str, Any]) -> dict[str, Any]:
    """The best learning rate for the run of `job`, which is as long as a trial; how it was found, for the record.

    teachers: what searches gave before, by run: a trial's frozen teacher is the best one's trial. A trial that the
    trainer gives up counts as the worst, unless it is the first. "inside" says whether worse ones lie on both sides.
    """
    start = first_rate(job)
    trials: dict[int, dict[str, Any]] = {}
    wanted = {-1, 0, 1}
    while wanted and len(trials) < MOST:
        for power in sorted(wanted, key=abs):
            trials[power] = trial(job, start * 2.0**power, teachers, must=power == 0)
        best = max(trials, key=lambda power: trials[power]["score"])
        wanted = {best - 1, best + 1} - trials.keys()
    tried = [trials[power] for power in sorted(trials)]
    score = trials[best]["score"]
    shown = [{key: value for key, value in found.items() if key != "score"} for found in tried]
    return {"rate": trials[best]["lr"], "score": score, "inside": not wanted, "trials": shown}


def trial(job: Job, rate: float, teachers: dict[str, Any], must: bool) -> dict[str, Any]:
    """One run of a search: its rate, its figures on held-out images, and its score, the accuracy of the linear probe.

    Of several labels the score is the mean. must: a trial that fails raises.
    """
    run = replace(
        job,
        seed=SEED,
        preset=replace(job.preset, probes=1, rates={}),
        out=folder_of(job, rate),
        extra=[*job.extra, *at_rate(rate, load_config(configs.find(job.images.config(job.run))))],
        ends=(),
        held=True,
        teachers=None if job.teacher is None else folder_of(job, teachers[job.teacher]["rate"]),
    )
    try:
        figures = final(do(run))
    except RuntimeError:
        if must:
            raise
        return {"lr": rate, "failed": True, "score": LOST}
    linear = [figure.value for figure in figures if figure.probe == "linear"]
    shown = {f"{figure.task}, {figure.probe}": figure.value for figure in figures}
    return {"lr": rate, "figures": shown, "score": sum(linear) / len(linear)}


def folder_of(job: Job, rate: float):
    """Of the trials with a learning rate."""
    return job.out / "search" / f"{rate:.4g}"


def searched(names: list[str]) -> list[str]:
    """The runs whose learning rates the runs `names` want: their own, or that of the run that they are like."""
    found: dict[str, None] = {}
    for name in names:
        while not (run := find(name)).searched:  # type: ignore[union-attr]
            name = run.like  # type: ignore[union-attr]
        found[name] = None
    return list(found)
