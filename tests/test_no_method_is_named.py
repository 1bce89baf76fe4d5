"""Outside of methods/, configs/ and kernels/, the package asks the contract and names no method in its code."""

import ast

import pytest

from ijepa_fast.methods.method import METHODS
from tests.launch import ROOT

PACKAGE = ROOT / "ijepa_fast"
FREE = ("methods", "configs", "kernels")
# Names that are not the method: the default of a key; files of earlier versions; the published I-JEPA layout; the names
# that Hugging Face has for architectures.
EXCEPTIONS = {
    "config.py": {"ijepa"},
    "given.py": {"ijepa", "mae", "ibot"},
    "interop/weights.py": {"ijepa", "mae", "ibot"},
    "interop/reference.py": {"ijepa"},
    "interop/huggingface.py": {"ijepa"},
    "interop/beit.py": {"beit"},
}


def named(source: str) -> set[str]:
    """Methods that a module imports, or has as a whole string or an attribute."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ijepa_fast.methods"):
            found |= {node.module.rpartition(".")[2], *(alias.name for alias in node.names)} & set(METHODS)
        elif isinstance(node, ast.Import):
            found |= {part for alias in node.names for part in alias.name.split(".")[2:]} & set(METHODS)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found |= {node.value} & set(METHODS)
    return found


@pytest.mark.parametrize(
    "source",
    ["from ijepa_fast.methods import mae", "from ijepa_fast.methods.ibot import IBOT", "if method == 'ijepa': pass"],
)
def test_a_name_is_found(source):
    assert named(source)


def test_no_file_names_a_method():
    files = [path for path in PACKAGE.rglob("*.py") if path.relative_to(PACKAGE).parts[0] not in FREE]
    assert len(files) > 50
    found = {str(path.relative_to(PACKAGE)): named(path.read_text()) for path in files}
    assert {name: methods for name, methods in found.items() if methods - EXCEPTIONS.get(name, set())} == {}


def test_every_method_is_short():
    assert [name for name in METHODS if len((PACKAGE / "methods" / f"{name}.py").read_text().splitlines()) >= 350] == []
