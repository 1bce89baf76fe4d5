"""Parts of the pages that are written from the code: every key, every error's text, the Python interface, the recipes.

Nothing here imports torch: files are read for their syntax, and configurations by what says them.
"""

from __future__ import annotations

import ast
import re
from dataclasses import Field
from pathlib import Path
from typing import Any

from ijepa_fast import configs, partly
from ijepa_fast.__main__ import COMMANDS
from ijepa_fast.config import Config, keys
from ijepa_fast.given import MISSING
from ijepa_fast.spelling import in_words

ROOT = Path(__file__).resolve().parents[2]
TITLES = {"": "The run"}


def configuration() -> str:
    """Every key of every section, then every method's own options, as tables."""
    sections: dict[str, list[str]] = {}
    for name, f in keys(Config):
        sections.setdefault(name.rpartition(".")[0], []).append(_row(name, f))
    parts = [f"## {TITLES.get(section, f'`{section}`')}\n\n{_table(rows)}" for section, rows in sections.items()]
    parts.append("## Options of the methods\n\nThey are set as `objective.options.<name>`, and fixed on resume.")
    for method in methods():
        said = partly.read(ROOT / f"ijepa_fast/methods/{method}.py", "Method", ("Options",))
        rows = [_row(name, f) for name, f in keys(said["Options"])] if "Options" in said else []
        parts.append(f"### {method}\n\n" + (_table(rows) if rows else "It has none."))
    return "\n\n".join(parts)


def methods() -> list[str]:
    """The names of the registered methods."""
    return [path.stem for path in sorted(ROOT.glob("ijepa_fast/methods/[!_]*.py")) if path.stem != "method"]


def _table(rows: list[str]) -> str:
    return "\n".join(["| key | default | what it may be | meaning |", "|---|---|---|---|", *rows])


def _row(name: str, f: Field) -> str:
    limits = f.metadata
    default = f.default_factory() if callable(f.default_factory) else f.default
    shown = "required" if default == MISSING else f"`{_yaml(default)}`"
    if limits["choices"]:
        may = ", ".join(f"`{_yaml(choice)}`" for choice in limits["choices"])
    else:
        may = "see its meaning" if f.type == "Any" else in_words(str(f.type))
        words = (("least", "at least"), ("above", "more than"), ("most", "at most"))
        may += "".join(f", {said} {limits[limit]:.10g}" for limit, said in words if limits[limit] is not None)
    fixed = " *Fixed when a run is resumed.*" if limits["fixed"] else ""
    return f"| `{name}` | {shown} | {_cell(may)} | {_cell(limits['meaning'])}.{fixed} |"


def _yaml(value: Any) -> str:
    if isinstance(value, float) and value != int(value) and abs(value) >= 1e-3:
        return f"{value:.6g}"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value) or '""'


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def recipes() -> str:
    """The ready configurations with the first line of each."""
    lines = ["| configuration | what |", "|---|---|"]
    for name in configs.names():
        first = configs.find(name).read_text().splitlines()[0].removeprefix("# ").rstrip(":.")
        lines.append(f"| `{name}` | {_cell(first)} |")
    return "\n".join(lines)


def commands() -> str:
    """The commands, as `ijepa-fast` lists them."""
    lines = ["| command | what it does |", "|---|---|"]
    return "\n".join([*lines, *(f"| `ijepa-fast {name}` | {text} |" for name, (_, text) in COMMANDS.items())])


# What can be said of every message that arises in a room: (title, what to do).
CURES = {
    "given": (
        "A configuration",
        "Change the key that the message names. `--print-config` prints every key with its value and meaning; "
        "[configuration](configuration.md) has what each may be.",
    ),
    "data": (
        "Images and labels",
        "`ijepa-fast check-data PATH` names every file that cannot be used; [your images](your-images.md) says what is "
        "read.",
    ),
    "run": (
        "A run and its folder",
        "A run goes on by the same command. What is promised of checkpoints, ranks and disks is in "
        "[reliability](reliability.md), what is looked at on several machines in [several "
        "machines](several-machines.md).",
    ),
    "methods": (
        "A method and its masks",
        "The message names the option, `objective.options.<name>` or a key of `mask`; "
        "[configuration](configuration.md) lists each method's.",
    ),
    "interop": (
        "Weights, in and out",
        "[Continue from weights](continue.md) and [the weights](weights.md) say what is read and written.",
    ),
    "eval": ("Probes", "[Evaluation](evaluation.md) says which labels and options each probe takes."),
    "kernels": (
        "Kernels",
        "Who calls an op directly meets them, or asks for an implementation that is not there: set `kernels=auto`.",
    ),
    "commands": ("Commands", "`ijepa-fast COMMAND --help` lists the options."),
}
ROOMS = {"engine": "run", "report": "eval", "masks": "methods", "models": "methods", "config": "given"}
ROOMS |= dict.fromkeys(("agree", "spelling", "partly", "front", "configs"), "given")
# What makes an error's text beside exceptions; files in which texts are returned, or kept, for another to raise.
MADE = ("error", "_wrong")
KEPT = {"run/machines.py", "run/lock.py", "run/together.py", "methods/ijepa.py", "data/index.py", "data/tables.py"}
KEPT |= {"data/archives.py", "data/scan.py", "data/headers.py", "data/kinds.py", "front.py"}
INTERNAL = {"NotImplementedError", "AttributeError", "IndexError", "KeyError", "StopIteration", "TypeError"}
INTERNAL |= {"HeavyError"}


def messages() -> list[tuple[str, str, str]]:
    """(group, file, text) of every message that an error of the package is made with; `…` stands for what varies."""
    paths = sorted([*ROOT.glob("ijepa_fast/**/*.py"), *ROOT.glob("kernels/**/*.py")])
    trees = {path: ast.parse(path.read_text()) for path in paths}
    classes = [node for tree in trees.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    errors = {"Exception"}  # by name: exceptions of this package, those of theirs, and so on
    while more := {node.name for node in classes if any(_error(base, errors) for base in node.bases)} - errors:
        errors |= more
    found = []
    for path, tree in trees.items():
        parts = path.relative_to(ROOT).parts
        room = "kernels" if parts[0] == "kernels" else parts[1].removesuffix(".py")
        room = room if room in CURES else ROOMS.get(room, "commands")
        kept = "/".join(parts[1:]) in KEPT
        for node in ast.walk(tree):
            if text := _message(node, errors, kept):
                found.append((room, path.stem, text))
    return found


def _error(node: ast.expr, errors: set[str]) -> bool:
    """Whether a name is that of an exception."""
    name = _called(node)
    return (name.endswith("Error") or name in errors) and name not in INTERNAL


def _message(node: ast.AST, errors: set[str], kept: bool) -> str:
    """The text that a node makes an error with, "" for none. kept: texts that are returned or assigned are such too."""
    parts: list[ast.expr] = []
    if isinstance(node, ast.Call) and (_error(node.func, errors) or _called(node.func) in (*MADE, "__init__")):
        parts = node.args[:2]
    elif kept and isinstance(node, ast.Return | ast.Assign) and node.value is not None:
        parts = [node.value]
    texts = [_text(part) for part in parts]
    least = 5 if kept and not isinstance(node, ast.Call) else 3
    return next((text for text in texts if len(re.findall(r"[a-z]{2,}", text)) >= least and "%(" not in text), "")


def _called(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def _text(node: ast.expr) -> str:
    """A string as it is written, with … for what is filled in; "" for what is no string."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
    if isinstance(node, ast.BinOp):
        return _text(node.left) + (_text(node.right) or "…")
    if isinstance(node, ast.IfExp):
        return _text(node.body)
    return ""


def errors() -> str:
    """Every message, grouped by where it arises, with what to do about the group."""
    groups: dict[str, dict[str, str]] = {}
    for group, where, text in messages():
        groups.setdefault(group, {}).setdefault(re.sub(r"…( ?…)+", "…", text).strip(), where)
    parts = []
    for group, (title, cure) in CURES.items():
        texts = sorted(groups.get(group, {}).items(), key=_letters)
        parts.append("\n".join([f"### {title}\n\n{cure}\n", *(f"- {_code(text)} *{at}*" for text, at in texts)]))
    return "\n\n".join(parts)


def _letters(item: tuple[str, str]) -> str:
    return re.sub(r"[^a-z]", "", item[0].lower())


def _code(text: str) -> str:
    text = " ".join(text.split())
    return f"`` {text} ``" if "`" in text else f"`{text}`"


# The Python interface: file and, in its order, what of it.
INTERFACE = (
    ("ijepa_fast/api.py", ("train", "Run", "embed")),
    ("ijepa_fast/interop/load.py", ("load", "PretrainedEncoder")),
    ("ijepa_fast/config.py", ("load_config", "as_yaml")),
    ("ijepa_fast/given.py", ("key", "fixed", "ConfigError")),
    ("ijepa_fast/methods/method.py", ("Method",)),
    ("ijepa_fast/data/crops.py", ("View",)),
    ("ijepa_fast/agree.py", ("Setup",)),
    ("ijepa_fast/masks/draw.py", ("Draw",)),
    ("ijepa_fast/masks/foreign.py", ("",)),
    ("ijepa_fast/models/vit.py", ("Encoder",)),
    ("ijepa_fast/models/flops.py", ("Work",)),
    ("ijepa_fast/eval/evaluate.py", ("evaluate",)),
    ("ijepa_fast/eval/options.py", ("Options",)),
    ("ijepa_fast/eval/labels.py", ("open_labelled",)),
    ("ijepa_fast/eval/figures.py", ("Figure",)),
)


def api() -> str:
    """The public functions and classes of INTERFACE, from their signatures and docstrings."""
    parts = []
    for file, names in INTERFACE:
        tree = ast.parse((ROOT / file).read_text())
        there = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        module = file.removesuffix(".py").replace("/", ".")
        for name in names:
            if not name:
                parts.append(f"## `{module}`\n\n{_prose(ast.get_docstring(tree) or '')}")
            elif name in there:
                short = "ijepa_fast" if f"{module}.{name}" in SHORT else module
                parts.append(f"## `{short}.{name}`\n\n{_described(there[name])}")
            else:
                raise ValueError(f"api.md: {file} has no {name}; change INTERFACE in docs/site/generated.py")
    return "\n\n".join(parts)


SHORT = ("ijepa_fast.api.train", "ijepa_fast.api.embed", "ijepa_fast.interop.load.load")


def _described(node: ast.FunctionDef | ast.ClassDef) -> str:
    text = _prose(ast.get_docstring(node) or "")
    if isinstance(node, ast.FunctionDef) and any(_called(mark) == "property" for mark in node.decorator_list):
        return f"```python\n{node.name}: {ast.unparse(node.returns) if node.returns else ''}\n```\n\n{text}"
    if isinstance(node, ast.FunctionDef):
        return f"```python\n{_signature(node)}\n```\n\n{text}"
    fields = [f"    {ast.unparse(part)}" for part in node.body if isinstance(part, ast.AnnAssign)]
    shown = "\n".join([f"class {node.name}{_bases(node)}:", *fields]) if fields else f"class {node.name}{_bases(node)}"
    public = [part for part in node.body if isinstance(part, ast.FunctionDef) and not part.name.startswith("_")]
    inner = [f"### `{node.name}.{part.name}`\n\n{_described(part)}" for part in public if ast.get_docstring(part)]
    return "\n\n".join([f"```python\n{shown}\n```", text, *inner])


def _bases(node: ast.ClassDef) -> str:
    return f"({', '.join(ast.unparse(base) for base in node.bases)})" if node.bases else ""


def _signature(node: ast.FunctionDef) -> str:
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    line = f"{node.name}({ast.unparse(node.args)}){returns}"
    if len(line) < 100:
        return line
    arguments = re.sub(r", (?=\*{0,2}\w+(:|=|,|$)|\*,)", ",\n    ", ast.unparse(node.args))
    return f"{node.name}(\n    {arguments},\n){returns}"


def _prose(text: str) -> str:
    """A docstring as Markdown: its sections as lists, its indented lines as code, its angle brackets as they are."""
    lines, out, listing = text.splitlines(), [], False
    for line in lines:
        head = re.fullmatch(r"(Args|Attributes|Returns|Raises):", line.strip())
        item = re.match(r" {4}([\w, *]+): (.*)", line)
        if head:
            listing = True
            out += ["", f"**{head[1]}**", ""]
        elif listing and line.startswith("    "):
            out.append(f"- `{item[1]}`: {item[2]}" if item else f"  {line.strip()}")
        else:
            listing = listing and not line.strip()
            out.append(line)
    return "\n".join(out).replace("<", "&lt;")
