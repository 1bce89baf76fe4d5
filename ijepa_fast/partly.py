"""Part of a module, run without the rest: what a method says of its options needs nothing of what it trains with.

So a mistake in them is said before torch is imported, and the method's file stays the one place where they are.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

# What may be imported for it: none of these imports torch or NumPy.
LIGHT = {
    *("collections.abc", "dataclasses", "functools", "math", "typing"),
    *("ijepa_fast.agree", "ijepa_fast.config", "ijepa_fast.data", "ijepa_fast.masks.samplers"),
}


class HeavyError(Exception):
    """A name that needs more than LIGHT."""


def read(path: Path, base: str, members: Collection[str]) -> dict[str, Any]:
    """What the subclass of `base` in the module at `path` gives to the names `members`, those that it defines.

    A base whose name ends in `base`, TokenMethod say, is one too. Class methods become functions with the class, which
    is None, as their first argument. Raises HeavyError where one of them needs what is not LIGHT.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    statements = {name: statement for statement in tree.body for name in _defines(statement)}
    owners = [x for x in tree.body if isinstance(x, ast.ClassDef) and any(_ends(y, base) for y in x.bases)]
    inside = [statement for owner in owners for statement in owner.body]
    found = {name: statement for statement in inside for name in _defines(statement) if name in members}
    for name, statement in found.items():
        if isinstance(statement, ast.FunctionDef):
            statement.decorator_list = []
            statements[name] = statement
        elif not (isinstance(statement, ast.Assign) and _names(statement.value, name)):  # as in `Options = Options`
            statements[name] = statement
    needed: list[ast.stmt] = []
    for name in found:
        _collect(name, statements, needed, set())
    future = ast.ImportFrom("__future__", [ast.alias("annotations")], 0)
    module = ModuleType(f"{path.stem} (in part)")
    sys.modules[module.__name__] = module  # where the types of a dataclass are looked up
    body = ast.fix_missing_locations(ast.Module([future, *needed], []))
    exec(compile(body, str(path), "exec"), module.__dict__)
    return {name: module.__dict__[name] for name in found}


def _names(value: ast.expr, name: str) -> bool:
    """Whether it is that name."""
    return isinstance(value, ast.Name) and value.id == name


def _ends(value: ast.expr, end: str) -> bool:
    """Whether it is a name that ends so, or something of it in brackets."""
    value = value.value if isinstance(value, ast.Subscript) else value
    return isinstance(value, ast.Name) and value.id.endswith(end)


def _defines(statement: ast.stmt) -> Iterator[str]:
    if isinstance(statement, ast.ClassDef | ast.FunctionDef):
        yield statement.name
    elif isinstance(statement, ast.Import | ast.ImportFrom):
        yield from (alias.asname or alias.name for alias in statement.names)
    elif isinstance(statement, ast.Assign):
        for target in statement.targets:
            yield from (node.id for node in ast.walk(target) if isinstance(node, ast.Name))
    elif isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
        yield statement.target.id


def _collect(name: str, statements: dict[str, ast.stmt], needed: list[ast.stmt], seen: set[str]) -> None:
    """Append the statement that defines `name` to `needed`, behind those it needs itself."""
    statement = statements.get(name)
    if statement is None or statement in needed or name in seen:
        return
    seen.add(name)
    if isinstance(statement, ast.Import | ast.ImportFrom):
        module = statement.module if isinstance(statement, ast.ImportFrom) else name
        if module not in LIGHT:
            raise HeavyError(name)
    for other in _reads(statement):
        _collect(other, statements, needed, seen)
    needed.append(statement)


def _reads(statement: ast.AST) -> Iterator[str]:
    """The names that a statement reads, but for those in the annotations of functions, which nobody evaluates."""
    if isinstance(statement, ast.FunctionDef):
        defaults = [*statement.args.defaults, *filter(None, statement.args.kw_defaults)]
        parts: list[ast.AST] = [*statement.body, *defaults, *statement.decorator_list]
    else:
        parts = [*ast.iter_child_nodes(statement)]
    for part in parts:
        if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Load):
            yield part.id
        yield from _reads(part)
