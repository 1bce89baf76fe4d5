"""The ready configurations, by name.

Their YAML files stand in the checkout's folder `configs/`; an installed package carries them in a folder of its own,
`ijepa_fast/configs/`, beside this file.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from pathlib import Path

_INSTALLED = Path(__file__).with_suffix("")
_CHECKOUT = Path(__file__).parents[1]
FOLDER = _CHECKOUT / "configs" if (_CHECKOUT / "setup.py").is_file() else _INSTALLED


def names() -> list[str]:
    """The names of the ready configurations, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def find(config: str | Path) -> Path:
    """The file of `config`: that file where there is one, else the ready one of this name, with or without `.yaml`.

    Raises ValueError, which lists the ready ones, where there is neither.
    """
    path = Path(config)
    if path.is_file():
        return path
    name = path.name.removesuffix(".yaml")
    if name in names() and path.parent == Path("."):
        return FOLDER / f"{name}.yaml"
    close, ready = difflib.get_close_matches(name, names(), n=1), ", ".join(names())
    hint = f"did you mean {close[0]}, of the ready ones {ready}?" if close else f"the ready ones are {ready}"
    raise ValueError(f"there is no file {config}; {hint}")


def main(argv: list[str] | None = None) -> int:
    """`ijepa-fast configs [NAME]`: what each ready configuration is for, or the YAML of one."""
    parser = argparse.ArgumentParser(prog="ijepa-fast configs", description="List the ready configurations.")
    parser.add_argument("name", nargs="?", help="print this one")
    args = parser.parse_args(argv)
    if args.name is None:
        width = max(map(len, names()))
        for name in names():
            first = (FOLDER / f"{name}.yaml").read_text().splitlines()[0]
            print(f"{name:<{width}}  {first.removeprefix('# ').rstrip(':.')}")
        return 0
    try:
        print(find(args.name).read_text(), end="")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
