"""The command `train`, until training begins: what is wrong is said before torch is imported.

ijepa-fast train --config quickstart                 one rank, started here
ijepa-fast train --config quickstart --ranks 2       two of this machine
ijepa-fast train --config quickstart --hostfile F    several machines, by DeepSpeed's launcher
deepspeed ijepa_fast/train.py --config quickstart    all GPUs, or several machines
"""

from __future__ import annotations

import argparse
import atexit
import importlib
import importlib.util
import os
import shlex
import sys
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NoReturn

from ijepa_fast import hosts, partly, ranks, spelling
from ijepa_fast.agree import NoOptions, Setup, check_capabilities, check_method
from ijepa_fast.config import Config, ConfigError, as_yaml, check_rates, keys, load_config
from ijepa_fast.data.importing import is_code

RANDOM_OR_EMBEDDED = ("synthetic", "scenes")


class Parser(argparse.ArgumentParser):
    """A parser of `--option` and key=value, which says how a key that was given as an option is written."""

    def parse(self, argv: list[str] | None = None) -> argparse.Namespace:
        """The arguments, with `overrides`. Exits with status 2 and one sentence for what it cannot read."""
        argv = sys.argv[1:] if argv is None else argv
        known = self._option_string_actions
        for place, word in enumerate(argv):
            name, _, value = word.partition("=")
            if word.startswith("-") and len(word) > 1 and name not in known and not _is_number(word):
                following = argv[place + 1] if place + 1 < len(argv) else ""
                self.error(_as_override(name, value or ("" if following.startswith("-") else following), known))
        return self.parse_intermixed_args(argv)

    def error(self, message: str) -> NoReturn:
        """One sentence and the usage."""
        usage = " ".join(self.format_usage().split())
        self.exit(2, f"error: {message}\n{usage}\n")


def parser(command: str, description: str) -> Parser:
    """What `train` and `plan` share."""
    usage = f"%(prog)s --config {'FILE' if command == 'train' else 'FILE [--images N]'} [key=value ...]"
    p = Parser(prog=f"ijepa-fast {command}", description=description, usage=usage, allow_abbrev=False)
    p.add_argument("--config", required=True, help="a YAML file, or the name of a ready one such as quickstart")
    p.add_argument("overrides", nargs="*", metavar="key=value", help="configuration keys to change")
    return p


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and train. Returns the exit status; what a user can mend ends in one sentence."""
    argv = sys.argv[1:] if argv is None else argv
    if "--plan" in argv:
        status: int = importlib.import_module("ijepa_fast.plan").main([word for word in argv if word != "--plan"])
        return status
    p = parser("train", "Train I-JEPA, or another method.")
    p.add_argument("--ranks", type=int, default=1, help="processes to start on this machine, one a GPU (default: 1)")
    p.add_argument("--hostfile", help="machines to start ranks on, one `name slots=8` a line; DeepSpeed starts them")
    p.add_argument("--print-config", action="store_true", help="print every key with its value; start nothing")
    p.add_argument("--plan", action="store_true", help="as the command plan: memory, work and hours; start nothing")
    p.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # set by DeepSpeed's launcher
    args = p.parse(argv)
    first = os.environ.get("RANK", "0") == "0"
    try:
        if args.ranks < 1:
            raise ConfigError(f"--ranks: expected at least 1, got {args.ranks}")
        if args.hostfile is not None and args.ranks > 1:
            raise ConfigError("--hostfile, --ranks: a hostfile says how many ranks a machine has; leave --ranks out")
        config = load_config(args.config, args.overrides)
        if args.print_config:
            print(as_yaml(config), end="")
            return 0
        if args.hostfile is not None and "RANK" not in os.environ:
            hosts.start(args.hostfile, without("--hostfile", argv))  # images are looked for where they are read
        check_early(config)
        if args.ranks > 1 and "RANK" not in os.environ:
            _check_ranks(config, args.ranks)
            return ranks.start(args.ranks, without("--ranks", argv))
    except (ConfigError, hosts.HostsError) as error:
        if os.environ.get("IJEPA_FAST_TRACEBACK") == "1":
            raise
        text = _give_up(str(error)) if _several_machines() else str(error) if first else ""
        if text:
            print(f"error: {text}", file=sys.stderr, flush=True)
        return 1
    return _train(config, first)


def _several_machines() -> bool:
    """Whether a launcher has started ranks on other machines too."""
    local = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE")  # the latter is DeepSpeed's
    return local is not None and int(os.environ.get("WORLD_SIZE", 1)) > int(local)


def _give_up(error: str) -> str:
    """Tell the ranks of other machines, which wait for this one, why it ends. Returns what this one is to say."""
    from ijepa_fast.run import machines

    return machines.give_up(error)


def _train(config: Config, first: bool) -> int:
    one_line_warnings(first)
    try:
        train = importlib.import_module("ijepa_fast.train")
    except ImportError as error:
        if error.name and error.name.partition(".")[0] == "ijepa_fast":
            raise
        print(f"error: {error}; pip install {error.name} in the environment of {sys.executable}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return _interrupted(first)
    import torch

    from ijepa_fast.engine import engine
    from ijepa_fast.run import lock, pulse, stacks
    from ijepa_fast.run.stop import Stopped, follow_launcher
    from ijepa_fast.run.together import sentence

    follow_launcher()
    stacks.follow()
    all_end = False
    try:
        train.train(config)
        all_end = True
        return 0
    except Stopped as stopped:
        all_end = True
        if first:
            print(stopped, file=sys.stderr, flush=True)
        return stopped.status
    except (ValueError, ImportError, OSError, RuntimeError) as error:
        text = sentence(error)
        alone = isinstance(error, ValueError) and not hasattr(error, "met_by_all")
        if alone and _several_machines() and not torch.distributed.is_initialized():
            told = _give_up(str(error))
            text = f"error: {told}" if told else ""
        if text is None or os.environ.get("IJEPA_FAST_TRACEBACK") == "1":
            raise
        if text:
            print(text, file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        return _interrupted(first)
    finally:
        pulse.end()
        lock.release()
        atexit.register(engine.leave, all_end)  # and not now: a program that calls this may train again


def _interrupted(first: bool) -> int:
    if first:
        print("interrupted while no step was under way; the same command continues", file=sys.stderr)
    return 130


def check_early(config: Config) -> None:
    """What can be known without torch: whether images and method are there, and its options. Raises ConfigError."""
    check_rates(config)
    source = config.data.source
    named = {"*", "{"} & set(source) or is_code(source)
    if source not in RANDOM_OR_EMBEDDED and not named and not os.path.exists(source):
        found = "is an address: fetch it first" if "://" in source else "does not exist"
        raise ConfigError(
            f"data.source: data path {source!r} {found}; expected a folder of images, archives, arrays or a list"
        )
    check_method_early(config)


def check_method_early(config: Config) -> None:
    """What can be known of the method without torch: whether it is there, and its options. Raises ConfigError."""
    method = config.objective.method
    names = [path.stem for path in Path(__file__).with_name("methods").glob("[!_]*.py") if path.stem != "method"]
    if method not in names and "." not in method and not _importable(method):
        close, there = spelling.close(method, names), ", ".join(sorted(names))
        hint = f"did you mean {close}, of {there}?" if close else f"there are {there}"
        raise ConfigError(f"objective.method: there is no method {method!r}, nor a module of that name; {hint}")
    if method in names:
        _check_method(config, Path(__file__).with_name("methods") / f"{method}.py")


def _check_method(config: Config, path: Path) -> None:
    """What the file at `path` says of its options, and of what other sections must be."""
    try:
        says = partly.read(path, "Method", ("Options", "check", "reads_mask", "capabilities"))
    except partly.HeavyError:  # said when the method is built
        return
    check_capabilities(config.objective.method, config.engine, says.get("capabilities", ()))
    check = partial(says["check"], None) if "check" in says else None
    images = config.batch_size // config.engine.accumulation
    setup = Setup(config.model, config.data, config.mask, config.objective.options, micro_batch=images)
    check_method(config.objective.method, setup, says.get("Options", NoOptions), says.get("reads_mask", False), check)


def one_line_warnings(first: bool) -> None:
    """Warnings as one line each, from rank 0 alone."""
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    # What libraries say of each other's calls is nothing that a user can mend.
    warnings.filterwarnings("ignore", module="torch|deepspeed")
    if not first:
        warnings.simplefilter("ignore")


def without(option: str, argv: list[str]) -> list[str]:
    """The same command line without an option and its value."""
    kept, skip = [], False
    for word in argv:
        if not skip and word != option and not word.startswith(f"{option}="):
            kept.append(word)
        skip = word == option
    return kept


def _check_ranks(config: Config, count: int) -> None:
    parts = count * config.engine.accumulation
    if config.batch_size % parts and "batch_size" not in config.auto:
        batch = replace(config, batch_size=max(1, config.batch_size // parts) * parts).batch_size
        raise ConfigError(
            f"--ranks {count}: batch_size={config.batch_size} is not divisible by {count} ranks x "
            f"engine.accumulation={config.engine.accumulation}; set batch_size={batch}"
        )


def _importable(module: str) -> bool:
    here = Path(module)
    return here.with_suffix(".py").is_file() or here.is_dir() or importlib.util.find_spec(module) is not None


def _as_override(option: str, value: str, known: dict[str, argparse.Action]) -> str:
    """What to say of an option that there is not."""
    near = spelling.close(option, known)
    name = option.lstrip("-").replace("-", "_")
    every = [key for key, _ in keys(Config)]
    key = name if name in every else spelling.known_as(name, every)
    if key is None and not near:
        key = spelling.meant(name, every)
    if key is not None:
        return f"{option}: settings are written key=value: {shlex.quote(f'{key}={value}')}"
    return f"there is no option {option}" + (f"; did you mean {near}?" if near else "")


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True
