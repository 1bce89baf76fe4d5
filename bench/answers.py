"""The results on one screen: question, answer, where it was measured, and the page with the details.

Every answer is computed from the files of bench/results/ when bench/report.py writes the table; what they do not hold
is "not measured".
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from math import sqrt
from pathlib import Path
from typing import Any

from bench.compare.runs import AVERAGE, STUDENT
from bench.record import NoResult, load, origin, rows, when

NOT_MEASURED = "not measured"
SIZES = {"vit_tiny": "Ti", "vit_small": "S", "vit_base": "B", "vit_large": "L", "vit_huge": "H", "vit_giant": "g"}
OURS = ("fast", "fast-graphs")
CLEARLY = 3  # standard errors
LEAST_SEEDS = 3  # from which on seeds tell how far they differ
NAMES = {"ijepa": "I-JEPA", "mae": "MAE", "ibot": "iBOT", "dino": "DINO", "msn": "MSN", "simmim": "SimMIM"}
NAMES |= {"beit": "BEiT", "cae": "CAE", "lejepa": "LeJEPA"}
# The runs that are held to MAE's, and what they are.
HELD = {
    "ijepa": "",
    AVERAGE: ", with MAE's masks, crop, initialisation and optimiser, a target of all blocks and a slower average",
    STUDENT: ", with MAE's masks, crop, initialisation and optimiser and a trained MAE as a frozen teacher, whose own "
    "steps are not counted",
}


@dataclass(frozen=True)
class Answer:
    """One line under a question."""

    text: str
    where: str = "-"


@dataclass(frozen=True)
class Steps:
    """Whole steps of one model in one precision, of bench/throughput.py's JSON, by implementation.

    rates: images/s. speeds: how often as fast as plain, the median over rounds, where plain was measured beside it.
    """

    path: Path
    facts: dict[str, Any]
    precision: str
    rates: dict[str, float]
    speeds: dict[str, float]

    @property
    def case(self) -> dict[str, Any]:
        """What was measured."""
        return self.facts["case"]

    @property
    def model(self) -> str:
        """The model's name: S/16, or that of its configuration with width and depth, as configurations change."""
        if self.case["arch"] in SIZES:
            return f"{SIZES[self.case['arch']]}/{self.case['patch']}"
        return f"{self.case['arch']} {self.case['widths'][0]} x {self.case['widths'][1]}"

    @property
    def machine(self) -> tuple[str, str, str]:
        """Device, what it was held to, and precision."""
        held = ", held to AVX2" if self.path.stem.endswith("-avx2") else ""
        return self.facts["device"], held, self.precision

    def over(self, other: str) -> float | None:
        """How many times as fast as `other` the fastest way of this project is."""
        known = self.speeds if other in self.speeds else self.rates
        ours = [known[name] for name in OURS if name in known]
        return max(ours) / known[other] if ours and other in known else None


def steps(folder: Path, cuda: bool) -> list[Steps]:
    """The newest measurement of each model, batch and precision on each machine."""
    newest: dict[tuple, Steps] = {}
    for path in sorted(folder.glob("steps-*.json")):
        try:
            result = load(path)
        except NoResult:
            continue
        if "rows" not in result or result["case"]["device"].startswith("cuda") is not cuda:
            continue
        rates: dict[str, dict[str, float]] = {}
        speeds: dict[str, dict[str, float]] = {}
        for row in result["rows"]:
            impl, _, precision = row["impl"].partition(", ")
            if row["data"] or row["context"] not in ("truncate", "full") or impl in rates.get(precision, {}):
                continue
            rates.setdefault(precision, {})[impl] = row["images_per_second"]
            speed = row.get(f"speedup_over_plain_{precision}" if precision else "speedup_over_plain")
            if speed is not None:
                speeds.setdefault(precision, {})[impl] = speed
        for precision in rates:
            shown = precision or result["case"]["precision"]
            found = Steps(path, result, shown, rates[precision], speeds.get(precision, {}))
            key = (*found.machine, *(result["case"][part] for part in ("method", "arch", "patch", "batch")))
            if key not in newest or when(path, result) >= when(newest[key].path, newest[key].facts):
                newest[key] = found
    return list(newest.values())


def _same_numbers(folder: Path) -> Iterator[Answer]:
    path = folder / "parity.json"
    result = load(path)
    worst = max(result["archives"].values(), key=lambda found: found["largest"])["largest"]
    count = sum(found["quantities"] for found in result["archives"].values())
    yes = "yes" if worst < result["tolerance"] else "no"
    text = f"{yes}: outputs, losses, gradients, weights after steps, {count:,} quantities of {len(result['archives'])} "
    yield Answer(text + f"archives: the largest relative error is {worst:.1e}", origin(path, result))


def _published(folder: Path, cuda: bool) -> Iterator[Answer]:
    for found in steps(folder, cuda):
        if (ratio := found.over("published")) is not None:
            rates = f"{found.rates['fast']:.1f} against {found.rates['published']:.1f} images/s"
            text = f"{ratio:.1f} times: {rates}, {found.model}, {found.precision}"
            yield Answer(text, origin(found.path, found.facts))


def _by_device(measured: list[Steps], said: Callable[[Steps], str], plain: str) -> Iterator[Answer]:
    """An answer for each device: by precision, what is said of each model, the smallest first."""
    devices: dict[str, dict[str, list[Steps]]] = {}
    for found in sorted(
        measured, key=lambda found: list(SIZES).index(found.case["arch"]) if found.model[1] == "/" else -1
    ):
        device, held, precision = found.machine
        devices.setdefault(device, {}).setdefault(f"{precision}{held}", []).append(found)
    for groups in devices.values():
        parts = [f"{how}: {', '.join(said(found) for found in groups[how])}" for how in sorted(groups)]
        by_date = sorted((f for group in groups.values() for f in group), key=lambda f: when(f.path, f.facts))
        where, oldest = origin(by_date[-1].path, by_date[-1].facts), by_date[0]
        if origin(oldest.path, oldest.facts) != where:
            where += f"; some of it older, from {when(oldest.path, oldest.facts)[:10]} on"
        yield Answer(f"{'; '.join(parts)} ({plain})", where)


def _torch(folder: Path, cuda: bool) -> Iterator[Answer]:
    def said(found: Steps) -> str:
        how = " by CUDA graphs" if found.rates.get("fast-graphs", 0) > found.rates.get("fast", 0) else ""
        return f"{found.model}{how} {found.over('plain'):.2f} and {found.over('strong'):.2f}"

    measured = [f for f in steps(folder, cuda) if f.case["method"] == "ijepa" and {"plain", "strong"} <= f.rates.keys()]
    yield from _by_device(measured, said, f"times plain and times {'compiled' if cuda else 'the fastest'}")


def _other_methods(folder: Path, cuda: bool) -> Iterator[Answer]:
    def said(found: Steps) -> str:
        name = found.case["method"]
        return f"{NAMES.get(name, name)} {found.model} {found.over('plain'):.2f}"

    measured = [f for f in steps(folder, cuda) if f.case["method"] != "ijepa" and "plain" in f.rates]
    yield from _by_device(measured, said, "times plain")


def _kernels(folder: Path) -> Iterator[Answer]:
    from bench.report import latest, own

    for path in sorted(folder.glob("kernels-*.csv")):
        kept, refused = rows(path)
        ratios = []
        for (_, _, _, pass_), case in latest(kept).items():
            name = own(case)
            others = [float(row["ms"]) for other, row in case.items() if other != name]
            if name and others and pass_ != "both":
                ratios.append(min(others) / float(case[name]["ms"]))
        if ratios:
            faster = sum(ratio > 1 for ratio in ratios)
            text = f"{kept[-1]['dtype']}: faster than the best of eager, compiled and libraries in {faster} of "
            text += f"{len(ratios)} cases; {min(ratios):.2f} to {max(ratios):.1f} times, in the median "
            where = origin(path, max(kept, key=lambda row: row["date"]))
            yield Answer(f"{text}{statistics.median(ratios):.1f}", where)
        elif refused:
            text = f"{NOT_MEASURED}: all {refused} rows are of trees with changes, and refused"
            yield Answer(text, path.stem.removeprefix("kernels-"))


def _compiled(folder: Path) -> Iterator[Answer]:
    said: dict[str, list[str]] = {}
    for path in sorted(folder.glob("aot-*.csv")):
        kept, _ = rows(path)
        archs = ", ".join(f"sm_{arch}" for arch in sorted({row["arch"] for row in kept}, key=int))
        spilled, failed = sum(int(row["spilled_bytes"] or 0) for row in kept), sum(bool(row["error"]) for row in kept)
        yes = "yes" if not spilled and not failed else "no"
        text = f"{yes}: {len(kept)} kernels for {archs}, {failed} failed, {spilled} bytes spilled"
        said.setdefault(text, []).append(kept[0]["triton"])
    for text, versions in said.items():
        yield Answer(text, f"compiled ahead of time by Triton {' and '.join(versions)}")


Ends = dict[int, tuple[float, int]]  # seed -> accuracy, images it was measured on


def _ends(result: dict[str, Any], run: str, probe: str, place: int = -1) -> Ends:
    """A run's accuracy at its last point, or at its first with place=0."""
    return {
        record["seed"]: (found["value"], found["n"])
        for record in result["records"]
        if record["run"] == run
        for found in record["points"][place]["figures"]
        if (found["probe"], found["metric"]) == (probe, "accuracy")
    }


def _mean(ends: Ends) -> float:
    return statistics.mean(value for value, _ in ends.values())


def _differ(a: Ends, b: Ends) -> bool:
    """Whether two accuracies are called different: their means lie more than two standard errors apart.

    Where both have the same seeds, three or more, the error is that of the mean difference by seed, over the seeds
    alone. Otherwise it is that of the test images of one seed, as seeds share them: more seeds do not make it smaller.
    """
    if a.keys() == b.keys() and len(a) >= LEAST_SEEDS:
        differences = [a[seed][0] - b[seed][0] for seed in a]
        return abs(statistics.mean(differences)) > 2 * statistics.stdev(differences) / sqrt(len(differences))
    means = [(_mean(ends), min(n for _, n in ends.values())) for ends in (a, b)]
    return abs(means[0][0] - means[1][0]) > 2 * sqrt(sum(mean * (1 - mean) / n for mean, n in means))


def _about_runs(result: dict[str, Any], ends: Ends) -> str:
    preset = result["preset"]
    return f"{preset['steps']:,} steps of {preset['batch']}, {len(ends)} seed{'s' * (len(ends) > 1)}"


def _learning(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    for path in sorted(folder.glob("learning-*.json")):
        try:
            yield path, load(path)
        except NoResult:
            continue


def facts_of(result: dict[str, Any]) -> dict[str, Any]:
    """What says where runs are from: their first record, or of older files the whole, which notes no commit."""
    record = result["records"][0]
    return record if "commit" in record else result


def _learns(folder: Path) -> Iterator[Answer]:
    for path, result in _learning(folder):
        parts, better = [], []
        for probe in ("linear", "20-NN"):
            if last := _ends(result, "ijepa", probe):
                first = _ends(result, "ijepa", probe, place=0)
                parts.append(f"{probe} {100 * _mean(first):.1f} -> {100 * _mean(last):.1f} %")
                better.append(_mean(last) > _mean(first) and _differ(first, last))
        if parts:
            yes = "yes" if all(better) else "not beyond the error"
            yield Answer(f"{yes}: {', '.join(parts)}; {_about_runs(result, last)}", origin(path, facts_of(result)))


def _beside_mae(folder: Path) -> Iterator[Answer]:
    for path, result in _learning(folder):
        for run, how in HELD.items():
            (a, b), (c, d) = ([_ends(result, name, probe) for name in (run, "mae")] for probe in ("linear", "20-NN"))
            if not a or not b:
                continue
            verdict = "level" if not _differ(a, b) else "yes" if _mean(a) > _mean(b) else "no"
            text = f"{verdict}{how}: linear {100 * _mean(a):.1f} against {100 * _mean(b):.1f} %, "
            text += f"20-NN {100 * _mean(c):.1f} against {100 * _mean(d):.1f} %"
            yield Answer(f"{text}; {_about_runs(result, a)}", origin(path, facts_of(result)))


def _methods(folder: Path) -> Iterator[Answer]:
    from bench.compare.tables import by_run, figure_of, gain, panels

    path = folder / "compared-all.json"
    result = load(path)
    linear, errors = {}, {}
    for run, records in by_run(result["records"]).items():
        found = [[figure_of(record["points"][-1], *panel) for record in records] for panel in panels(records)]
        gains = [gain([figure for figure in of if figure is not None]) for of in found]
        linear[run], errors[run] = 100 * gains[0][0], min(mean / error for mean, error in gains if error)
    clear = sum(error > CLEARLY for error in errors.values())
    ordered = sorted(linear, key=lambda run: -linear[run])
    parts = ", ".join(f"{NAMES.get(run, run)} {linear[run]:+.1f}" for run in ordered)
    seeds = len({record["seed"] for record in result["records"]})
    text = f"{clear} of {len(linear)} by more than {CLEARLY} standard errors in both probes, seeds: {seeds}; "
    yield Answer(f"{text}linear probe, points: {parts}", origin(path, result["records"][0]))


def _masks(folder: Path) -> Iterator[Answer]:
    for path, result in _learning(folder):
        ends = {run: _ends(result, run, "linear") for run in ("multiblock", "block", "rasterized", "random")}
        if not all(ends.values()):
            continue
        first, second = sorted(ends, key=lambda run: -_mean(ends[run]))[:2]
        verdict = "yes" if first == "multiblock" else "no"
        if not _differ(ends[first], ends[second]):
            verdict = f"not beyond the error: {first} is first, then {second}"
        parts = ", ".join(f"{run} {100 * _mean(found):.1f}" for run, found in ends.items())
        about = _about_runs(result, ends["multiblock"])
        yield Answer(f"{verdict}; linear {parts} %; {about}", origin(path, result))


def _data(folder: Path) -> Iterator[Answer]:
    for path in sorted(folder.glob("data-*.json")):
        result = load(path)
        rates = {name: row["images_per_second"] for name, row in result["contenders"].items()}
        text = f"{rates['loader']:,.0f} images/s: {rates['loader'] / rates['decode']:.2f} of what DALI decodes, "
        text += f"{rates['loader'] / rates['pillow']:.2f} times Pillow behind a DataLoader"
        yield Answer(text, origin(path, result))


def _formats(folder: Path) -> Iterator[Answer]:
    for path in sorted(folder.glob("formats-*.json")):
        result = load(path)
        parts = [f"{r['format']} {r['loader_over_plain']:.1f}" for r in result["formats"] if "failed" not in r]
        text = (
            f"{', '.join(parts)} times a plain DataLoader, {result['channels']} channels of 16 bits but for jpg and png"
        )
        yield Answer(text, origin(path, result))


def _claims(folder: Path) -> Iterator[Answer]:
    for path in sorted(folder.glob("claims-*.json")):
        result = load(path)
        by_name = {row["name"]: row for row in result["rows"]}
        parts = [f"{name} {by_name[name]['work_ratio']:.2f}" for name in OTHERS]
        hours = [by_name[name]["hours_ratio"] for name in OTHERS]
        told = NOT_MEASURED if None in hours else " and ".join(f"{ratio:.2f} times" for ratio in hours)
        text = f"by work, times I-JEPA H/14's: {', '.join(parts)}; hours: {told}"
        yield Answer(text, "counted" if result["small"] else origin(path, result))


OTHERS = ("MAE H/14", "iBOT S/16")
# What nothing here measures until there is a file of such a name.
ABSENT = {
    "whole steps on an H200": "steps-*h200*.json",
    "the published code on a GPU": "steps-nvidia-*published*.json",
    "several GPUs or machines at once": "steps-*ranks*.json",
    "training on ImageNet": "learning-imagenet*.json",
    "loading by the GPU's decoder": "data-nvidia-*.json",
    "training with the fp8 target": "learning-*fp8*.json",
    "the options against collapse, by probe": "*-options*.json",
}


def _absent(folder: Path) -> Iterator[Answer]:
    missing = [words for words, pattern in ABSENT.items() if not list(folder.glob(pattern))]
    if missing:
        yield Answer("; ".join(missing))


@dataclass(frozen=True)
class Question:
    """A line of the table. page: with the details, from docs/. first: its words on the first page, None: not there."""

    words: str
    answer: Callable[[Path], Iterator[Answer]]
    page: str
    first: str | None = None


FASTER = ("Faster than the published code? CPU", "Faster than PyTorch? CPU", "Faster than PyTorch? GPU")
CPU, GPU = "results/cpu-steps.md", "results/gpu-steps.md"
QUESTIONS = (
    Question("Same numbers as the published code?", _same_numbers, "numerics.md"),
    Question("Faster than the published code, on a CPU?", partial(_published, cuda=False), CPU, FASTER[0]),
    Question("... than plain and than the fastest PyTorch, on a CPU?", partial(_torch, cuda=False), CPU, FASTER[1]),
    Question("... than plain PyTorch, the other methods?", partial(_other_methods, cuda=False), CPU),
    Question("Faster than the published code, on a GPU?", partial(_published, cuda=True), GPU),
    Question("... than plain and than compiled PyTorch, on a GPU?", partial(_torch, cuda=True), GPU, FASTER[2]),
    Question("... than plain PyTorch, the other methods, on a GPU?", partial(_other_methods, cuda=True), GPU),
    Question("Are its kernels faster?", _kernels, "results/kernels.md"),
    Question("Do they compile for A100, H100 and B200, without spills?", _compiled, "results/kernels.md"),
    Question("Does I-JEPA learn?", _learns, "results/learning.md", "Does it learn? CIFAR-10"),
    Question("Do all methods, in minutes?", _methods, "results/learning.md"),
    Question("Better than MAE at equal steps?", _beside_mae, "results/learning.md", "Better than MAE?"),
    Question("Are multi-block masks the best, with the published recipe?", _masks, "results/learning.md"),
    Question("Is the data fast enough?", _data, "results/data.md"),
    Question("... of other formats?", _formats, "results/data.md"),
    Question("The paper's efficiency claims?", _claims, "results/claims.md"),
    Question("Not measured", _absent, GPU),
)


def answers(question: Question, folder: Path) -> list[Answer]:
    """What is known to a question; "not measured" where nothing is, or what there is was refused."""
    try:
        found = list(question.answer(folder))
    except NoResult as reason:
        why = str(reason).removeprefix("Not measured: ").rstrip(".")
        found = [Answer(f"{NOT_MEASURED}: {why[0].lower()}{why[1:]}")]
    return found or [Answer(NOT_MEASURED)]


def table(folder: Path, brief: bool = False) -> list[str]:
    """Markdown: the questions with their answers, or the few of the first page."""
    lines = ["| question | answer | where, when | details |", "|---|---|---|---|"]
    for question in QUESTIONS:
        if brief and question.first is None:
            continue
        name = question.page.rpartition("/")[2].removesuffix(".md").replace("-", " ")
        for number, answer in enumerate(answers(question, folder)):
            asked = question.first if brief else question.words
            words, link = (asked, f"[{name}]({question.page})") if number == 0 else ("", "")
            lines.append(f"| {words} | {answer.text} | {answer.where} | {link} |")
    return lines
