"""Where results come from: the head of every file of figures."""

import datetime
import json
import platform
import socket
import subprocess

import pytest
import torch

import ijepa_fast
from ijepa_fast.run.provenance import FORMAT, commit, device_name, provenance


def git(folder, *words):
    options = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    return subprocess.run(["git", *options, *words], cwd=folder, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def checkout(tmp_path):
    (tmp_path / "setup.py").write_text("")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "setup.py")
    git(tmp_path, "commit", "-q", "-m", "first")
    return tmp_path


def test_it_says_what_and_where():
    found = json.loads(json.dumps(provenance("cpu")))
    assert found["version"] == FORMAT
    then = datetime.datetime.fromisoformat(found["date"])
    assert then.utcoffset() == datetime.timedelta(0)
    assert abs(datetime.datetime.now(datetime.UTC) - then) < datetime.timedelta(minutes=1)
    assert found["host"] == socket.gethostname()
    assert found["device"] == device_name("cpu")
    assert "thread" in found["device"]
    assert list(found["versions"]) == ["python", "ijepa_fast", "torch", "triton", "deepspeed"]
    assert found["versions"]["python"] == platform.python_version()
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["ijepa_fast"] == ijepa_fast.__version__


@pytest.mark.gpu
def test_a_gpu_has_its_name():
    assert device_name("cuda") == torch.cuda.get_device_name()


def test_commit_of_a_checkout(checkout):
    head = git(checkout, "rev-parse", "HEAD").strip()
    assert commit(checkout) == head
    (checkout / "setup.py").write_text("changed")
    assert commit(checkout) == f"{head}-dirty"


def test_an_installation_inside_a_checkout_has_no_commit(checkout):
    packages = checkout / ".venv" / "site-packages"
    packages.mkdir(parents=True)
    assert commit(packages) is None


def test_without_git_there_is_no_commit(checkout, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert commit(checkout) is None
