"""The command line: what is wrong is said before torch is imported, and names what to write; one rank, and several."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict

import pytest

pytest.importorskip("omegaconf")

from ijepa_fast import configs, partly, ranks
from ijepa_fast.__main__ import COMMANDS
from ijepa_fast.__main__ import main as command_line
from ijepa_fast.config import as_yaml, flatten, load_config
from ijepa_fast.front import main, without
from tests.launch import LAUNCHER, ROOT, TINY, hear_signals, losses, unlaunched

QUICKSTART = str(ROOT / "configs" / "quickstart.yaml")
METHODS = sorted(path.stem for path in (ROOT / "ijepa_fast" / "methods").glob("[!_]*.py") if path.stem != "method")
MEMBERS = ("Options", "check", "reads_mask", "capabilities")
HEAVY = ("torch", "deepspeed", "numpy", "matplotlib", "nvidia", "PIL")


@pytest.mark.parametrize(
    "arguments",
    [
        ["optim.lr=-1"],
        ["lr=1"],
        ["--batch_size", "32"],
        ["data.source=/nowhere"],
        ["objective.method=ijepaa"],
        ["mask.strategy=blocks"],
        ["objective.options.maskd=1"],
        ["objective.options.loss=l3"],
        ["mask.min_keep=300"],
        ["model.predictor_dim=102"],
        ["engine.cuda_graphs=on", "objective.method=ibot"],
        ["objective.method=mae", "mask.min_keep=null", "objective.options.loss=null"],
        ["--ranks", "3"],
        ["--print-config"],
    ],
    ids=" ".join,
)
def test_torch_is_not_imported_to_say_what_is_wrong(arguments):
    code = f"""
import sys
from ijepa_fast.__main__ import main
try:
    main({["train", "--config", QUICKSTART, *arguments]!r})
finally:
    print("imported", [name for name in {HEAVY!r} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=unlaunched(), capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "imported []"
    assert arguments == ["--print-config"] or done.stderr.startswith("error: ")


@pytest.mark.parametrize("name", METHODS)
def test_every_methods_options_are_read_without_torch(name):
    """What is read of a method's file is what the method has."""
    path = ROOT / "ijepa_fast" / "methods" / f"{name}.py"
    code = f"""
import sys
from pathlib import Path
from ijepa_fast import partly
partly.read(Path({str(path)!r}), "Method", {MEMBERS!r})
print("imported", [name for name in {HEAVY!r} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=unlaunched(), capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "imported []", done.stderr
    pytest.importorskip("torch")
    from ijepa_fast.methods.method import method_class

    method = method_class(name)
    says = partly.read(path, "Method", MEMBERS)
    assert asdict(says["Options"]()) == asdict(method.Options())
    assert ("check" in says) == ("check" in vars(method))
    assert says.get("capabilities", frozenset()) == method.capabilities
    assert says.get("reads_mask", False) == method.reads_mask


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--batch_size", "32"], "settings are written key=value: batch_size=32"),
        (["--batch-size=32"], "settings are written key=value: batch_size=32"),
        (["--lr", "1e-3"], "optim.lr=1e-3"),
        (["--data", "/a b"], "'data.source=/a b'"),
        (["--optim.lr", "1e-3"], "optim.lr=1e-3"),
        (["--print_config"], "did you mean --print-config?"),
        (["--xyzzy"], "there is no option --xyzzy"),
        (["-h2"], "there is no option -h2"),
    ],
)
def test_options_that_are_settings(arguments, words, capsys):
    with pytest.raises(SystemExit) as end:
        main(["--config", QUICKSTART, *arguments])
    assert end.value.code == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ")
    assert words in errors
    assert len(errors.splitlines()) == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--ranks", "0"], "--ranks: expected at least 1, got 0"),
        (
            ["--ranks", "3"],
            "--ranks 3: batch_size=16 is not divisible by 3 ranks x engine.accumulation=1; set batch_size=15",
        ),
        (["objective.method=ijeap"], "did you mean ijepa"),
        (["objective.method=clip"], "there is no method 'clip'"),
    ],
)
def test_errors_of_the_command(arguments, words, capsys, monkeypatch):
    for name in LAUNCHER:  # which a run in this process may have left
        monkeypatch.delenv(name, raising=False)
    assert main(["--config", QUICKSTART, *arguments]) == 1
    assert words in capsys.readouterr().err


def test_the_printed_configuration_is_the_one_that_runs(tmp_path, capsys):
    overrides = ["optim.lr=2e-3", "kernels={layer_norm: reference}", "data.source=a b", "resume=step-3"]
    assert main(["--config", QUICKSTART, "--print-config", *overrides]) == 0
    printed = capsys.readouterr().out
    (tmp_path / "printed.yaml").write_text(printed)
    assert flatten(load_config(tmp_path / "printed.yaml")) == flatten(load_config(QUICKSTART, overrides))
    assert "lr: 0.002 " in printed
    assert "# learning rate at its end" in printed
    assert printed == as_yaml(load_config(QUICKSTART, overrides))


@pytest.mark.parametrize(("wrong", "right"), [("tarin", "train"), ("check_data", "check-data"), ("Report", "report")])
def test_a_mistyped_command(wrong, right, capsys):
    assert command_line([wrong]) == 2
    assert f"error: there is no command {wrong}; did you mean {right}?" in capsys.readouterr().err


def test_help_is_no_error(capsys):
    assert command_line(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in COMMANDS)
    assert command_line([]) == 2
    assert command_line(["--version"]) == 0


def test_a_reader_that_has_had_enough():
    command = f"{sys.executable} -m ijepa_fast train --config quickstart --print-config"
    words = command + " | true; echo ${PIPESTATUS[0]}"
    done = subprocess.run(["bash", "-c", words], cwd=ROOT, env=unlaunched(), capture_output=True, text=True)
    assert "Traceback" not in done.stderr
    assert done.stdout.strip() in ("0", "141")


def test_configs_are_listed_and_printed(capsys):
    assert command_line(["configs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == configs.names()
    assert all(len(line.split()) > 3 for line in lines)
    assert command_line(["configs", "quickstart"]) == 0
    assert capsys.readouterr().out == (ROOT / "configs" / "quickstart.yaml").read_text()
    assert command_line(["configs", "quickstrat"]) == 1
    assert "did you mean quickstart" in capsys.readouterr().err


def test_a_rank_gets_the_command_line_of_one():
    assert without("--ranks", ["--ranks", "2", "--config", "a", "--ranks=3", "b=2"]) == ["--config", "a", "b=2"]


def started(tmp_path, *arguments, **environment):
    """`ijepa-fast train` in a session of its own, started in another folder than the checkout."""
    script = [
        sys.executable,
        str(ROOT / "ijepa_fast" / "train.py"),
        "--config",
        "quickstart",
        f"runs={tmp_path}",
        *TINY,
    ]
    return subprocess.Popen(
        [*script, *arguments],
        cwd=tmp_path,
        env=unlaunched(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", TRITON_INTERPRET="0", **environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        preexec_fn=hear_signals,
        text=True,
        start_new_session=True,
    )


@pytest.mark.multi_rank
def test_two_ranks_without_a_launcher(tmp_path):
    pytest.importorskip("deepspeed")
    process = started(tmp_path, "--ranks", "2", "optim.steps=3")
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    assert len(losses(tmp_path / "quickstart")) == 3
    assert len(list((tmp_path / "quickstart" / "checkpoints" / "step-00000003").glob("rank-*"))) == 2


@pytest.mark.multi_rank
def test_ctrl_c_to_two_ranks_says_the_step_it_saved(tmp_path):
    pytest.importorskip("deepspeed")
    process = started(tmp_path, "--ranks", "2", "optim.steps=100000", "optim.epochs=1000")
    log = tmp_path / "quickstart" / "log.jsonl"
    deadline = time.time() + 240
    while time.time() < deadline and not (log.exists() and log.read_text()):
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 130, output
    step = max(int(path.name[5:]) for path in (tmp_path / "quickstart" / "checkpoints").glob("step-*"))
    assert f"stopped by SIGINT after step {step}, saved; the same command continues" in output
    assert output.count("stopped by") == 1


@pytest.mark.multi_rank
def test_what_all_ranks_meet_is_said_once(tmp_path):
    pytest.importorskip("deepspeed")
    process = started(tmp_path, "--ranks", "2", "mask.min_keep=99")
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 1
    assert output.count("error: ") == 1, output


def test_the_ranks_of_one_that_is_killed_end(tmp_path, monkeypatch):
    """The others get their time, then SIGTERM; the status is that of the first to fail."""
    monkeypatch.setattr(ranks, "GRACE", 0.5)
    code = "import os, sys, time; sys.exit(7) if os.environ['RANK'] == '1' else time.sleep(60)"
    (tmp_path / "train.py").write_text(code)
    monkeypatch.setattr(ranks, "__file__", str(tmp_path / "ranks.py"))
    begin = time.monotonic()
    assert ranks.start(2, []) == 7
    assert time.monotonic() - begin < 30
