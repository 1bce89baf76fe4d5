"""The checklist "Add an op" of CONTRIBUTING.md: each op has its files, tests, row, benchmark and settings."""

import importlib
import re

import pytest
import torch

from bench import registry
from ijepa_fast.kernels.common import dispatch
from tests.launch import ROOT

KERNELS = ROOT / "kernels"
OPS = sorted(path.parent.name for path in KERNELS.glob("*/ops.py"))
CATALOGUE = (KERNELS / "README.md").read_text()
EACH = pytest.mark.parametrize("op", OPS)


def test_a_folder_is_an_op_and_no_package_above():
    folders = {path.name for path in KERNELS.iterdir() if path.is_dir() and not path.name.startswith("__")}
    assert folders == {*OPS, "common"}
    assert not (KERNELS / "__init__.py").exists()


@EACH
def test_files(op):
    for name in ("__init__.py", "reference.py", "ops.py", "README.md"):
        assert (KERNELS / op / name).is_file(), name
    assert (ROOT / "tests" / "ops" / f"test_{op}.py").is_file()


@EACH
def test_what_the_tests_hold(op):
    """Values against the reference, and bad input named."""
    tests = (ROOT / "tests" / "ops" / f"test_{op}.py").read_text()
    for words in ("reference", "pytest.raises(ValueError"):
        assert words in tests, words


def test_every_registered_op_is_opchecked():
    for op in OPS:
        importlib.import_module(f"ijepa_fast.kernels.{op}")
    schemas = [s.name.partition("::")[2] for s in torch._C._jit_get_all_schemas() if s.name.startswith("ijepa_fast::")]
    tests = "\n".join(path.read_text() for path in (ROOT / "tests" / "ops").glob("test_*.py"))
    assert len(schemas) >= len(OPS)
    assert [name for name in schemas if not re.search(rf"opcheck\(\s*[\w.]+\.{name}\b", tests)] == []


@EACH
def test_row_in_the_catalogue(op):
    row = next((line for line in CATALOGUE.splitlines() if f"]({op}/README.md)" in line), None)
    assert row, "kernels/README.md has no row"
    assert f"](../tests/ops/test_{op}.py)" in row
    assert f"`--op {op}`" in row


@EACH
def test_settings_and_benchmark(op):
    assert op in dispatch.OPS
    assert (op in dispatch.TRITON) == (KERNELS / op / "kernel.py").is_file()
    assert op in registry.OPS


def test_nothing_else_can_be_set_or_timed():
    assert set(dispatch.OPS) == set(registry.OPS) == set(OPS)


@EACH
def test_reference_needs_no_triton(op):
    assert not re.search(r"^\s*(import|from) triton", (KERNELS / op / "reference.py").read_text(), re.MULTILINE)


@pytest.mark.parametrize(
    "readme",
    [KERNELS / "README.md", *(KERNELS / op / "README.md" for op in OPS)],
    ids=lambda path: path.parent.name,
)
def test_links_lead_somewhere(readme):
    for link in re.findall(r"\]\(([^)#:]+)\)", readme.read_text()):
        assert (readme.parent / link).exists(), link
