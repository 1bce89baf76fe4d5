"""The GPU suite without a GPU: what it skips, stops and records; and that all of it runs where next to nothing is
installed."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench import gpu_suite

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
    gpu_suite.run_tests(suite, log, 60, workers=4)
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
    for one in gpu_suite.step_tasks(tmp_path, "gpu"):
        assert one.command[1] == "bench/throughput.py"
        throughput.parse(one.command[2:])


def test_the_suite_runs_from_tests_to_data(tmp_path, monkeypatch):
    facts = {"device": "NVIDIA Test", "date": "today", "versions": "torch 2", "commit": "abc"}
    monkeypatch.setattr(gpu_suite.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_suite, "about", lambda *_: facts)
    red = "tests/ops/test_layer_norm.py"
    monkeypatch.setattr(gpu_suite, "run_tests", lambda suite, *_: suite.red.add(red))
    monkeypatch.setattr(gpu_suite, "OPS", dict.fromkeys(("layer_norm", "bias_gelu")))
    monkeypatch.setattr(gpu_suite, "STEPS", (("engine", "--engine 1", ("nobody_has_this",)),))
    op_tasks = gpu_suite.op_tasks

    def harmless(models, csv):
        tasks = op_tasks(models, csv)
        for one in tasks:
            one.command = [sys.executable, "-c", ""]
        return tasks

    monkeypatch.setattr(gpu_suite, "op_tasks", harmless)
    assert gpu_suite.main(["--minutes", "2", "--out", str(tmp_path)]) == 0
    lines = (tmp_path / "gpu_suite-nvidia-test.md").read_text().splitlines()
    ran = [line.partition(":")[0] for line in lines if line.startswith(("- ", "## "))]
    assert ran[:6] == [
        "## Ops at H/14",
        "- layer_norm H/14",
        "- bias_gelu H/14",
        "## Whole steps",
        "- steps engine",
        ran[5],
    ]
    assert ran[-2:] == ["## Data", "- data"]
    assert "- layer_norm H/14: skipped, tests of layer_norm did not pass" in lines
    assert "- steps engine: skipped, needs nobody_has_this, not installed" in lines
    assert "- data: skipped, no --images FOLDER was given" in lines


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
