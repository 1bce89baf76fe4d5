"""Every command of the README runs, from a folder of its own; what is too large here runs smaller, by overrides."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("deepspeed")
pytest.importorskip("nvidia.dali")

from ijepa_fast import configs
from tests.furnished import SMALL, furnish
from tests.launch import ROOT, unlaunched

README = (ROOT / "README.md").read_text()
COMMANDS = [
    line.partition("  #")[0].strip()
    for block in re.findall(r"(?:^    [^ \n].*\n)+", README, re.MULTILINE)
    for line in block.splitlines()
]
# By scripts of their own: .ci/run sets up, tests and packages.
ELSEWHERE = {"pip install .": ".ci/package"}
ADDED = {
    "--config quickstart": [*SMALL, "model.patch=8", "data.scenes=64", "data.scenes_size=32", "probe.images=60"],
    "--config photos": [*SMALL],
    "--config vit_small16": [*SMALL],
    "--config in1k_vith14_ep300": ["--print-config"],
    "--checkpoint runs/photos --data": ["--resize", "64", "--batch-size", "8"],
}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """An empty folder, with images in data/ and cat.jpg, and `ijepa-fast`, `deepspeed` on its path."""
    return furnish(tmp_path_factory.mktemp("readme"))


def run(place: Path, command: str) -> str:
    added = [word for words, more in ADDED.items() if words in command for word in more]
    if "plan" in command.split()[:2]:
        added = [word for word in added if word.startswith(("batch_size", "optim.epochs"))]
    words = [*shlex.split(command.replace("/data/", f"{place}/data/")), *added]
    words = [str(ROOT / word) if word == "ijepa_fast/train.py" else word for word in words]
    if "--hostfile" in words:  # other machines there are none: the rest of the line is checked
        words = [sys.executable, *words[words.index("--hostfile") + 2 :]]
    path = f"{place / 'bin'}:{Path(sys.executable).parent}:/usr/bin:/bin"
    environment = unlaunched(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", TRITON_INTERPRET="0")
    environment |= {"PATH": path, "PYTHONPATH": str(ROOT)}
    if words[0] == "deepspeed":
        words[1:1] = ["--num_gpus", "1", "--master_port", "29517"]
    done = subprocess.run(words, cwd=place, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done.stdout + done.stderr


def test_the_commands_are_found():
    assert len(COMMANDS) >= 12
    assert "ijepa-fast train --config quickstart" in COMMANDS
    for command, script in ELSEWHERE.items():
        assert command in COMMANDS
        assert script in (ROOT / ".ci" / "run").read_text()


# In the README's order: later ones use what earlier ones leave.
@pytest.mark.parametrize("command", [command for command in COMMANDS if command not in ELSEWHERE])
def test_a_command_of_the_readme(place, command):
    said = run(place, command)
    if "train" in command.split()[:2] and "--hostfile" not in command:
        name = re.search(r"name=(\S+)", command) or re.search(r"--config (\S+)", command)
        assert f"results are in runs/{name.group(1)}/" in said
    if "plan" in command.split()[:2]:
        assert "40 images" in said
        assert "fits on 1 x" in said
    if "check-data" in command:
        assert "40 files, 0 bad" in said


def test_the_lines_of_python(place, monkeypatch):
    """Six of them, on what the commands left."""
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(block.splitlines()) <= 7
    monkeypatch.chdir(place)
    there = {}
    exec(block, there)
    assert there["vectors"].shape == (1, 32)


def test_the_first_screen():
    """What, for whom, a picture, a figure with its machine and command, lines of Python and of output, in 60 lines."""
    screen = "\n".join(README.splitlines()[:52])
    for words in ("docs/masks.png", "times as fast as the published code", "Zen 5", "bench/throughput.py", "```python"):
        assert words in screen
    assert (ROOT / "docs" / "masks.png").stat().st_size > 10_000
    assert len(README.splitlines()) < 126


def test_the_figure_is_the_measured_one():
    results = (ROOT / "docs" / "results" / "cpu-steps.md").read_text()
    rows = re.findall(r"^\| (fast|published) \| truncate \| no \| ([\d.]+) \|", results, re.MULTILINE)
    place = rows.index(("published", "4.0"))
    assert rows[place - 1] == ("fast", "8.6")
    assert "8.6 against 4.0 images/s" in README
    on_gpu = (ROOT / "docs" / "results" / "gpu-steps.md").read_text()
    h14 = on_gpu.partition("arch vit_huge, patch 14, crop 224, batch 64")[2].partition("end of table")[0]
    assert re.search(r"^\| fast \|.*\| 1.97 \|$", h14, re.MULTILINE)
    assert "H/14 at batch 64 is 1.97 times as fast as a plain PyTorch step" in " ".join(README.split())


def test_the_sample_of_output_is_the_measured_run_of_seed_0():
    from ijepa_fast.eval.figures import Figure, cells, verdict

    record = json.loads((ROOT / "bench" / "results" / "gains-quickstart.json").read_text())["records"][0]
    found = [Figure.from_json(figure) for figure in record["figures"]]
    assert record["seed"] == 0
    assert verdict(found) in README
    rows = {" ".join(line.split()) for line in README.splitlines()}
    shown = [row for row in cells(found)[1] if row[1] == "linear" and row[0] in ("count", "distance")]
    assert len(shown) == 2
    assert {" ".join(row) for row in shown} <= rows
    assert f"/{record['steps']} epoch=" in README


def test_what_it_says_of_mae_is_measured():
    from bench.compare.runs import AVERAGE, STUDENT
    from bench.compare.tables import by_run, figure_of

    def percent(run, file="learning-fair", seeds=3, steps=6000):
        runs = by_run(json.loads((ROOT / "bench" / "results" / f"{file}.json").read_text())["records"])
        ends = [record["points"][-1] for record in runs[run]]
        assert {end["step"] for end in ends} == {steps}
        values = [figure_of(end, "class", "linear").value for end in ends]
        assert len(values) == seeds
        return f"{100 * sum(values) / seeds:.1f} %"

    told = " ".join(README.split())
    published = percent("ijepa", "learning-cifar10-cpu", seeds=2)
    assert f"I-JEPA as published ends at {published} on CIFAR-10, MAE at {percent('mae')}." in told
    assert f"I-JEPA reaches {percent(AVERAGE)} (target of all blocks, slower average); " in told
    longer = percent("mae", "compared-mae12000", steps=12_000)
    assert f"as a frozen teacher {percent(STUDENT)}; MAE trained for as many steps as both {longer}." in told
    assert "6,000 steps on a CPU; two seeds of the first figure, three of the others" in told


def test_every_ready_configuration_is_named():
    assert [name for name in configs.names() if f"`{name}`" not in README] == []
