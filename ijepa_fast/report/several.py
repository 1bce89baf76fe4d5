"""The page of several runs: what differs in what they learned, in their curves, and in their settings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ijepa_fast.data.kinds import printable
from ijepa_fast.eval.figures import headline
from ijepa_fast.report import sections
from ijepa_fast.report.page import Markup, page, table, text
from ijepa_fast.report.recorded import Recorded, read_run
from ijepa_fast.spelling import shown

NAMES = ("name", "runs")  # settings that say where a run lies, and not what it does


def report(folders: Sequence[str | Path]) -> str:
    """The page of the runs in these folders, as HTML; differences are from the first of them.

    Raises ValueError for a folder that is no run, and one that is named twice.
    """
    places = [Path(folder).resolve() for folder in folders]
    if twice := next((str(folder) for folder, place in zip(folders, places) if places.count(place) > 1), None):
        raise ValueError(f"{twice}: named twice; name runs that are to be compared once each")
    runs = [read_run(folder) for folder in folders]
    names = sections.labels(runs)
    parts = [("Probes", sections.compared(runs) + sections.probes(runs))]
    parts += [("Settings", _settings(runs)), ("Training", sections.training(runs)), ("Speed", sections.speed(runs))]
    parts += [("Health", sections.health(runs)), ("Where from", _facts(runs))]
    return page(" against ".join(names), {}, parts, footer=", ".join(str(run.folder) for run in runs), lead=_lead(runs))


def _lead(runs: Sequence[Recorded]) -> str:
    """What each run tells better than the first, and what is missing."""
    names = sections.labels(runs)
    lead = ""
    first = {(f.task, f.probe, f.metric): f for f in headline(runs[0].figures)}
    for run, name in list(zip(runs, names))[1:]:
        pairs = [sections.comparable(f, first.get((f.task, f.probe, f.metric))) for f in headline(run.figures)]
        words = "better", "worse", "no difference"
        said, kind = sections.said_of([f for f in pairs if f is not None], *words)
        why = "their standard errors are not known" if any(pairs) else "no figures to compare"
        lead += text(f"{name} against {names[0]}: {said or f'no verdict, {why}'}.", f"verdict {kind}".strip())
    for run, name in zip(runs, names):
        lead += "".join(text(f"{name}: {sentence}", "note") for sentence in run.missing)
    return lead


def _settings(runs: Sequence[Recorded]) -> str:
    """The table of settings that are not the same in all runs."""
    keys = dict.fromkeys(key for run in runs for key in run.flat if key not in NAMES)
    different = [key for key in keys if len({repr(run.flat.get(key)) for run in runs}) > 1]
    if not different:
        return text(f"The same configuration, but for {' and '.join(NAMES)}.")
    rows = [[key, *(_shown(run.flat[key]) if key in run.flat else "not set" for run in runs)] for key in different]
    return text(f"{len(different)} of {len(keys)} settings differ.") + table(
        ["", *_heads(runs)], rows, words=len(runs) + 1
    )


def _shown(value: Any) -> str:
    return printable(value) if isinstance(value, str) else shown(value)


def _facts(runs: Sequence[Recorded]) -> str:
    """The table of dates, machines, commits, commands and head figures."""
    facts = [run.facts() for run in runs]
    cards = [sections.cards(run) for run in runs]
    rows = [[key, *(Markup(card.get(key, "")) for card in cards)] for key in dict.fromkeys(k for c in cards for k in c)]
    rows += [[key, *(found[key] for found in facts)] for key in facts[0]]
    return table(["", *_heads(runs)], rows, words=len(runs) + 1)


def _heads(runs: Sequence[Recorded]) -> list[Markup]:
    return [sections.coloured(name, number) for number, name in enumerate(sections.labels(runs))]
