"""Write the documents' tables from bench/results/, so that no figure is typed.

    python bench/report.py [--check]

A table stands between two comments of a Markdown file, the first of which says what it is made of:

    <!-- table: kernels bench/results/kernels-amd-epyc-2-threads.csv -->
    <!-- end of table -->

Kinds: kernels (bench/run.py's rows, this project's time against the others'), aot (bench/aot.py's), ops (what each op
should reach on an H200, beside what was measured on one), steps and stages (bench/throughput.py's JSON, the latter's
--breakdown), data, formats, claims, learning, gains, controls, options, probe, host, parity (of the JSON of the program
of that name), history (of bench/history.py's), answers and brief (bench/answers.py, of a whole folder), compared (all
that bench/learning.py prints), worth (of that, how far each run ends above I-JEPA's). A file that is not there makes a
table which says so, and so does one that was measured in a tree with changes: it is refused.
--check changes nothing and exits with 1 if a document is not what would be written.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from bench import answers as screen
from bench import history as changes
from bench.record import NoResult, drawn_from, load
from bench.record import rows as read
from bench.registry import OWN
from bench.throughput import table as steps_table

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ("README.md", "kernels/README.md", "docs/*.md", "docs/results/*.md")
MARKED = re.compile(r"(<!-- table: (\w+) (\S+) -->\n).*?(<!-- end of table -->)", re.DOTALL)
# What the kernels should reach on an H200 at H/14: (op, part, pass, against whom, at least). "copy" is a share.
BOUNDS = (
    ("adamw_ema", "encoder", "forward", "copy", 0.9),
    ("layer_norm", "context", "backward", "compiled", 1.8),
    ("target_loss", "smooth L1", "both", "eager", 3.0),
    ("predictor_tokens", "tokens", "both", "eager", 3.0),
    ("varlen_attention", "context", "both", "torch varlen", 1.5),
    ("varlen_attention", "predictor", "both", "torch varlen", 1.5),
)
NOT_MEASURED = "not measured"


def latest(rows: list[dict]) -> dict[tuple, dict[str, dict]]:
    """(op, model, part, pass) -> provider -> row, all of a case from the last run that measured it."""
    cases: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        case = cases.setdefault((row["op"], row["model"], row["part"], row["pass_"]), {})
        if case and next(iter(case.values()))["date"] != row["date"]:
            case.clear()
        case[row["provider"]] = row
    return cases


def own(case: dict[str, dict]) -> str | None:
    """The provider of a case that is this project's own."""
    return next((name for name in OWN if name in case), None)


def ratio(case: dict[str, dict], other: str) -> float | None:
    """How many times as fast as another provider this project's is."""
    name = own(case)
    return float(case[other]["ms"]) / float(case[name]["ms"]) if name and other in case else None


def kernels(path: Path) -> list[str]:
    """Times and ratios of one device."""
    found, refused = read(path)
    cases = latest(found)
    said = _refused(refused)
    if not cases:
        raise NoResult(said or f"Not measured: there is no `{path.name}`.")
    last = max((row for case in cases.values() for row in case.values()), key=lambda row: row["date"])
    commits = sorted({row["commit"] for case in cases.values() for row in case.values()})
    heads = ("op", "case", "pass", "eager, ms", "torch.compile", "others", "this project", "quantiles")
    heads += ("GB/s", "of copy", "TFLOP/s", "of GEMM", "x eager", "x compiled", "x best other")
    lines = [f"{last['device']}; {last['versions']}; {last['dtype']}; commit {', '.join(commits)}.", "", *_head(heads)]
    for (op, model, part, pass_), case in cases.items():
        if pass_ == "both" and op != "target_loss":
            continue
        name = own(case)
        row = case.get(name, {})
        others = [p for p in case if p not in ("eager", "compiled", *OWN)]
        others.sort(key=lambda p: float(case[p]["ms"]))
        cells = (
            op,
            f"{model} {part}: {next(iter(case.values()))['shape']}",
            pass_,
            _number(case.get("eager", {}).get("ms")),
            _number(case.get("compiled", {}).get("ms")),
            "; ".join(f"{_number(case[p]['ms'])} {p}" for p in others) or "-",
            f"{_number(row.get('ms'))} {name}" if name else "-",
            f"{_number(row['ms_20'])}-{_number(row['ms_80'])}" if name else "-",
            _number(row.get("gb_per_s")),
            _percent(row.get("share_of_copy")),
            _number(row.get("tflop_per_s")),
            _percent(row.get("share_of_matmul")),
            _number(ratio(case, "eager")),
            _number(ratio(case, "compiled")),
            _number(ratio(case, others[0])) if others else "-",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return lines + (["", said] if said else [])


def _refused(count: int) -> str:
    return f"Refused: {count} rows of trees with changes that no commit has." if count else ""


def ops(path: Path) -> list[str]:
    """The bound of each op, and what a file of results says to it."""
    found, refused = read(path)
    cases = latest(found)
    lines = _head(("op", "H/14", "pass", "bound", "measured"))
    for op, part, pass_, against, least in BOUNDS:
        case = cases.get((op, "H/14", part, pass_), {})
        if against == "copy":
            bound, value = f">= {least:.0%} of the copy bandwidth", case.get(own(case) or "", {}).get("share_of_copy")
            measured = _percent(value) if value else NOT_MEASURED
        else:
            bound, value = f">= {least:g} x {against}", ratio(case, against)
            measured = f"{value:.2f} x" if value else NOT_MEASURED
        lines.append(f"| {op} | {part} | {pass_} | {bound} | {measured} |")
    return lines + (["", _refused(refused)] if refused else [])


def aot(path: Path) -> list[str]:
    """Per op: spills, matrix instructions, and by architecture the most registers and shared memory of a kernel."""
    rows, _ = read(path)
    if not rows:
        raise NoResult(f"Not compiled: there is no `{path.name}`.")
    archs = sorted({row["arch"] for row in rows}, key=int)
    heads = (
        "op",
        "compiled",
        *(f"sm_{arch}: registers, KiB" for arch in archs),
        "spilled bytes",
        "matrix instructions",
    )
    lines = [f"Triton {', '.join(sorted({row['triton'] for row in rows}))}.", "", *_head(heads)]
    for op in sorted({row["op"] for row in rows}):
        mine = [row for row in rows if row["op"] == op]
        matrix = Counter(f"{row['matrix']} on sm_{row['arch']}" for row in mine if row["matrix"])
        cells = [op, str(len(mine)), *(_most(mine, arch) for arch in archs)]
        cells += [str(sum(int(row["spilled_bytes"]) for row in mine))]
        cells += [", ".join(f"{count} {name}" for name, count in matrix.items()) or "-"]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _most(rows: list[dict], arch: str) -> str:
    mine = [row for row in rows if row["arch"] == arch]
    if not mine:
        return "-"
    shared = max(int(row["shared_bytes"]) for row in mine) / 1024
    return f"{max(int(row['registers']) for row in mine)}, {shared:.1f}"


def steps(path: Path) -> list[str]:
    """The table that bench/throughput.py prints."""
    result = load(path)
    shown = ("arch", "patch", "crop", "batch", "precision")
    case = ", ".join(f"{name} {result['case'][name]}" for name in shown)
    made = f"; {result['date'][:10]}, commit {result['commit']}" if "commit" in result else ""
    return [
        f"{result['device']}; torch {result['torch']}; {case}{made}.",
        "",
        *steps_table(result["rows"]).splitlines(),
    ]


def stages(path: Path) -> list[str]:
    """The table of stages that bench/throughput.py prints with --breakdown."""
    from bench.breakdown import table

    return table(load(path)["stages"]).splitlines()


def data(path: Path) -> list[str]:
    """The table that bench/data.py prints."""
    return data_table(load(path))


def data_table(result: dict) -> list[str]:
    """Images/s of the loader and beside it, and what a step would wait for data; of bench/data.py's JSON."""
    shown = ("images", "threads", "batch_size", "crop")
    facts = ", ".join(f"{name.replace('_', ' ')} {result[name]}" for name in shown)
    heads = ("", "images/s", "a core", "CPU ms an image", "loader: times its images/s", "times its images a CPU second")
    lines = [f"{result['device']}; {result['versions']}; commit {result['commit']}; {facts}.", "", *_head(heads)]
    for name, row in result["contenders"].items():
        cells = [f"{row['images_per_second']:.0f}", f"{row['per_core']:.0f}", f"{row['cpu_ms_per_image']:.2f}"]
        cells += [f"{row['loader_over_this']:.2f}", f"{row['loader_over_this_by_cpu_time']:.2f}"]
        lines.append("| " + " | ".join([name, *cells]) + " |")
    lines += ["", *_head(("a step as of", "at images/s", "in batches of", "waits for data"))]
    for model, row in result["wait_share"].items():
        cells = (model, f"{row['step_images_per_second']}", f"{row['batch']}", _percent(row["share"]))
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def formats(path: Path) -> list[str]:
    """The tables that bench/formats.py prints."""
    return formats_table(load(path))


def formats_table(result: dict) -> list[str]:
    """Images/s of each format, of the loader and a plain DataLoader, and of an earlier revision's loader."""
    shown = ("threads", "crop", "size", "channels", "batch_size")
    facts = ", ".join(f"{name.replace('_', ' ')} {result[name]}" for name in shown)
    lines = [f"{result['device']}; {result['versions']}; commit {result['commit']}; {facts}.", ""]
    lines += _head(("format", "loader, images/s", "plain DataLoader", "times as many", "a CPU second"))
    for row in result["formats"]:
        if "failed" in row:
            lines.append(f"| {row['format']} | failed: {row['failed']} | | | |")
            continue
        rates = row["images_per_second"]
        cells = [row["format"], f"{rates['loader']:.0f}", f"{rates['plain']:.0f}"]
        cells += [f"{row['loader_over_plain']:.2f}", f"{row['loader_over_plain_by_cpu_time']:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    compared = [row for row in result["formats"] if "against" in row]
    if compared:
        commit = compared[0]["against"]["commit"]
        lines += ["", *_head(("RGB", "images/s", f"at {commit}", "times as many", "a CPU second"))]
    for row in compared:
        found = row["against"]
        cells = [row["format"], *(f"{found['images_per_second'][when]:.0f}" for when in ("now", "then"))]
        cells += [f"{found['now_over_then']:.3f}", f"{found['now_over_then_by_cpu_time']:.3f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def claims(path: Path) -> list[str]:
    """The tables that bench/claims.py prints."""
    from bench.claims import table

    return table(load(path)).splitlines()


def learning(path: Path) -> list[str]:
    """Accuracies along the runs of bench/learning.py."""
    from bench.compare.tables import table

    return table(load(path)["records"]).splitlines()


def compared(path: Path) -> list[str]:
    """The tables that bench/learning.py prints, and how they were come by."""
    from bench.compare.tables import tables

    result = load(path)
    return [_about_runs(result), "", *tables(result).splitlines()]


def worth(path: Path) -> list[str]:
    """What each run ends with, and how far above I-JEPA's as it is."""
    from bench.compare import tables

    result = load(path)
    return [_about_runs(result), "", *tables.worth(result["records"], "ijepa").splitlines()]


def _about_runs(result: dict) -> str:
    preset, seeds = result["preset"], ", ".join(map(str, result["preset"]["seeds"]))
    last = sorted({record["points"][-1]["step"] for record in result["records"]})
    steps = " to ".join(f"{step:,}" for step in dict.fromkeys((last[0], last[-1])))
    return f"{result['device']}; {steps} steps of {preset['batch']} images; seeds {seeds}."


def gains(path: Path) -> list[str]:
    """The table that bench/gains.py prints."""
    from bench.gains import table

    return table(load(path))


def controls(path: Path) -> list[str]:
    """The table that bench/controls.py prints."""
    from bench.controls import table

    return table(load(path))


def options(path: Path) -> list[str]:
    """The table that bench/options.py prints."""
    from bench.options import table

    return table(load(path))


def probe(path: Path) -> list[str]:
    """The table that bench/probe.py prints."""
    from bench.probe import table

    return table(load(path))


def host(path: Path) -> list[str]:
    """The table that bench/host.py prints."""
    from bench.host import table

    result = load(path)
    facts = f"{result['device']}; torch {result['torch']}; {result['precision']}."
    return [facts, "", *table(result)]


def parity(path: Path) -> list[str]:
    """By archive of the published codes' numbers: how many quantities were compared, and the largest error."""
    result = load(path)
    lines = [f"{result['device']}; {result['versions']}; {result['date'][:10]}, commit {result['commit']}.", ""]
    lines += _head(("archive", "quantities", "largest relative error", "of"))
    for name, found in result["archives"].items():
        lines.append(f"| `{name}` | {found['quantities']} | {found['largest']:.1e} | {found['of']} |")
    return lines


KINDS: dict[str, Callable[[Path], list[str]]] = {
    "kernels": kernels,
    "ops": ops,
    "aot": aot,
    "steps": steps,
    "stages": stages,
    "claims": claims,
    "learning": learning,
    "compared": compared,
    "worth": worth,
    "gains": gains,
    "controls": controls,
    "options": options,
    "probe": probe,
    "data": data,
    "formats": formats,
    "host": host,
    "parity": parity,
    "history": changes.table,
    "answers": screen.table,
    "brief": partial(screen.table, brief=True),
}


def _curves(source: Path, picture: Path) -> None:
    from bench.compare.plots import curves

    curves(load(source)["records"], picture, drawn_from(source))


def _gains(source: Path, picture: Path) -> None:
    from bench.gains import plot

    plot(load(source), picture, drawn_from(source))


def _masks(source: Path, picture: Path) -> None:
    from bench.compare.plots import ends
    from bench.compare.runs import SWEEPS

    ends(load(source)["records"], SWEEPS["masks"], picture, drawn_from(source))


# The documents' pictures that are drawn of results: of which file, and by what.
PICTURES: dict[str, tuple[str, Callable[[Path, Path], None]]] = {
    changes.PICTURE: (f"{changes.FOLDER}/{changes.HISTORY}", changes.plot),
    "docs/quickstart.png": ("bench/results/gains-quickstart.json", _gains),
    "docs/learning-cifar10.png": ("bench/results/learning-cifar10-cpu.json", _curves),
    "docs/mask-strategies.png": ("bench/results/compared-masks.json", _masks),
}


def render(text: str, root: Path = ROOT) -> str:
    """A document with its tables made anew. Raises ValueError for a kind of table that does not exist."""

    def table(match: re.Match) -> str:
        start, kind, file, end = match.groups()
        if kind not in KINDS:
            raise ValueError(f"table: expected a kind of {', '.join(KINDS)}, got {kind!r}; change the comment")
        try:
            lines = KINDS[kind](root / file)
        except NoResult as reason:
            lines = [str(reason)]
        return "\n".join([start.rstrip("\n"), "", *lines, "", end])

    return MARKED.sub(table, text)


def _head(names) -> list[str]:
    return ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]


def _number(value) -> str:
    return f"{float(value):.3g}" if value not in (None, "") else "-"


def _percent(value) -> str:
    return f"{float(value):.0%}" if value not in (None, "") else "-"


def main(argv: list[str] | None = None) -> int:
    """Write the documents, or with --check say which differ, and which pictures are of other files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args(argv)
    stale = []
    for path in [path for pattern in DOCUMENTS for path in sorted(ROOT.glob(pattern))]:
        name, text = str(path.relative_to(ROOT)), path.read_text()
        if (new := render(text)) == text:
            continue
        stale.append(name)
        if not args.check:
            path.write_text(new)
    for name, (file, draw) in PICTURES.items():
        source, picture = ROOT / file, ROOT / name
        if picture.is_file() and drawn_from(source).encode() in picture.read_bytes():
            continue
        stale.append(name)
        if not args.check:
            draw(source, picture)
    verb = "would change" if args.check else "changed"
    print("\n".join(f"{verb} {name}" for name in stale) or "all tables are up to date")
    return bool(stale) and args.check


if __name__ == "__main__":
    sys.exit(main())
