"""Every command of the documents is taken by its program, every block of code is one that is run; links lead on."""

import ast
import re
import sys
import types

import pytest
import torch

pytest.importorskip("deepspeed")
pytest.importorskip("nvidia.dali")


from ijepa_fast.config import Config, keys, load_config
from tests import documented
from tests.documented import PAGES, Trial, code, inline, lines, links, name
from tests.launch import ROOT

# What indented blocks show that is no command: the beginning of the line, and what it is.
SHOWN = {
    "max |y - x|": "a formula",
    "step=20/372": "a line of the log",
    "cat hosts": "a file",
    "node-": "a file",
    "docs/design.md": "a drawing",
}
# Commands that no program of this project takes: the beginning, and what tries it instead.
ELSEWHERE = {
    "pip install .": ".ci/package",
    "pip install torch": "Makefile",
    "pip install --no-index": ".ci/package",
    "pip download": "nothing: it wants a network",
    "pip wheel": ".ci/package",
    "python3 -m venv": "Makefile",
    "docker": "nothing: there was no daemon",
    ".venv/bin/pre-commit": "tests/test_contributing.py",
    "python my_probe.py": "the examples below",
}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_command_of_a_page_is_taken(page, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    trial = Trial(monkeypatch)
    for command in [*lines(page), *(inline(page) if page.name != "LOG.md" else [])]:
        if any(command.startswith(start) or start == name(page) for start in SHOWN):
            continue
        how = trial(command)
        assert how != "elsewhere" or any(command.startswith(start) for start in ELSEWHERE), command
        capsys.readouterr()


def test_what_is_not_taken_is_found(monkeypatch, capsys):
    trial = Trial(monkeypatch)
    for wrong in (
        "ijepa-fast train --config quickstart optim.lrr=1",
        "ijepa-fast probe --checkpoint runs/photos --probs linear,knn",
        "ijepa-fast plann --config quickstart",
        "python bench/throughput.py --impl fast --modell vit_small",
        "python bench/nowhere.py",
        "torchrun --nnode=2 --rank=3 ijepa_fast/train.py --config quickstart",
        "make nothing",
        "pip install ijepa_fast[nothing]",
    ):
        with pytest.raises((AssertionError, SystemExit, OSError)):
            trial(wrong)


def test_what_runs_elsewhere_is_used_and_is_there():
    every = [command for page in PAGES for command in lines(page)]
    for start, where in ELSEWHERE.items():
        assert any(command.startswith(start) for command in every), start
        if (ROOT / where).is_file():
            assert start.split()[0].rpartition("/")[2] in (ROOT / where).read_text(), (start, where)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_link_leads_somewhere(page):
    for file, anchor in links(page):
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), file
        if anchor and target.suffix == ".md":
            assert anchor in documented.anchors(target), f"{file}#{anchor}"


def test_every_key_that_a_page_names_is_one():
    known = {key for key, _ in keys(Config)}
    sections = {key.rpartition(".")[0] for key in known} - {""}
    pattern = re.compile(rf"`((?:{'|'.join(sections)})\.[a-z_]+(?:\.[a-z_]+)*)[`=:]")
    found = {key for page in PAGES if page.name != "LOG.md" for key in pattern.findall(page.read_text())}
    assert len(found) > 50
    file = re.compile(r"\.(jsonl?|py|md|safetensors)$")
    own = re.compile(r"objective\.options\.\w+")
    assert (
        sorted(key for key in found - known if key not in sections and not own.fullmatch(key) and not file.search(key))
        == []
    )


def test_yaml_that_a_page_shows_is_a_configuration(tmp_path):
    found = [block for page in PAGES for block in code(page) if block.language == "yaml"]
    assert found
    for block in found:
        (tmp_path / "shown.yaml").write_text(block.text)
        assert load_config(tmp_path / "shown.yaml").name


def test_every_block_of_python_is_run_below():
    """Pages with Python are those whose blocks are run: below, in tests/test_docs_runs.py and tests/test_readme.py."""
    pages = {name(page) for page in PAGES for block in code(page) if block.language == "python"}
    assert pages == {"README.md", "docs/extend.md", "docs/weights.md", "docs/logging.md"}
    for page in PAGES:
        for block in code(page):
            assert block.language in ("python", "yaml") or page.name in ("README.md", "design.md"), name(page)
            if block.language == "python":
                ast.parse(block.text)


def test_the_log_is_newest_first_and_asks_and_answers():
    heads = re.findall(r"^## (.*)$", (ROOT / "docs" / "LOG.md").read_text(), re.MULTILINE)
    dates = [head[:10] for head in heads]
    assert dates == sorted(dates, reverse=True)
    assert [head for head in heads if not re.fullmatch(r"\d{4}-\d\d-\d\d: .+\? .+", head)] == []


def test_the_loggers_of_others_are_called_as_they_are(tmp_path, monkeypatch):
    """MLflow and Trackio by stand-ins that keep what they were called with; the hook on a record."""
    calls = []

    def stand_in(module, *functions):
        def call(function):
            return lambda *a, **k: calls.append((f"{module}.{function}", a, k)) or types.SimpleNamespace(finish=list)

        given = {function: call(function) for function in functions}
        monkeypatch.setitem(sys.modules, module, types.SimpleNamespace(**given))

    stand_in("mlflow", "start_run", "log_params", "log_metrics", "end_run")
    stand_in("trackio", "init", "log", "finish")
    there: dict = {}
    for block in code(ROOT / "docs" / "logging.md"):
        exec(block.text, there)
    for kind in ("MLflow", "Trackio"):
        logger = there[kind](tmp_path, "a run", {"optim.lr": 1})
        logger.write(3, {"train/loss": 0.5})
        logger.close()
    assert ("mlflow.log_metrics", ({"train.loss": 0.5},), {"step": 3}) in calls
    assert ("trackio.log", ({"train/loss": 0.5},), {"step": 3}) in calls
    encoder = types.SimpleNamespace(norm=types.SimpleNamespace(weight=torch.ones(3)))
    there["look"](1, {"loss": 0.001}, types.SimpleNamespace(encoder=encoder))
