"""What a person wrote, as YAML and as `key=value`, for a dataclass of settings, and what is wrong with it in words.

Nothing here knows a key by its meaning; ijepa_fast/config.py has them.
"""

from __future__ import annotations

import copy
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import Field, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from ijepa_fast import spelling

MISSING = "???"  # OmegaConf's mark of a key without a default; OmegaConf itself is imported where YAML is read


class ConfigError(ValueError):
    """A configuration that cannot run; the message names the key and what to change."""


def key(
    default: Any,
    meaning: str,
    *,
    choices: Sequence | None = None,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    length: int | None = None,
    path: bool = False,
    fixed: bool = False,
) -> Any:
    """A key: its default and meaning, the values it may have, and whether it is fixed when a run is resumed.

    least, above, most: bounds of a number, or of each number of a list; `above` itself is too low. length: of a list.
    path: whether it is a path, see `expanded`.
    """
    metadata: dict[str, Any] = {"meaning": meaning, "choices": choices, "fixed": fixed, "path": path}
    metadata |= {"least": least, "above": above, "most": most, "length": length}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: copy.copy(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def fixed(default: Any, meaning: str, **limits: Any) -> Any:
    """A key that is fixed: a run resumed with another value would not be the run that was begun."""
    return key(default, meaning, fixed=True, **limits)


SHARES: dict[str, Any] = {"above": 0, "most": 1, "length": 2}
RATIOS: dict[str, Any] = {"least": 1e-3, "most": 1e3, "length": 2}

# Keys and values of earlier versions.
RENAMED = {
    "optim.momentum": "optim.ema",
    "optim.final_momentum": "optim.final_ema",
    "optim.momentum_shape": "optim.ema_shape",
    "mask.ladder": "mask.padding",
    "objective.loss": "objective.options.loss",
    "objective.target": "objective.options.target",
}
SWITCH = {True: "on", False: "off"}  # what YAML reads on and off as, and once the values of engine.cuda_graphs
RENAMED_METHODS = {"bench.baselines.mae": "mae", "bench.baselines.ibot": "ibot"}
OWN_METHODS = "ijepa_fast.methods."
UNREAD = ("objective.loss", "objective.target")  # keys that these methods had and never read


def read(path: Path, overrides: Sequence[str], section: type) -> Any:
    """The YAML at `path` with `key.key=value` overrides, by today's names: keys of `section`. Raises ConfigError."""
    from omegaconf import OmegaConf

    for item in overrides:
        _check_override(item)
    parts = [_renamed(part) for part in (_read(path), OmegaConf.from_dotlist(list(overrides)))]
    for part in reversed(parts):
        check_keys(OmegaConf.to_container(part), section)
    return OmegaConf.merge(*parts)


def keys(section: Any, prefix: str = "") -> Iterator[tuple[str, Field]]:
    """The dotted name and the field of every key of a section, or of its class."""
    for f in fields(section):
        inner = f.default_factory if is_dataclass(f.default_factory) else None
        if inner is None:
            yield prefix + f.name, f
        else:
            yield from keys(inner, f"{prefix}{f.name}.")


def expanded(value: Any) -> Any:
    """The value of a key that is a path, with the home folder for `~`, which a shell leaves in key=~/folder."""
    return os.path.expanduser(value) if isinstance(value, str) else value


def _read(path: Path) -> Any:
    from omegaconf import DictConfig, OmegaConf
    from yaml import YAMLError

    try:
        loaded = OmegaConf.load(path)
    except (YAMLError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path} is not readable YAML: {_reason(error)}") from None
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"{path}: expected keys with values, as in configs/quickstart.yaml")
    return loaded


def _check_override(item: str) -> None:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    key, sign, value = item.partition("=")
    if not sign or not all(re.fullmatch(r"[A-Za-z_]\w*", part) for part in key.split(".")):
        raise ConfigError(f"override {item!r}: expected key=value, for example optim.lr=1e-3")
    try:
        OmegaConf.from_dotlist([item])
    except UnicodeEncodeError:  # bytes of the command line that Python could not decode
        raise ConfigError(
            f"override {item!r}: expected UTF-8; give a path whose name is, such as a link to it"
        ) from None
    except (YAMLError, OmegaConfBaseException):
        raise ConfigError(f"override {item!r}: {value!r} is no value; expected such as 3, 1e-3, [0.3, 1.0]") from None


def _reason(error: Exception) -> str:
    """What is wrong with a YAML file, and where, in few words."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    if mark is not None:
        return f"line {mark.line + 1}, column {mark.column + 1}: {problem}"
    return " ".join(str(error).split())


def wrong_type(name: str, plain: Any, section: type) -> ConfigError:
    """The error of a value that the type of the key `name` does not take."""
    name = re.sub(r"\[.*", "", name)
    f = dict(keys(section)).get(name)
    if f is None:
        return ConfigError(f"{name}: cannot be read")
    for part in name.split("."):
        plain = plain[part] if isinstance(plain, dict) and part in plain else MISSING
    if plain == MISSING:
        return ConfigError(f"{name}: expected {f.metadata['meaning']}, got nothing; set {name}=...")
    return _expected(name, f, plain)


def _holds(f: Field, value: Any) -> bool:
    """Whether a list, a mapping or neither is what the key takes; OmegaConf's own merge fails on others."""
    kinds = set(str(f.type).split(" | "))
    if isinstance(value, dict):
        return bool({"Any", "dict[str, Any]"} & kinds)
    lists = any(kind.startswith("list[") for kind in kinds)
    return "Any" in kinds or isinstance(value, list) is lists or (value is None and "None" in kinds)


def _expected(name: str, f: Field, value: Any) -> ConfigError:
    return ConfigError(f"{name}: expected {spelling.in_words(str(f.type))}, got {spelling.shown(value)}")


def _renamed(given: Any) -> Any:
    """A loaded YAML or the overrides by today's keys; says which ones have another name now."""
    from omegaconf import DictConfig, OmegaConf

    method = OmegaConf.select(given, "objective.method")
    if isinstance(method, str) and method.startswith(OWN_METHODS):
        given.objective.method = method = method.removeprefix(OWN_METHODS)
    if isinstance(method, str) and method in RENAMED_METHODS:
        given.objective.method = RENAMED_METHODS[method]
        for old in UNREAD:
            given.objective.pop(old.removeprefix("objective."), None)
        _say(f"config: objective.method={method} is called {RENAMED_METHODS[method]} now")
    graphs = OmegaConf.select(given, "engine.cuda_graphs")
    if isinstance(graphs, bool):
        given.engine.cuda_graphs = SWITCH[graphs]
    for old, new in RENAMED.items():
        section, _, name = old.rpartition(".")
        holder = OmegaConf.select(given, section)
        if isinstance(holder, DictConfig) and name in holder:
            OmegaConf.update(given, new, holder.pop(name), force_add=True)
            _say(f"config: {old} is called {new} now")
    return given


def _say(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr)


def check_keys(given: Any, section: type, prefix: str = "", top: type | None = None) -> None:
    """Raises ConfigError for a key that the dataclass `section` has not, with what was meant, which may be in `top`."""
    top = top or section
    known = {f.name: f for f in fields(section)}
    for key, value in given.items():
        name = f"{prefix}{key}"
        if key not in known:
            raise ConfigError(f"{name}: there is no such key; {_hint(name, section, prefix, top)}")
        factory = known[key].default_factory
        if isinstance(factory, type) and is_dataclass(factory):
            if not isinstance(value, dict):
                hint = f"; did you mean {spelling.SECTIONS[name]}={value}?" if name in spelling.SECTIONS else ""
                raise ConfigError(f"{name}: expected a section with keys, got {value!r}{hint}")
            check_keys(value, factory, f"{name}.", top)
        elif not _holds(known[key], value):
            raise _expected(name, known[key], value)


def _hint(name: str, section: type, prefix: str, top: type) -> str:
    everywhere = [] if top is section else [found for found, _ in keys(top)]
    if meant := spelling.meant(name, [*(found for found, _ in keys(section, prefix)), *everywhere]):
        return f"did you mean {meant}?"
    return f"the keys are {', '.join(f.name for f in fields(section))}"
