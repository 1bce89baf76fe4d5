"""Run Python as on a machine where only torch, Triton, numpy and pytest are installed, this project not.

    python tests/bare.py bench/run.py --help
    python tests/bare.py -m pytest -m gpu --collect-only

Every other distribution is hidden from the import system: to import it fails as if it were missing, and find_spec gives
None, and importlib.metadata does not list it. The finders of editable installations are removed.
"""

from __future__ import annotations

import re
import runpy
import sys
from importlib.machinery import BuiltinImporter, FrozenImporter, PathFinder
from importlib.metadata import distribution, distributions, packages_distributions
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
INSTALLED = ("torch", "triton", "numpy", "pytest", "setuptools")


def closure(names) -> set[str]:
    """The distributions `names` and all they require, by their normalised names."""
    have = {normal(d.metadata["Name"]) for d in distributions()}
    found, left = set(), [normal(name) for name in names]
    while left:
        name = left.pop()
        if name in found or name not in have:
            continue
        found.add(name)
        for requirement in distribution(name).requires or ():
            if "extra ==" not in requirement:
                left.append(normal(re.match(r"[\w.-]+", requirement).group()))
    return found


def normal(name: str) -> str:
    """A distribution's name as package indices compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


class Bare(PathFinder):
    """Finds what the kept distributions bring, the standard library and the checkout."""

    kept: frozenset[str] = frozenset()
    hidden: frozenset[str] = frozenset()

    @classmethod
    def find_spec(cls, fullname, path=None, target=None):
        """As PathFinder's, but None for hidden packages."""
        if fullname.partition(".")[0] in cls.hidden:
            return None
        return PathFinder.find_spec(fullname, path, target)

    @classmethod
    def find_distributions(cls, *args, **kwargs):
        """As PathFinder's, without hidden distributions."""
        return (d for d in PathFinder.find_distributions(*args, **kwargs) if normal(d.metadata["Name"]) in cls.kept)


def main() -> None:
    """Hide, then run the script or module named on the command line."""
    arguments = sys.argv[1:]
    sys.path[0] = str(ROOT)
    Bare.kept = frozenset(closure(INSTALLED))
    owners = {top: {normal(name) for name in names} for top, names in packages_distributions().items()}
    Bare.hidden = frozenset(top for top, names in owners.items() if not names & Bare.kept) - {"ijepa_fast"}
    sys.meta_path[:] = [BuiltinImporter, FrozenImporter, Bare]
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path[0] = str(Path(arguments[0]).resolve().parent)
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    main()
