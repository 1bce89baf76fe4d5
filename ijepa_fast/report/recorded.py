"""What a run's folder holds, as far as it can be read: a page shows what there is and says what is missing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ijepa_fast.config import Config, flatten, load_config, present
from ijepa_fast.data.kinds import printable
from ijepa_fast.eval.figures import Figure, figures_of
from ijepa_fast.report.plots import parse_log
from ijepa_fast.report.summary import read_summary, train_seconds
from ijepa_fast.run.provenance import LAUNCHES
from ijepa_fast.run.speed import duration

Record = dict[str, Any]  # a line of the log
Series = dict[str, dict[str, tuple[list[int], list[float]]]]  # {metric: {label: (steps, values)}}


@dataclass
class Recorded:
    """A run as its folder tells it.

    folder, name: of the run; the name can be printed. config: None where it cannot be read. flat: every setting by
    its dotted key. yaml: the text of config.yaml. records: of the log; training: those with a loss. summary: None
    before the run's end. figures: of the summary. launches: where, when and how it was started.
    missing: sentences on what cannot be shown.
    """

    folder: Path
    name: str
    config: Config | None
    flat: dict[str, Any]
    yaml: str
    records: list[Record]
    training: list[Record]
    summary: dict[str, Any] | None
    figures: list[Figure]
    launches: list[dict[str, Any]]
    missing: list[str] = field(default_factory=list)

    @property
    def steps(self) -> int:
        """Steps that the log has seen."""
        return int(self.records[-1]["step"])

    def facts(self) -> dict[str, str]:
        """When, where, how long, of which commit and by which command: "not recorded" where nobody noted it."""
        said = self.summary or {}
        began, last = (self.launches[0], self.launches[-1]) if self.launches else ({}, {})
        dates = [str(found["date"])[:16].replace("T", " ") for found in (began, said) if found.get("date")]
        known = {key: said.get(key) or last.get(key) for key in ("host", "device", "commit", "versions")}
        machine = ", ".join(str(known[key]) for key in ("device", "host") if known[key])
        ranks = last.get("ranks", 1)
        versions = known["versions"] if isinstance(known["versions"], dict) else {}
        facts = {
            "date": " to ".join(dates) + " UTC" if dates else "",
            "machine": machine + (f", {ranks} ranks" if machine and ranks > 1 else ""),
            "duration": self._duration(),
            "commit": _short(known["commit"]) or f"{versions.get('ijepa_fast', '')} (installed)" * bool(versions),
            "torch": str(versions.get("torch") or ""),
            "command": str(last.get("command") or ""),
        }
        return {name: printable(value) or "not recorded" for name, value in facts.items()}

    def _duration(self) -> str:
        rates = all(record.get("images_per_second") for record in self.training)
        if not rates:
            return ""
        batch = int(self.flat.get("batch_size") or 0)
        told = f"{duration(train_seconds(self.training, self.steps, batch))} of steps"
        left = self.training[-1].get("seconds_left", 0)
        told += f", {duration(left)} left" if self.summary is None and left > 0 else ""
        return told + (f", {len(self.launches)} launches" if len(self.launches) > 1 else "")

    def column(self, key: str, x: str = "step") -> tuple[list[int], list[float]]:
        """A number of the training records over another one: (xs, values)."""
        found = [record for record in self.training if _is_number(record.get(key)) and _is_number(record.get(x))]
        return [record[x] for record in found], [record[key] for record in found]

    def terms(self, x: str = "step") -> dict[str, tuple[list[int], list[float]]]:
        """The named terms of the loss."""
        found: dict[str, tuple[list[int], list[float]]] = {}
        for record in self.training:
            terms = record.get("loss_terms")
            for name, value in terms.items() if isinstance(terms, dict) else ():
                if _is_number(value) and _is_number(record.get(x)):
                    xs, values = found.setdefault(name, ([], []))
                    xs.append(record[x])
                    values.append(value)
        return found

    def online(self, x: str = "step") -> Series:
        """The numbers of the probe while training; those of the untrained encoder are under `untrained`."""
        found: Series = {}
        for record in self.records:
            probe = record.get("probe")
            if not isinstance(probe, dict) or not _is_number(record.get(x)):
                continue
            for (*labels, metric), value in _numbers({k: v for k, v in probe.items() if k != "untrained"}):
                xs, values = found.setdefault(metric, {}).setdefault(" ".join(labels), ([], []))
                xs.append(record[x])
                values.append(value)
        return found

    def doctor(self) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """The last that the collapse doctor found, and what it found of the untrained encoder; {}, None: nothing."""
        probes = [record["probe"] for record in self.records if isinstance(record.get("probe"), dict)]
        untrained = next((p["untrained"] for p in reversed(probes) if isinstance(p.get("untrained"), dict)), None)
        return (probes[-1] if probes else {}), untrained


def read_run(folder: str | Path) -> Recorded:
    """What the folder of a run holds. Raises ValueError where it is none, or nothing of it has been logged yet."""
    folder = Path(folder)
    shown = printable(str(folder))
    for name in ("config.yaml", "log.jsonl"):
        if not (folder / name).is_file():
            raise ValueError(
                f"{shown}: expected the folder of a run, with config.yaml and log.jsonl; {name} is missing"
            )
    records, broken = parse_log(folder / "log.jsonl")
    training = [record for record in records if _is_number(record.get("loss"))]
    if not training:
        raise ValueError(f"{shown}/log.jsonl: expected at least one record with a loss; wait for the first")
    missing = []
    text = (folder / "config.yaml").read_text(encoding="utf-8", errors="surrogateescape")
    config: Config | None = None
    flat: dict[str, Any] = {}
    try:
        config = load_config(folder / "config.yaml")
        flat = flatten(config)
    except ValueError as error:
        flat = _flat_yaml(text)
        missing.append(
            "config.yaml is not one that this ijepa_fast reads, so masks and features are not shown: "
            f"{printable(str(error))}"
        )
    if broken:
        lines = ", ".join(map(str, broken[:5])) + (f" and {len(broken) - 5} more" if len(broken) > 5 else "")
        missing.append(f"log.jsonl: {'line' if len(broken) == 1 else 'lines'} {lines} cannot be read and are left out.")
    if len(training) == 1:
        missing.append("The log has one line so far: curves begin with the second.")
    absent = [key for key in ("images_per_second", "tokens_per_image", "data_wait") if key not in training[-1]]
    if absent:
        missing.append(f"The log is of an earlier version, without {', '.join(absent)}.")
    summary, figures = None, []
    try:
        summary = read_summary(folder)
        figures = figures_of(summary) if summary else []
    except ValueError as error:
        missing.append(f"The figures at the run's end are not shown: {printable(str(error))}")
    name = config.name if config is not None else str(flat.get("name") or folder.name)
    return Recorded(
        folder, printable(name), config, flat, text, records, training, summary, figures, _launches(folder), missing
    )


def _launches(folder: Path) -> list[dict[str, Any]]:
    if not (folder / LAUNCHES).is_file():
        return []
    return parse_log(folder / LAUNCHES)[0]  # its lines have a step too


def _flat_yaml(text: str) -> dict[str, Any]:
    """The settings of a configuration that this version does not read, as it has them; {} where it is no YAML."""
    try:
        return present(dict(_leaves(yaml.safe_load(text))))
    except (yaml.YAMLError, TypeError, AttributeError, ValueError):
        return {}


def _leaves(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _numbers(values: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], float]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _numbers(value, (*path, key))
        elif _is_number(value):
            yield (*path, key), value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _short(commit: Any) -> str:
    """A commit's first twelve digits, and whether files differed from it."""
    digits, dirty, _ = str(commit or "").partition("-dirty")
    return digits[:12] + (" with changes" if dirty else "")
