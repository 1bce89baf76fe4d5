"""Type hints hold, and every function has them but those whose reason is in pyproject.toml."""

import pytest

from tests.house import build, run
from tests.launch import ROOT

pytest.importorskip("mypy")
pytestmark = pytest.mark.slow


def mypy(house):
    cache = ROOT / ".mypy_cache" / "house"  # not that of the checkout, where the op folders are not found
    return run(house, "-m", "mypy", f"--config-file={ROOT / 'pyproject.toml'}", f"--cache-dir={cache}")


def test_every_hint_holds(tmp_path):
    status, output = mypy(build(tmp_path))
    assert status == 0, output


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("def f(x):\n    return x\n", "Function is missing a type annotation"),
        ("def f(x: int) -> str:\n    return x\n", "Incompatible return value type"),
        ("from ijepa_fast.files import publish\npublish(3)\n", 'Argument 1 to "publish" has incompatible type "int"'),
    ],
    ids=["no hints", "wrong hint", "wrong call"],
)
def test_a_new_module_is_checked(tmp_path, code, words):
    house = build(tmp_path)
    (house / "ijepa_fast" / "data" / "new.py").write_text(code)
    status, output = mypy(house)
    assert status == 1
    assert words in output
