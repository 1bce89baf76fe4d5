"""`train --hostfile`: a mistyped hostfile or machine is one sentence that names it, before anything starts."""

import os
import sys

import pytest

from ijepa_fast import hosts
from ijepa_fast.front import main


@pytest.fixture(autouse=True)
def no_rank(monkeypatch):
    """A run that another test made in this process leaves it a rank of a job, which reads no hostfile."""
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def test_machines_of_a_hostfile(tmp_path):
    path = tmp_path / "hosts"
    path.write_text("# two machines\n\nnode-1 slots=8\n  10.0.0.2   slots=4  # the small one\n")
    assert hosts.read(str(path)) == {"node-1": 8, "10.0.0.2": 4}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "node-1 slots=8\nnode-2 slot=8\n",
            "hosts, line 2: expected a line such as `node-1 slots=8`, got 'node-2 slot=8'",
        ),
        ("node-1\n", "line 1: expected a line such as `node-1 slots=8`, got 'node-1'"),
        ("node-1 slots=0\n", "got 'node-1 slots=0'"),
        ("node-1 slots=eight\n", "got 'node-1 slots=eight'"),
        ("node-1 slots=8\n\nnode-1 slots=8\n", "line 3: node-1 is named twice"),
        ("# nothing\n", "names no machine"),
        (None, "cannot be read: No such file or directory"),
    ],
)
def test_a_typo_in_a_hostfile(tmp_path, capsys, text, words):
    path = tmp_path / "hosts"
    if text is not None:
        path.write_text(text)
    assert main(["--config", "quickstart", "--hostfile", str(path)]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert words in said


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """A folder of programs that is all there is on the path, and a hostfile of two machines."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    (tmp_path / "hosts").write_text("node-1 slots=8\nnodw-2 slots=8\n")

    def add(name: str, code: str) -> None:
        (folder / name).write_text(f"#!{sys.executable}\n{code}")
        (folder / name).chmod(0o755)

    return add, str(tmp_path / "hosts")


# Says what ssh says of a name that nobody knows.
SSH = """import sys
name = sys.argv[-2]
if name == "nodw-2":
    print(f"ssh: Could not resolve hostname {name}: Name or service not known", file=sys.stderr)
sys.exit(255 if name == "nodw-2" else 0)
"""


def test_a_machine_that_cannot_be_reached_is_named(programs, capsys):
    add, hostfile = programs
    assert main(["--config", "quickstart", "--hostfile", hostfile]) == 1
    assert "there is no pdsh here" in capsys.readouterr().err
    add("pdsh", "")
    assert main(["--config", "quickstart", "--hostfile", hostfile]) == 1
    assert "there is no ssh here" in capsys.readouterr().err
    add("ssh", SSH)
    assert main(["--config", "quickstart", "--hostfile", hostfile]) == 1
    assert capsys.readouterr().err == (
        f"error: {hostfile}: nodw-2 cannot be reached by ssh (Could not resolve hostname nodw-2: Name or service not "
        "known); mend its name in the hostfile, or see to it that `ssh nodw-2 true` works without a password\n"
    )


def test_where_all_can_be_reached_the_launcher_takes_over(programs, monkeypatch):
    add, hostfile = programs
    add("pdsh", "")
    add("ssh", "")
    became = []
    monkeypatch.setattr(os, "execv", lambda program, words: became.extend(words))
    monkeypatch.setattr("ijepa_fast.front.check_early", lambda config: pytest.fail("went on after it"))
    with pytest.raises(pytest.fail.Exception):
        main(["--config", "quickstart", "--hostfile", hostfile, "batch_size=8"])
    launcher = ["-m", "deepspeed.launcher.runner", "--hostfile", hostfile]
    assert became[1:5] == launcher
    assert became[5].endswith("ijepa_fast/train.py")
    assert became[6:] == ["--config", "quickstart", "batch_size=8"]


def test_a_hostfile_says_how_many_ranks(capsys):
    assert main(["--config", "quickstart", "--hostfile", "hosts", "--ranks", "2"]) == 1
    assert "leave --ranks out" in capsys.readouterr().err
