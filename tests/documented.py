"""The commands and blocks of code that the documents show, and whether the programs take them."""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from ijepa_fast import front
from ijepa_fast.__main__ import COMMANDS
from ijepa_fast.config import load_config
from tests.launch import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
PAGES += [*sorted(ROOT.glob("docs/results/*.md")), ROOT / "kernels" / "README.md"]
FENCE = re.compile(r"^```(\w*)([^\n]*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
# Inside the text: what is written as a command with its options, but for those with letters in the place of a value.
INLINE = re.compile(r"`((?:python -m ijepa_fast|ijepa-fast|python bench/\w+\.py|make|deepspeed --\w+)[^`\n]*)`")


@dataclass(frozen=True)
class Code:
    """A fenced block: its language, the name of its file where it is one, and its text."""

    page: Path
    language: str
    title: str | None
    text: str


def name(page: Path) -> str:
    """A page's path in the repository."""
    return page.relative_to(ROOT).as_posix()


def code(page: Path) -> list[Code]:
    """The fenced blocks of a page."""
    found = []
    for language, rest, text in FENCE.findall(page.read_text()):
        title = re.search(r'title="([^"]+)"', rest)
        found.append(Code(page, language, title[1] if title else None, text))
    return found


def lines(page: Path) -> list[str]:
    """The lines of a page's indented blocks, without what stands behind " # ", continued ones as one."""
    found: list[str] = []
    going_on = False
    for line in FENCE.sub("", page.read_text()).splitlines():
        if going_on or re.match(r"    \S", line):
            text = re.sub(r"\s+# .*", "", line).strip().removeprefix("$ ")
            found[-1:] = [f"{found[-1][:-1].strip()} {text}"] if going_on else [*found[-1:], text]
            going_on = text.endswith("\\")
    return found


def inline(page: Path) -> list[str]:
    """The commands inside a page's text; what stands there of `train` without its configuration gets one."""
    every = INLINE.findall(FENCE.sub("", page.read_text()))
    every = [command for command in every if not re.search(r"[|…]|\.\.\.|\b[A-Z]{2,}", command)]
    needs = re.compile(r"(?:ijepa-fast|python -m ijepa_fast) (?:train|plan) (?!.*--config)")
    return [f"{command} --config quickstart" if needs.match(command) else command for command in every]


class Parsed(BaseException):
    """The command line was taken; nothing was started."""

    def __init__(self, found: argparse.Namespace):
        super().__init__()
        self.found = found


def _stop(self: argparse.ArgumentParser, args=None, namespace=None) -> argparse.Namespace:
    found, left = self.parse_known_intermixed_args(args, namespace)
    if left:
        self.error(f"unrecognized arguments: {' '.join(left)}")
    raise Parsed(found)


def parsed(main, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    """What a program's parser makes of its arguments, up to where the program would begin."""
    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", _stop)
        patch.setattr(argparse.ArgumentParser, "parse_intermixed_args", _stop)
        try:
            status = main(arguments)
        except Parsed as taken:
            return taken.found
        except SystemExit as ended:
            status = ended.code
    raise AssertionError(f"{arguments}: not taken, {status}")


@dataclass(frozen=True)
class Trial:
    """How a command is tried: with files of the repository in the place of those that a reader has."""

    monkeypatch: pytest.MonkeyPatch

    def __call__(self, command: str) -> str:
        """Try it; how, in a word: parsed, made, elsewhere. AssertionError where its program does not take it."""
        words = [word for word in shlex.split(command) if not re.fullmatch(r"[A-Z_]+=\S*", word)]
        if words[:3] == ["python", "-m", "ijepa_fast"]:
            words[:3] = ["ijepa-fast"]
        program, arguments = words[0], words[1:]
        if program in ("ijepa-fast", "python") and len(words) <= 2:  # a program by its name, without what it wants
            assert arguments == [] or arguments[0] in COMMANDS or (ROOT / arguments[0]).is_file(), command
            return "parsed"
        if program == "ijepa-fast":
            self.command(arguments[0], arguments[1:])
            return "parsed"
        if program in ("deepspeed", "torchrun"):
            self.launcher(program, arguments)
            return "parsed"
        if program == "python" and arguments[0].startswith(("bench/", "tests/")):
            self.script(arguments[0], arguments[1:])
            return "parsed"
        if extras := re.fullmatch(r"pip install (?:ijepa_fast|\.)\[([\w,]+)\]", command):
            there = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
            assert set(extras[1].split(",")) <= there.keys(), command
            return "parsed"
        if program == "make":
            assert re.search(rf"^{arguments[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), command
            return "made"
        return "elsewhere"

    def command(self, command: str, arguments: list[str]) -> None:
        assert command in COMMANDS, command
        arguments = [str(ROOT / word) if word.startswith(("configs/", "examples/")) else word for word in arguments]
        if command == "train" and "--plan" not in arguments:
            arguments = [re.sub(r"^(sentinel|my)\.yaml$", "quickstart", word) for word in arguments]
            assert front.main([*arguments, *["--print-config"] * ("--print-config" not in arguments)]) == 0, arguments
            return
        arguments = [word for word in arguments if word != "--plan"]
        module = "ijepa_fast.plan" if command == "train" else COMMANDS[command][0]
        found = parsed(importlib.import_module(module).main, arguments, self.monkeypatch)
        if "config" in found and "overrides" in found:
            load_config(found.config, found.overrides)

    def launcher(self, program: str, arguments: list[str]) -> None:
        place = arguments.index("ijepa_fast/train.py") if "ijepa_fast/train.py" in arguments else None
        if program == "torchrun":
            from torch.distributed.run import get_args_parser

            get_args_parser().parse_args(arguments)
        elif place != 0:
            runner = pytest.importorskip("deepspeed.launcher.runner")
            runner.parse_args(arguments if place is not None else [*arguments, "ijepa_fast/train.py"])
        if place is not None:
            self.command("train", arguments[place + 1 :])

    def script(self, script: str, arguments: list[str]) -> None:
        assert (ROOT / script).is_file(), script
        text = (ROOT / script).read_text()
        if "ArgumentParser" in text:
            module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
            parsed(module.main, arguments, self.monkeypatch)
        else:
            assert not arguments or "argv" in text, script


def links(page: Path) -> Iterator[tuple[str, str]]:
    """(file, anchor) of every link and picture of a page that leads into the repository."""
    for target in re.findall(r"\]\((?!\w+:)([^)\s]+)", FENCE.sub("", page.read_text())):
        file, _, anchor = target.partition("#")
        yield file, anchor


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and the site make them."""
    heads = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    words = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", head) for head in heads]
    return {re.sub(r"[^\w\- ]", "", head).strip().lower().replace(" ", "-") for head in words}
