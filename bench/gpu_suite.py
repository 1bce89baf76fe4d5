"""Everything that wants a GPU, in one command that fits ten minutes, most important first, written as it goes.

    python bench/gpu_suite.py [--minutes 9] [--out bench/results] [--images FOLDER]

In order: the tests, files side by side; the ops at H/14, each only if all its tests passed; whole steps; the ops at the
other models; data. Needs torch, Triton, numpy and pytest, and is run from the checkout: nothing need be installed. What
needs more is skipped by name. Every command has a time limit, every test too, so that one that hangs costs its own time
only; what no time is left for is skipped by name as well.

Writes gpu_suite-DEVICE.md (what ran, what was skipped, what failed), tests-DEVICE.jsonl, kernels-DEVICE.csv and
steps-DEVICE-NAME.json.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from bench.baselines.others import PLAIN
from bench.registry import MODELS, OPS
from bench.run import ROOT, about, slug
from ijepa_fast.methods.method import METHODS

FIRST_MODEL = "H/14"
TEST_SECONDS = 60  # of one test
TESTS_SECONDS = 170  # of all tests together
SHARDS = {"varlen_attention": 4}  # processes for an op's tests, where not one: most of their time is compilation
OP_SECONDS = 50  # of an op at one model, torch.compile included
STEP_SECONDS = 120
KEPT = 6000  # characters of the output of what failed
# Whole steps, most important first: (name, arguments of bench/throughput.py, packages needed).
STEPS = (
    (
        "ijepa-h14",
        "--model vit_huge --patch 14 --batch 32 --impl fast,fast-graphs,strong,plain --context truncate,full",
        (),
    ),
    ("ijepa-s16", "--model vit_small --batch 128 --impl fast,fast-graphs,strong,plain", ()),
    ("mae-h14", "--method mae --model vit_huge --patch 14 --batch 32 --impl fast,fast-graphs,plain", ()),
    (
        "ijepa-h14-engine",
        "--model vit_huge --patch 14 --batch 32 --impl fast,fast-graphs --engine 1",
        ("omegaconf", "deepspeed"),
    ),
    (
        "ijepa-h14-fp8",
        "--model vit_huge --patch 14 --batch 32 --impl fast,fast-fp8,fast-graphs,fast-graphs-fp8 --breakdown",
        (),
    ),
    ("ibot-s16", "--method ibot --model vit_small --batch 32 --impl fast,plain", ()),
    ("ijepa-b16", "--model vit_base --batch 128 --impl fast,fast-graphs,strong,plain", ()),
    ("ijepa-l16", "--model vit_large --batch 64 --impl fast,fast-graphs,strong,plain", ()),
    ("ijepa-b16-engine", "--model vit_base --batch 128 --impl fast,fast-graphs --engine 1", ("omegaconf", "deepspeed")),
    ("ijepa-h14-128", "--model vit_huge --patch 14 --batch 128 --impl fast,fast-graphs,strong,plain", ()),
    ("ijepa-h16-448", "--model vit_huge --crop 448 --batch 16 --impl fast,fast-graphs,strong,plain", ()),
    ("ijepa-g16", "--model vit_giant --batch 32 --impl fast,fast-graphs,strong,plain", ()),
)
# And every registered method that has none, by its own name; with its plain rendering where there is one.
STEPS += tuple(
    (f"{name}-s16", f"--method {name} --model vit_small --batch 32 --impl fast{',plain' * (name in PLAIN)}", ())
    for name in METHODS
    if f"--method {name} " not in " ".join(arguments for _, arguments, _ in STEPS) and name != "ijepa"
)


@dataclass
class Task:
    """One command: what it needs, how long it may take, and the ops whose tests must have passed."""

    name: str
    command: list[str]
    seconds: float
    needs: tuple[str, ...] = ()
    gates: tuple[str, ...] = ()


@dataclass
class Suite:
    """Runs tasks until the time is up, and keeps the record."""

    deadline: float
    record: Path
    red: set[str] = field(default_factory=set)  # files of tests that did not pass
    failed: list[str] = field(default_factory=list)

    def write(self, text: str) -> None:
        """Print a line and add it to the record."""
        print(text, flush=True)
        with self.record.open("a") as file:
            file.write(text + "\n")

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def reason_to_skip(self, task: Task) -> str | None:
        """Why a task cannot run, or None."""
        if missing := [name for name in task.needs if not has(name)]:
            return f"needs {', '.join(missing)}, not installed"
        if red := [op for op in task.gates if test_file(op) in self.red]:
            return f"tests of {', '.join(red)} did not pass"
        if self.left < min(task.seconds, 15):
            return "no time left"
        return None

    def run(self, task: Task) -> None:
        """Run one task, or say why not."""
        if reason := self.reason_to_skip(task):
            self.write(f"- {task.name}: skipped, {reason}")
            return
        start = time.monotonic()
        status, output = Process(task.command).wait(min(task.seconds, self.left))
        took = f"{time.monotonic() - start:.0f} s"
        if status == 0:
            self.write(f"- {task.name}: done in {took}")
        else:
            self.failed.append(task.name)
            why = "stopped at its time limit" if status is None else f"exit status {status}"
            self.write(f"- {task.name}: FAILED after {took}, {why}\n\n```\n{output[-KEPT:].strip()}\n```\n")


class Process:
    """A command in a process group of its own, so that what it started ends with it."""

    def __init__(self, command: list[str], environment: dict[str, str] | None = None):
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        # A file, not a pipe: nobody reads while it runs.
        self.output = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115, closed in wait
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": path} | (environment or {}),
            stdout=self.output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def wait(self, seconds: float) -> tuple[int | None, str]:
        """(exit status, output); the status is None when it had to be ended."""
        try:
            status = self.process.wait(max(seconds, 0.1))
        except subprocess.TimeoutExpired:
            status = None
        finally:
            self.end()
        with self.output:
            self.output.seek(0)
            return status, self.output.read()

    def end(self) -> None:
        """Kill what is left of the group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def has(package: str) -> bool:
    """Whether a package, or a package inside one, can be found."""
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False


def test_file(op: str) -> str:
    """The file of an op's tests."""
    return f"tests/ops/test_{op}.py"


def run_tests(suite: Suite, log: Path, seconds: float, workers: int) -> None:
    """Run the tests, `workers` processes at a time: an op's file whole, as its kernels run on the GPU; else gpu tests.

    bench/pytest_log.py writes each outcome to `log` when it is known and ends a process that hangs.
    """
    suite.write("\n## Tests\n")
    limit = time.monotonic() + min(seconds, suite.left)
    waiting = [(test_file(op), i, SHARDS.get(op, 1)) for op in OPS for i in range(SHARDS.get(op, 1))]
    files = sorted((ROOT / "tests" / "ops").glob("test_*.py"))
    files += [path for path in sorted((ROOT / "tests").glob("test_*.py")) if "mark.gpu" in path.read_text()]
    known = {file for file, *_ in waiting}
    waiting += [(name, 0, 1) for path in files if (name := str(path.relative_to(ROOT))) not in known]
    running: dict[tuple, Process] = {}
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                key = waiting.pop(0)
                running[key] = start_tests(*key, log)
            for key, process in list(running.items()):
                if process.process.poll() is None and time.monotonic() < limit:
                    continue
                del running[key]
                judge(suite, key, *process.wait(0), lines_of(log))
            time.sleep(0.2)
    finally:
        for process in running.values():
            process.end()


def start_tests(file: str, shard: int, shards: int, log: Path) -> Process:
    """A process of tests."""
    environment = {"TEST_LOG": str(log), "TEST_SECONDS": str(TEST_SECONDS), "TEST_SHARD": f"{shard}/{shards}"}
    which = [] if file.startswith("tests/ops/") else ["-m", "gpu"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "bench.pytest_log", "-p", "no:cacheprovider", *which]
    return Process([*command, file], environment)


def judge(suite: Suite, key: tuple[str, int, int], status: int | None, output: str, outcomes: list[dict]) -> None:
    """Record what a process of tests came to."""
    file, shard, shards = key
    found = [x["outcome"] for x in outcomes if (x["file"], x["shard"]) == (file, f"{shard}/{shards}")]
    counts = ", ".join(f"{found.count(o)} {o}" for o in ("passed", "failed", "skipped") if o in found)
    name = file if shards == 1 else f"{file}, part {shard + 1} of {shards}"
    if status in (0, 5):  # 5: nothing was collected
        suite.write(f"- {name}: {counts or 'no tests'}")
        return
    suite.red.add(file)
    suite.failed.append(name)
    why = "stopped at the time limit" if status is None else f"exit status {status}"
    suite.write(f"- {name}: RED, {why}, {counts or 'no outcome'}\n\n```\n{output[-KEPT:].strip()}\n```\n")


def lines_of(path: Path) -> list[dict]:
    """The outcomes in a file that bench/pytest_log.py wrote."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def op_tasks(models: list[str], csv: Path) -> list[Task]:
    """One task an op and model: a process each, since an error of the GPU spoils the process it happens in."""
    command = [sys.executable, "bench/run.py", "--tests-passed", "--csv", str(csv)]
    return [
        Task(f"{op} {model}", [*command, "--op", op, "--models", model], OP_SECONDS, gates=(op,))
        for model in models
        for op in OPS
    ]


def step_tasks(out: Path, device: str) -> list[Task]:
    """Whole training steps."""
    return [
        Task(
            f"steps {name}",
            [
                *(sys.executable, "bench/throughput.py", *arguments.split(), "--device", "cuda", "--rounds", "3"),
                *("--compile", "fast,strong-blocks"),  # as one graph, 76 blocks would compile for minutes
                *("--json", str(out / f"steps-{device}-{name}.json")),
            ],
            STEP_SECONDS,
            needs,
        )
        for name, arguments, needs in STEPS
    ]


def data_task(images: str | None, out: Path, device: str) -> Task:
    """The loader, with the GPU's JPEG decoder."""
    command = [sys.executable, "bench/data.py", "--device", "gpu", "--seconds", "1", "--rounds", "2"]
    command += ["--source", str(images), "--json", str(out / f"data-{device}.json")]
    return Task("data", command, STEP_SECONDS, ("nvidia.dali", "PIL", "tqdm"))


def main(argv: list[str] | None = None) -> int:
    """Run it all; 1 where anything failed, 2 where there is no GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="folder for what is written")
    parser.add_argument("--images", metavar="FOLDER", help="JPEG files for the data benchmark")
    args = parser.parse_args(argv)
    deadline = time.monotonic() + 60 * args.minutes
    if not torch.cuda.is_available():
        print(
            "error: torch sees no CUDA device here; on a CPU run bench/run.py and bench/throughput.py", file=sys.stderr
        )
        return 2
    facts = about(torch.device("cuda"), "bf16")
    device = slug(facts["device"])
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    record, outcomes = out / f"gpu_suite-{device}.md", out / f"tests-{device}.jsonl"
    for file in (record, outcomes):
        file.unlink(missing_ok=True)
    suite = Suite(deadline, record)
    suite.write(f"# {facts['device']}, {facts['date']}\n\n{facts['versions']}, commit {facts['commit']}")
    missing = [name for name in ("deepspeed", "nvidia.dali", "flash_attn", "xformers") if not has(name)]
    suite.write(f"\nNot installed, so what needs them is skipped: {', '.join(missing) or 'nothing'}")

    workers = max(1, len(os.sched_getaffinity(0)) - 1)
    run_tests(suite, outcomes, min(TESTS_SECONDS, 20 * args.minutes), workers)
    csv = out / f"kernels-{device}.csv"
    others = [model for model in MODELS if model not in ("tiny", FIRST_MODEL)]
    for title, tasks in (
        (f"Ops at {FIRST_MODEL}", op_tasks([FIRST_MODEL], csv)),
        ("Whole steps", step_tasks(out, device)),
        ("Ops at the other models", op_tasks(others, csv)),
        ("Data", [data_task(args.images, out, device)] if args.images else []),
    ):
        suite.write(f"\n## {title}\n")
        for task in tasks:
            suite.run(task)
        if not tasks:
            suite.write("- data: skipped, no --images FOLDER was given")
    suite.write(f"\n{len(suite.failed)} failed; {suite.left:.0f} s left")
    return bool(suite.failed)


if __name__ == "__main__":
    sys.exit(main())
