"""The GPU suite without a GPU: what it skips, stops and records; and that all of it runs where next to nothing is
installed."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench import gpu_suite, sweep
from tests.launch import unlaunched

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def suite(tmp_path):
    return gpu_suite.Suite(time.monotonic() + 60, tmp_path / "record.md")


def task(code, seconds=30.0, **others):
    return gpu_suite.Task("a task", [sys.executable, "-c", code], seconds, **others)


def test_what_cannot_run_is_skipped_by_name(suite):
    suite.red.add("tests/ops/test_layer_norm.py")
    suite.run(task("1/0", needs=("numpy", "nvidia.nobody_has", "flash_nothing")))
    suite.run(task("1/0", gates=("layer_norm",)))
    suite.deadline = time.monotonic() + 5
    suite.run(task("1/0"))
    assert suite.record.read_text().splitlines() == [
        "- a task: skipped, needs nvidia.nobody_has, flash_nothing, not installed",
        "- a task: skipped, tests of layer_norm did not pass",
        "- a task: skipped, no time left",
    ]
    assert not suite.failed


def test_a_command_that_hangs_costs_its_own_time_only(suite, tmp_path):
    # What it started must end too, or it would go on holding the GPU.
    child = f"import time, pathlib; time.sleep(4); pathlib.Path({str(tmp_path / 'alive')!r}).touch()"
    code = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); print('x' * 99999); "
    start = time.monotonic()
    suite.run(task(code + "sys.stdout.flush(); time.sleep(60)", seconds=2))
    assert time.monotonic() - start < 30
    suite.run(task("print('fine')"))
    text = suite.record.read_text()
    assert "a task: FAILED after" in text
    assert "stopped at its time limit" in text
    assert "- a task: done in" in text
    assert suite.failed == ["a task"]
    time.sleep(5)
    assert not (tmp_path / "alive").exists()


def test_a_failure_is_recorded_with_what_it_said(suite):
    suite.run(task("import sys; sys.exit('no such shape')"))
    text = suite.record.read_text()
    assert "exit status 1" in text
    assert "no such shape" in text


@pytest.mark.slow
def test_tests_are_cut_off_one_by_one_and_gate_their_op(suite, tmp_path, monkeypatch):
    folder = tmp_path / "tests" / "ops"
    folder.mkdir(parents=True)
    (tmp_path / "bench").symlink_to(ROOT / "bench")
    (folder / "test_good.py").write_text("def test_a():\n    pass\n\n\ndef test_b():\n    pass\n")
    (folder / "test_hangs.py").write_text(
        "import time\n\n\ndef test_a():\n    pass\n\n\ndef test_b():\n    time.sleep(90)\n"
    )
    gpu = "import pytest\n\n\n@pytest.mark.gpu\ndef test_gpu():\n    pass\n\n\ndef test_cpu():\n    assert False\n"
    (tmp_path / "tests" / "test_rest.py").write_text(gpu)
    (tmp_path / "pyproject.toml").write_text("[tool.pytest.ini_options]\nmarkers = ['gpu: needs one']\n")
    monkeypatch.setattr(gpu_suite, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_suite, "OPS", {"good": None, "hangs": None})
    monkeypatch.setattr(gpu_suite, "SHARDS", {"good": 2})
    monkeypatch.setattr(gpu_suite, "TEST_SECONDS", 2)
    log = tmp_path / "tests.jsonl"
    gpu_suite.run_tests(suite, log, 60, 4, gpu_suite.test_files())
    assert suite.red == {"tests/ops/test_hangs.py"}
    text = suite.record.read_text()
    assert "- tests/ops/test_good.py, part 1 of 2: 1 passed" in text
    assert "- tests/ops/test_good.py, part 2 of 2: 1 passed" in text
    assert "- tests/test_rest.py: 1 passed" in text
    assert "test_hangs.py: RED, exit status 1" in text
    assert "Timeout" in text
    assert sorted(json.loads(line)["test"] for line in log.read_text().splitlines()) == [
        "tests/ops/test_good.py::test_a",
        "tests/ops/test_good.py::test_b",
        "tests/ops/test_hangs.py::test_a",
        "tests/test_rest.py::test_gpu",
    ]
    assert suite.reason_to_skip(task("", gates=("hangs",))) == "tests of hangs did not pass"
    assert suite.reason_to_skip(task("", gates=("good",))) is None


def test_every_task_is_a_command_that_its_program_accepts(tmp_path):
    """Arguments are parsed, nothing is run."""
    from bench import run, throughput

    tasks = gpu_suite.op_tasks(["H/14"], tmp_path / "k.csv")
    assert [t.name for t in tasks] == [f"{op} H/14" for op in gpu_suite.OPS]
    for one in tasks:
        assert one.command[1] == "bench/run.py"
        assert run.parse(one.command[2:]).op == list(one.gates)
    for step in gpu_suite.PLAN:
        for toy in (False, True):
            one = gpu_suite.task_of(step, tmp_path, "gpu", toy, external=None if toy else str(tmp_path))
            if one is not None and one.command[1] == "bench/throughput.py":
                compared = "plain" in step.arguments and step.name.startswith("ijepa") and not toy
                assert ("published" in throughput.parse(one.command[2:]).impl) == compared
    assert gpu_suite.TESTS.arguments.split() == [file for file in gpu_suite.FIRST_TESTS if (ROOT / file).is_file()]
    assert set(gpu_suite.FIRST_TESTS) <= set(gpu_suite.test_files())


def test_the_plan_fits_and_is_printed(capsys):
    """Most important first: the whole steps of H/14 begin within the second minute."""
    assert gpu_suite.main(["--plan"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines[2:-1]]
    assert [row[3] for row in rows] == [step.name for step in (gpu_suite.PLAN[0], gpu_suite.TESTS, *gpu_suite.PLAN[1:])]
    assert float(next(row[0] for row in rows if row[3] == "ijepa-h14")) < 120
    total = sum(float(row[1]) for row in rows)
    assert lines[-1].startswith(f"{total:.0f} s are expected")
    assert total <= 12.2 * 60
    assert all(step.limit > step.expected for step in gpu_suite.PLAN)


@pytest.mark.slow
def test_the_suite_runs_at_toy_sizes(tmp_path):
    """End to end on a CPU, in one process: every kind of line, and what each leaves."""
    pytest.importorskip("deepspeed")
    pytest.importorskip("nvidia.dali")
    words = [sys.executable, "bench/gpu_suite.py", "--toy", "--out", str(tmp_path)]
    environment = unlaunched(OMP_NUM_THREADS="1", TRITON_INTERPRET="0")
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    ran = [line.partition(":") for line in done.stdout.splitlines() if line.startswith("- ")]
    assert [name for name, *_ in ran] == [f"- {step.name}" for step in gpu_suite.PLAN if step.toy is not None]
    assert all("done in" in rest for *_, rest in ran)
    left = {re.sub("-[^-]*-1-thread-toy|-[a-z0-9-]*-toy", "", path.name): path for path in tmp_path.glob("*.json*")}
    assert {"ceilings.json", "sweep.json", "train.jsonl", "steps-ijepa-h14.json"} <= left.keys()
    assert [json.loads(line)["step"] for line in left["train.jsonl"].read_text().splitlines()] == [1, 2]
    for name in ("ijepa-h14", "ijepa-h14-full", "ijepa-h14-engine", "mae-h14", "ibot-s16"):
        result = json.loads(left[f"steps-{name}.json"].read_text())
        assert result["rounds"] == 1
        assert not result["failed"]
        assert all(row["images_per_second"] > 0 for row in result["rows"])
    assert len(json.loads(left["steps-ijepa-h14-full.json"].read_text())["stages"]) == 6


def test_tiles_are_compiled_without_a_gpu(tmp_path):
    """What bench/sweep.py times: every width of its shapes has candidates that do not spill, on both architectures."""
    found = json.loads((ROOT / "bench" / "results" / "tiles-compiled.json").read_text())
    good = {(x["kernel"], x["capability"], x["head_dim"]) for x in found if not x["error"] and x["spilled"] == 0}
    widths = {shape.head_dim for shape in sweep.SHAPES}
    assert good >= {(kernel, sm, width) for kernel in ("bwd queries", "bwd keys") for sm in (9, 10) for width in widths}


@pytest.mark.slow
def test_a_tile_is_forced_and_compiled():
    words = "from bench import sweep; from ijepa_fast.kernels.varlen_attention.tiles import Tile, bwd_tiles; "
    words += "b = bwd_tiles(9, 64, 2); print(sweep.compiled(('bwd keys', 9, 64, Tile(32, 64, 8, 2)))); "
    words += "assert bwd_tiles(9, 64, 2) == b"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", words], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert "'tile': [32, 64, 8, 2]" in done.stdout, done.stderr
    assert "'error': ''" in done.stdout


def bare(*words):
    """A run of Python that finds torch, Triton, numpy and pytest, but neither this project nor anything else."""
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTHONPATH")}
    command = [sys.executable, "tests/bare.py", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_bare_really_hides(tmp_path):
    (tmp_path / "probe.py").write_text(
        "import importlib.util as u, sys\n"
        "import torch, numpy, pytest\n"
        "names = 'omegaconf safetensors matplotlib tqdm PIL deepspeed nvidia hypothesis sklearn transformers yaml'\n"
        "print([n for n in names.split() if u.find_spec(n)], [f for f in sys.meta_path if 'editable' in str(f)])\n"
    )
    done = bare(tmp_path / "probe.py")
    assert done.stdout.strip() == "[] []", done.stderr


@pytest.mark.slow
def test_gpu_tests_are_collected_with_nothing_else_installed():
    done = bare("-m", "pytest", "-m", "gpu", "--collect-only", "-q", "-p", "no:cacheprovider")
    assert done.returncode == 0, done.stdout[-3000:]
    assert "ERROR" not in done.stdout
    for op in gpu_suite.OPS:
        if "mark.gpu" in (ROOT / gpu_suite.test_file(op)).read_text():
            assert f"{gpu_suite.test_file(op)}::" in done.stdout


@pytest.mark.slow
def test_benchmarks_run_with_nothing_else_installed(tmp_path):
    words = ("--models", "tiny", "--rounds", 1, "--providers", "eager", "--tests-passed", "--csv", tmp_path / "k.csv")
    done = bare("bench/run.py", "--op", "layer_norm", *words)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "k.csv").is_file()
    size = ("--model", "vit_tiny", "--crop", 96, "--batch", 2, "--rounds", 1, "--steps", 1, "--warmup", 1)
    done = bare("bench/throughput.py", "--impl", "fast,strong,plain", *size, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert "| plain |" in done.stdout


def test_suite_says_that_there_is_no_gpu():
    done = bare("bench/gpu_suite.py", "--minutes", 1)
    if done.returncode == 2:
        assert "torch sees no CUDA device" in done.stderr
    else:
        pytest.skip("there is a GPU: run the suite itself")
