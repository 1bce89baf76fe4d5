"""The kernels' folders are complete, and the catalogue knows them all."""

import re

import pytest

from ijepa_fast.kernels.common import dispatch
from tests.launch import ROOT

KERNELS = ROOT / "kernels"
FOLDERS = sorted(path.parent.name for path in KERNELS.glob("*/ops.py"))


def test_every_op_can_be_set():
    assert set(dispatch.OPS) == set(FOLDERS)
    assert set(dispatch.TRITON) == {path.parent.name for path in KERNELS.glob("*/kernel.py")}
    assert not (KERNELS / "__init__.py").exists()


@pytest.mark.parametrize("op", FOLDERS)
def test_folder_is_complete_and_in_the_catalogue(op):
    for name in ("__init__.py", "reference.py", "README.md"):
        assert (KERNELS / op / name).is_file(), name
    assert (ROOT / "tests" / "ops" / f"test_{op}.py").is_file()
    assert f"]({op}/README.md)" in (KERNELS / "README.md").read_text()


@pytest.mark.parametrize("op", FOLDERS)
def test_reference_needs_no_triton(op):
    assert not re.search(r"^\s*(import|from) triton", (KERNELS / op / "reference.py").read_text(), re.MULTILINE)


@pytest.mark.parametrize(
    "readme",
    [KERNELS / "README.md", *(KERNELS / op / "README.md" for op in FOLDERS)],
    ids=lambda path: path.parent.name,
)
def test_links_lead_somewhere(readme):
    for link in re.findall(r"\]\(([^)#:]+)\)", readme.read_text()):
        assert (readme.parent / link).exists(), link
