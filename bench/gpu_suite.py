"""Everything that wants a GPU, in one command that fits twelve minutes, most important first, written as it goes.

    python bench/gpu_suite.py [--minutes 12] [--out bench/results] [--external CHECKOUT] [--images FOLDER]
    python bench/gpu_suite.py --plan       # what it would run, and for how long; needs no GPU
    python bench/gpu_suite.py --toy        # all of it at toy sizes on a CPU, tests and tiles left out: tries the suite

In order: ceilings, the tests that graphs and fp8 rest on, whole steps of H/14, variants to choose among, training
through DeepSpeed, other models and methods, ops, the other tests, data. Needs torch, Triton, numpy and pytest, and is
run from the checkout: nothing need be installed. What needs more is skipped by name. Every command has a time limit,
every test too, so that one that hangs costs its own time only; what no time is left for is skipped by name as well.

Writes gpu_suite-DEVICE.md (what ran, what was skipped, what failed), tests-DEVICE.jsonl, kernels-DEVICE.csv,
ceilings-DEVICE.json, sweep-DEVICE.json, train-DEVICE.jsonl and, after every round, steps-DEVICE-NAME.json.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import io
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from bench.baselines.others import PLAIN
from bench.registry import MODELS, OPS
from bench.run import ROOT, about, slug
from ijepa_fast.methods.method import METHODS

TEST_SECONDS = 60  # of one test
SHARDS = {"varlen_attention": 4}  # processes for an op's tests, where not one: most of their time is compilation
OP_SECONDS = 50  # of an op at one model, torch.compile included
KEPT = 6000  # characters of the output of what failed
# What whole steps rest on: tested first. The other tests follow when all else is measured.
FIRST_TESTS = ("tests/test_step.py", "tests/test_mae.py", *map("tests/ops/test_{}.py".format, ("fp8", "adamw_ema")))
FIRST_OPS = ("layer_norm", "bias_gelu", "adamw_ema")  # of the ops' tables, at the first model
DEEPSPEED = ("omegaconf", "deepspeed", "safetensors", "tqdm")
ALL = "fast,fast-graphs,strong,plain"


@dataclass(frozen=True)
class Step:
    """A line of the plan: a program of this checkout, and the seconds that it is expected to take and may take.

    toy: what stands in for `arguments` at toy sizes; None: nothing does.
    """

    name: str
    program: str
    arguments: str
    expected: float
    limit: float
    toy: str | None = ""
    needs: tuple[str, ...] = ()


def steps(name: str, arguments: str, expected: float, **others: Any) -> Step:
    """A line of whole steps; `toy` is more of its arguments at toy sizes, None leaves it out there."""
    rounds = "--rounds 3 --steps 3 --compile fast,strong-blocks"  # as one graph, 76 blocks would compile for minutes
    method = re.search(r"--method \w+", arguments)
    more = others.pop("toy", "")
    toy = "--model vit_tiny --crop 64 --patch 8 --batch 2 --predictor-depth 1 --rounds 1 --steps 1 --warmup 1 "
    toy = None if more is None else f"{toy} --impl fast,plain {method[0] if method else ''} {more}"
    return Step(name, "bench/throughput.py", f"{arguments} {rounds}", expected, 1.5 * expected + 25, toy, **others)


# The seconds are estimates for one H200, none of them measured.
PLAN = (
    Step("ceilings", "bench/ceilings.py", "", 20, 40, "--small"),
    steps("ijepa-h14", f"--model vit_huge --patch 14 --batch 128 --impl {ALL},fast-graphs-fp8", 125),
    steps(
        "ijepa-h14-full",
        "--model vit_huge --patch 14 --batch 128 --context full --impl fast,fast-graphs,fast-graphs-fp8 --breakdown",
        45,
        toy="--breakdown",
    ),
    Step("sweep", "bench/sweep.py", "--what target,fp8,tiles", 75, 110, "--small --what target,fp8"),
    steps(
        "ijepa-h14-engine",
        "--model vit_huge --patch 14 --batch 128 --impl fast-graphs --engine 1",
        35,
        toy="--engine 1",
        needs=DEEPSPEED,
    ),
    Step(
        "train",
        "ijepa_fast/train.py",
        "--config in1k_vith14_ep300 batch_size=128 optim.steps=100 log.every=10",
        45,
        90,
        "--config quickstart optim.steps=2 batch_size=4 log.every=1 model.depth=1 model.predictor_depth=1",
        DEEPSPEED,
    ),
    steps("ijepa-b16", f"--model vit_base --batch 128 --impl {ALL}", 60, toy=None),
    steps("ijepa-s16", f"--model vit_small --batch 128 --impl {ALL}", 40, toy=None),
    steps("ijepa-l16", f"--model vit_large --batch 128 --impl {ALL}", 50, toy=None),
    steps("ijepa-h16-448", f"--model vit_huge --crop 448 --batch 32 --impl {ALL}", 50, toy=None),
    steps("ijepa-g16", f"--model vit_giant --batch 64 --impl {ALL}", 50, toy=None),
    steps("mae-h14", "--method mae --model vit_huge --patch 14 --batch 64 --impl fast,fast-graphs,plain", 25),
    steps("ibot-s16", "--method ibot --model vit_small --batch 32 --impl fast,plain", 20),
    steps("ijepa-h14-largest", "--model vit_huge --patch 14 --max-batch --impl fast", 40, toy=None),
)
# As time is left at the end: every other registered method, with its plain rendering where there is one.
OTHER_METHODS = tuple(
    steps(
        f"{name}-s16",
        f"--method {name} --model vit_small --batch 32 --impl fast{',plain' * (name in PLAIN)}",
        20,
        toy=None,
    )
    for name in METHODS
    if name not in ("ijepa", "mae", "ibot")
)


@dataclass
class Task:
    """One command: what it needs, how long it may take, and the ops whose tests must have passed."""

    name: str
    command: list[str]
    seconds: float
    needs: tuple[str, ...] = ()
    gates: tuple[str, ...] = ()
    leaves: tuple[Path, Path] | None = None  # a file of it that is kept, and where


@dataclass
class Suite:
    """Runs tasks until the time is up, and keeps the record."""

    deadline: float
    record: Path
    red: set[str] = field(default_factory=set)  # files of tests that did not pass
    failed: list[str] = field(default_factory=list)
    start: Callable[[list[str]], Any] = field(default_factory=lambda: Process)

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
        self._run(task)
        if task.leaves is not None and task.leaves[0].is_file():
            task.leaves[1].write_bytes(task.leaves[0].read_bytes())

    def _run(self, task: Task) -> None:
        if reason := self.reason_to_skip(task):
            self.write(f"- {task.name}: skipped, {reason}")
            return
        start = time.monotonic()
        status, output = self.start(task.command).wait(min(task.seconds, self.left))
        took = f"{time.monotonic() - start:.0f} s"
        if status == 0:
            self.write(f"- {task.name}: done in {took}")
        else:
            self.failed.append(task.name)
            why = "stopped at its time limit" if status is None else f"exit status {status}"
            self.write(f"- {task.name}: FAILED after {took}, {why}\n\n```\n{output[-KEPT:].strip()}\n```\n")


class Inside:
    """A command of Python run in this process, for sizes at which starting one takes longest."""

    def __init__(self, command: list[str]):
        self.command = command

    def wait(self, seconds: float) -> tuple[int | None, str]:
        """(exit status, output)."""
        module = importlib.import_module(self.command[1].removesuffix(".py").replace("/", "."))
        said, threads = io.StringIO(), torch.get_num_threads()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            try:
                status = module.main(self.command[2:])
            except SystemExit as stop:
                status = stop.code if isinstance(stop.code, int) else 1
            except Exception:
                status = 1
                traceback.print_exc()
        torch.set_num_threads(threads)  # training takes all
        return status, said.getvalue()


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


def test_files() -> list[str]:
    """Files of tests that a GPU runs, those of the ops first."""
    files = sorted((ROOT / "tests" / "ops").glob("test_*.py"))
    files += [path for path in sorted((ROOT / "tests").glob("test_*.py")) if "mark.gpu" in path.read_text()]
    known = [test_file(op) for op in OPS]
    return known + [name for path in files if (name := str(path.relative_to(ROOT))) not in known]


def run_tests(suite: Suite, log: Path, seconds: float, workers: int, files: list[str]) -> None:
    """Run the tests, `workers` processes at a time: an op's file whole, as its kernels run on the GPU; else gpu tests.

    bench/pytest_log.py writes each outcome to `log` when it is known and ends a process that hangs.
    """
    limit = time.monotonic() + min(seconds, suite.left)
    shards = {test_file(op): count for op, count in SHARDS.items()}
    waiting = [(file, i, shards.get(file, 1)) for file in files for i in range(shards.get(file, 1))]
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


def op_tasks(models: list[str], csv: Path, ops: Iterable[str] = OPS) -> list[Task]:
    """One task an op and model: a process each, since an error of the GPU spoils the process it happens in."""
    command = [sys.executable, "bench/run.py", "--tests-passed", "--csv", str(csv)]
    return [
        Task(f"{op} {model}", [*command, "--op", op, "--models", model], OP_SECONDS, gates=(op,))
        for model in models
        for op in ops
    ]


def task_of(step: Step, out: Path, device: str, toy: bool = False, external: str | None = None) -> Task | None:
    """The command of a line of the plan; None where it has none at toy sizes."""
    arguments = step.arguments if not toy else step.toy
    if arguments is None:
        return None
    words, leaves = arguments.split(), None
    if step.program == "ijepa_fast/train.py":
        runs = out / f"runs-{device}"
        words += ["data.source=synthetic", f"runs={runs}", f"name=gpu-suite-{os.getpid()}", "probe.enabled=false"]
        words += ["log.tensorboard=false", f"engine.device={'cpu' if toy else 'cuda'}"]
        leaves = runs / f"gpu-suite-{os.getpid()}" / "log.jsonl", out / f"train-{device}.jsonl"
    else:
        kind = "" if step.name in ("ceilings", "sweep") else "steps-"
        file = f"{step.name}-{device}" if not kind else f"steps-{device}-{step.name}"
        words += ["--device", "cpu" if toy else "cuda", "--json", str(out / f"{file}.json")]
        if external and step.name.startswith("ijepa") and "plain" in arguments:
            words += ["--external", external]
    return Task(step.name, [sys.executable, step.program, *words], step.limit, step.needs, leaves=leaves)


def plan() -> str:
    """The plan as a table: when a line is expected to begin, for how long, and at most."""
    lines = ["| from, s | for, s | at most, s | what | needs |", "|---|---|---|---|---|"]
    begin = 0.0
    for step in (PLAN[0], TESTS, *PLAN[1:]):
        needs = ", ".join(step.needs) or "-"
        lines.append(f"| {begin:.0f} | {step.expected:.0f} | {step.limit:.0f} | {step.name} | {needs} |")
        begin += step.expected
    return "\n".join(
        [*lines, f"{begin:.0f} s are expected; then ops, the other tests, data and other methods, as time is left"]
    )


TESTS = Step("tests of what steps rest on", "pytest", " ".join(FIRST_TESTS), 45, 60)


def data_task(images: str | None, out: Path, device: str) -> Task:
    """The loader, with the GPU's JPEG decoder."""
    command = [sys.executable, "bench/data.py", "--device", "gpu", "--seconds", "1", "--rounds", "2"]
    command += ["--source", str(images), "--json", str(out / f"data-{device}.json")]
    return Task("data", command, 120, ("nvidia.dali", "PIL", "tqdm"))


def main(argv: list[str] | None = None) -> int:
    """Run it all; 1 where anything failed, 2 where there is no GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=12)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="folder for what is written")
    parser.add_argument("--external", metavar="CHECKOUT", help="of the published I-JEPA code, to compare with")
    parser.add_argument("--images", metavar="FOLDER", help="JPEG files for the data benchmark")
    parser.add_argument("--plan", action="store_true", help="print what would run; start nothing")
    parser.add_argument("--toy", action="store_true", help="toy sizes on a CPU")
    args = parser.parse_args(argv)
    deadline = time.monotonic() + 60 * args.minutes
    if args.plan:
        print(plan())
        return 0
    if not args.toy and not torch.cuda.is_available():
        print("error: torch sees no CUDA device here; --toy tries the suite on a CPU", file=sys.stderr)
        return 2
    facts = about(torch.device("cpu" if args.toy else "cuda"), "bf16")
    device = slug(facts["device"]) + ("-toy" if args.toy else "")
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    record, outcomes, csv = out / f"gpu_suite-{device}.md", out / f"tests-{device}.jsonl", out / f"kernels-{device}.csv"
    for file in (record, outcomes):
        file.unlink(missing_ok=True)
    suite = Suite(deadline, record)
    if args.toy:
        suite.start = Inside
    suite.write(f"# {facts['device']}, {facts['date']}\n\n{facts['versions']}, commit {facts['commit']}")
    missing = [name for name in ("deepspeed", "nvidia.dali", "flash_attn", "xformers") if not has(name)]
    suite.write(f"\nNot installed, so what needs them is skipped: {', '.join(missing) or 'nothing'}")

    workers = max(1, len(os.sched_getaffinity(0)) - 1)
    tasks = [task for step in PLAN if (task := task_of(step, out, device, args.toy, args.external)) is not None]
    suite.write("\n## The plan\n")
    suite.run(tasks[0])
    if not args.toy:
        run_tests(suite, outcomes, TESTS.limit, workers, list(FIRST_TESTS))
    for task in tasks[1:]:
        suite.run(task)
    if not args.toy:
        suite.write("\n## Ops, the other tests, data\n")
        for task in op_tasks(["H/14"], csv, FIRST_OPS):
            suite.run(task)
        others = [file for file in test_files() if file not in FIRST_TESTS]
        run_tests(suite, outcomes, suite.left, workers, others)
        first = [op for op in OPS if op not in FIRST_OPS]
        models = [model for model in MODELS if model not in ("tiny", "H/14")]
        for task in [*op_tasks(["H/14"], csv, first), *op_tasks(models, csv)]:
            suite.run(task)
        if args.images:
            suite.run(data_task(args.images, out, device))
        else:
            suite.write("- data: skipped, no --images FOLDER was given")
    if not args.toy:
        suite.write("\n## Other methods\n")
        for step in OTHER_METHODS:
            if (task := task_of(step, out, device, False, args.external)) is not None:
                suite.run(task)
    suite.write(f"\n{len(suite.failed)} failed; {suite.left:.0f} s left")
    return bool(suite.failed)


if __name__ == "__main__":
    sys.exit(main())
