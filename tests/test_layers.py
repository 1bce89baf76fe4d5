"""The rooms import downwards only; import-linter reads the contracts in pyproject.toml."""

import re

import pytest

from tests.house import build, run
from tests.launch import ROOT

pytest.importorskip("importlinter")


@pytest.fixture
def house(tmp_path):
    return build(tmp_path)


def lint(house):
    """The exit status of import-linter and what it prints."""
    command = "from importlinter.cli import lint_imports_command as lint; lint()"
    return run(house, "-c", command, str(ROOT / "pyproject.toml"), "--no-cache")


def test_every_contract_is_kept(house):
    status, output = lint(house)
    assert status == 0, output
    assert ", 0 broken" in output


@pytest.mark.parametrize(
    ("module", "line", "words"),
    [
        ("masks/samplers.py", "import ijepa_fast.models.vit", "ijepa_fast.masks is not allowed to import"),
        ("data/order.py", "import ijepa_fast.config", "ijepa_fast.data is not allowed to import ijepa_fast.config"),
        ("eval/knn.py", "import ijepa_fast.interop.load", "ijepa_fast.eval is not allowed to import"),
        ("kernels/fp8/ops.py", "import ijepa_fast.kernels.layer_norm", "ijepa_fast.kernels.fp8 is not allowed"),
        ("kernels/common/memory.py", "import ijepa_fast.kernels.fp8", "ijepa_fast.kernels.common is not allowed"),
        ("run/build.py", "import deepspeed", "Only engine knows DeepSpeed BROKEN"),
        ("eval/knn.py", "import triton", "Only kernels know Triton BROKEN"),
        ("cellar.py", "", "ijepa_fast.cellar"),
    ],
)
def test_an_arrow_that_points_up_is_found(house, module, line, words):
    with open(house / "ijepa_fast" / module, "a") as file:
        file.write(f"\n{line}\n")
    status, output = lint(house)
    assert status == 1
    assert words in output


def test_the_whole_configuration_stops_at_the_commands_and_the_run():
    """Rooms below take their own sections or plain values."""
    package = ROOT / "ijepa_fast"
    above = {"config.py", "front.py", "plan.py", "train.py", "probe.py", "visualise", "run", "report"}
    rooms = [path for path in package.iterdir() if path.name not in above]
    files = {path for room in rooms for path in (room.rglob("*.py") if room.is_dir() else [room])}
    whole = re.compile(r"^from ijepa_fast\.config import (\(\n[^)]*|.*)\bConfig\b", re.MULTILINE)
    assert [path.name for path in files if path.suffix == ".py" and whole.search(path.read_text())] == []
    assert whole.search((package / "train.py").read_text())
