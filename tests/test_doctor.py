"""The doctor finds what is there and what is not, and what it says of a port, a compiler, an extension is a cure."""

import shutil
import socket
import sys

import pytest
import torch

pytest.importorskip("deepspeed")
pytest.importorskip("nvidia.dali")

from ijepa_fast import doctor
from ijepa_fast.config import ConfigError
from ijepa_fast.engine import compiler
from ijepa_fast.kernels.common import chosen, dispatch, native
from tests.launch import finish, start


def rows(look):
    return list(doctor._safely(look))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_machine_that_can_train(capsys, tmp_path):
    assert doctor.main(["--runs", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "a run can train here"
    found = {line[5:15].strip() for line in lines[:-1]}
    assert found == {name for name, _ in doctor.looks(tmp_path)}
    assert not [line for line in lines if line.startswith("bad")]
    for op in dispatch.OPS:
        assert any(f"{op} on cpu: " in line for line in lines)
    assert "loss and gradients of a small I-JEPA are those of the reference" in lines[-2]


def test_what_is_broken_is_bad_and_said_in_one_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(doctor, "looks", lambda _: [("dali", doctor._dali), ("self-test", doctor._self_test)])
    monkeypatch.setitem(sys.modules, "ijepa_fast.data.check", None)
    monkeypatch.setattr(doctor, "TOLERANCE", -1.0)
    assert doctor.main(["--runs", str(tmp_path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[:2]] == [["bad", "dali"], ["bad", "self-test"]]
    assert "set kernels=reference" in lines[1]
    assert len(lines) == 3


def test_a_missing_package(monkeypatch):
    monkeypatch.setattr(doctor, "_version", lambda name: None if name in ("deepspeed", "wandb") else "1")
    states = dict(rows(doctor._versions)[1:])
    assert states["bad"] == "not installed: deepspeed; pip install deepspeed"
    assert "wandb" in states["note"]


def test_a_port_in_use(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setenv("MASTER_PORT", str(port))
        ((state, text),) = rows(doctor._port)
    assert state == "note"
    assert f"{port}: Address already in use; deepspeed --master_port {port + 1}" in text


def test_a_run_on_a_port_in_use_says_so(tmp_path):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        first = f"import os; os.environ['MASTER_PORT'] = '{port}'"
        statuses, errors = finish(start(tmp_path, "optim.steps=1", first=first))
    assert statuses == [1]
    (line,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: MASTER_PORT={port}: another program has this port; start with another one")
    assert "Traceback" not in errors


def test_a_missing_compiler(monkeypatch):
    assert compiler.compiler() == (shutil.which("g++") or compiler.compiler())
    monkeypatch.setattr(shutil, "which", lambda name: None)
    ((state, text),) = rows(doctor._compiler)
    assert state == "note"
    assert "apt-get install g++" in text
    compiler.check_compiler(None, torch.device("cpu"))
    for compiled, device, words in ((True, "cpu", "engine.compile=true"), (None, "cuda", "engine.device=cuda")):
        with pytest.raises(ConfigError, match=f"{words}: there is no C\\+\\+ compiler.*apt-get install g"):
            compiler.check_compiler(compiled, torch.device(device))


@pytest.fixture
def no_loops(monkeypatch):
    monkeypatch.setattr(native, "loops", lambda: None)


def test_without_the_extension_the_start_says_what_it_costs(no_loops):
    assert chosen.missing().startswith(
        "csrc is not built: a step takes about twice as long on a CPU; to build it: pip "
    )
    assert chosen.chosen("cpu")["layer_norm"] == ("torch", "csrc is not built")
    ((state, text),) = rows(doctor._extension)
    assert (state, text) == ("note", chosen.missing())


def test_an_extension_of_another_torch_is_one_sentence(monkeypatch):
    """As a user meets it: the warning is one line, and the run goes on."""

    def fails(name):
        raise ImportError("undefined symbol: _ZN3c10")

    monkeypatch.setattr(native.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(native.importlib, "import_module", fails)
    with pytest.warns(RuntimeWarning, match=r"_C does not load \(undefined symbol.*build it again for torch"):
        assert not native.available.__wrapped__()


def test_settings_are_in_the_list(monkeypatch):
    before = {op: dispatch.choice(op) for op in dispatch.OPS}
    try:
        dispatch.use({"layer_norm": "reference"})
        assert chosen.chosen("cpu")["layer_norm"] == ("reference", "as asked for")
        assert "reference: patchify, layer_norm" in chosen.summary("cpu").replace("; ", "\n")
        assert chosen.chosen("cuda")["patchify"] == ("triton", "on a GPU")
    finally:
        dispatch.use(before)


@pytest.mark.parametrize("free", [1e9, 1e12])
def test_a_disk(monkeypatch, tmp_path, free):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("usage", (), {"free": free}))
    (state, text), *_ = rows(lambda: doctor._disk(tmp_path / "runs" / "x"))
    assert state == ("note" if free == 1e9 else "ok")
    assert f"{free / 1e9:.0f} GB free" in text
