"""The lists in CONTRIBUTING.md hold for every op, method and probe there is; versions and words stand once."""

import re
import tomllib

import pytest

pytest.importorskip("omegaconf")
pytest.importorskip("nvidia.dali")
pytest.importorskip("yaml")

import yaml

import ijepa_fast
from ijepa_fast import configs
from ijepa_fast.config import load_config
from ijepa_fast.probe import PROBES
from tests.launch import ROOT

TEXT = (ROOT / "CONTRIBUTING.md").read_text()
OPS = sorted(path.parent.name for path in ROOT.glob("kernels/*/ops.py"))
METHODS = sorted(p.stem for p in ROOT.glob("ijepa_fast/methods/*.py") if p.stem not in ("__init__", "method"))


def missing(kind, name):
    """The files with `<kind>` in their names that its list has and the project lacks for `name`."""
    items = re.search(rf"^## Add an? {kind}\n(.*?)(?=^## |\Z)", TEXT, re.MULTILINE | re.DOTALL)[1]
    files = [file.replace(f"<{kind}>", name) for file in re.findall(rf"`([^`]*<{kind}>[^`]*)`", items)]
    assert files
    return [file for file in files if not (ROOT / file).is_file()]


def test_no_file_of_code_has_more_than_500_lines():
    folders = ("ijepa_fast", "kernels", "csrc", "bench", "tests")
    kinds = ("*.py", "*.cpp", "*.h", "*.cu")
    files = [path for folder in folders for kind in kinds for path in (ROOT / folder).rglob(kind)]
    assert files
    assert [path.name for path in files if len(path.read_text().splitlines()) > 500] == []


def test_a_file_that_is_not_there_is_found():
    assert missing("method", "nowhere") == ["ijepa_fast/methods/nowhere.py", "tests/data/nowhere_step.npz"]
    assert len(missing("op", "nowhere")) == 5


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_what_the_list_says(op):
    """Rows and the dispatch: tests/ops/test_catalogue.py. Cases of the benchmarks: tests/test_bench.py."""
    assert missing("op", op) == []


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_what_the_list_says(method):
    assert missing("method", method) == []
    golden = [text for path in ROOT.glob("tests/test_*.py") if "_step.npz" in (text := path.read_text())]
    assert [text for text in golden if f"{method}_step" in text or f'"{method}"' in text]
    trains = [name for name in configs.names() if load_config(name).objective.method.split(".")[-1] == method]
    assert trains
    readme = (ROOT / "README.md").read_text()
    assert [name for name in trains if f"`{name}`" not in readme] == []


def test_the_registry_has_every_method():
    registry = pytest.importorskip("ijepa_fast.methods.method")
    assert sorted(registry.METHODS) == METHODS


@pytest.mark.parametrize("probe", PROBES)
def test_every_probe_has_what_the_list_says(probe):
    assert f"| `{probe}` |" in (ROOT / "docs" / "evaluation.md").read_text()
    assert re.search(rf"\b{probe}\b", (ROOT / "tests" / "test_probe.py").read_text())


@pytest.mark.parametrize("path", ["CONTRIBUTING.md", "CHANGELOG.md", "README.md", "docs/design.md", "docs/glossary.md"])
def test_links_lead_somewhere(path):
    page = ROOT / path
    links = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_version_stands_in_the_change_log_and_the_citation():
    assert f"## {ijepa_fast.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == ijepa_fast.__version__


def test_commits_are_checked_by_the_same_ruff():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["dev"]
    (ruff,) = (requirement for requirement in extras if requirement.startswith("ruff"))
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    pins = [hook["additional_dependencies"] for hook in hooks if hook["id"].startswith("ruff")]
    assert pins == [[ruff]] * 2


def test_the_glossary_is_in_order():
    words = re.findall(r"^\*\*(.+?)\*\*", (ROOT / "docs" / "glossary.md").read_text(), re.MULTILINE)
    assert len(words) >= 25
    assert words == sorted(set(words), key=str.lower)
