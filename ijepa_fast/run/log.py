"""What a run measures and where it is written: the terminal, log.jsonl, TensorBoard, W&B, a user's own loggers.

Losses stay on the device between logging steps; a window's mean and its finiteness are read in one transfer.
"""

from __future__ import annotations

import importlib.util
import json
import math
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn, TextIO

import torch
from tqdm import tqdm

from ijepa_fast import config
from ijepa_fast.files import publish
from ijepa_fast.masks.draw import Draw
from ijepa_fast.run.imported import functions
from ijepa_fast.run.speed import duration

SKIPPED = 3  # steps that may be skipped between two log lines


class NonFiniteLoss(ValueError):
    """Loss, gradient or weights became NaN or infinite; the message says in which steps and on which ranks.

    All ranks raise it.
    """

    met_by_all = True


class Meter:
    """Sums over the micro-batches since the last reading."""

    def __init__(self, device: torch.device):
        self._device, self._skipped = device, 0
        self._reset()

    def _reset(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._finite: list[torch.Tensor] = []
        self._count = self._images = self._tokens = 0
        self._wait = 0.0
        self._begin = time.perf_counter()

    def restart(self) -> None:
        """Forget the time since the last reading: something else than training was done in it."""
        self._begin = time.perf_counter()

    def add(self, loss: torch.Tensor, terms: Mapping[str, torch.Tensor], draw: Draw, wait: float) -> None:
        """Count one micro-batch: its loss and the terms of it, on the device, and seconds spent waiting for data."""
        for name, value in {"": loss, **terms}.items():
            if name not in self._sums:
                self._sums[name] = torch.zeros((), dtype=torch.float64, device=self._device)
            self._sums[name] += value
        self._finite.append(loss.isfinite())
        self._count += 1
        self._images += draw.images
        self._tokens += draw.tokens
        self._wait += wait

    def read(
        self, steps: tuple[int, int], health: torch.Tensor, skipped: int, squares: torch.Tensor | None = None
    ) -> dict[str, Any]:
        """Means since the last reading, over all ranks; the only place that waits for the device.

        steps: first and last step of the window, for the message. health: Engine.health(). skipped: Engine.skipped.
        squares: Engine.gradient_squares(). Raises NonFiniteLoss.
        """
        ranks = torch.distributed.get_world_size()
        names = list(self._sums)
        values = torch.zeros(ranks, len(names) + 2, dtype=torch.float64, device=self._device)
        mine = torch.stack([self._sums[name] for name in names]) / self._count
        parts = torch.stack([health, torch.zeros_like(health) if squares is None else squares])
        values[torch.distributed.get_rank()] = torch.cat([mine, parts])
        torch.distributed.all_reduce(values)
        *means, healths, norms = values.cpu().T
        for what, of_ranks in (("loss is", means[0]), ("weights are", healths)):
            bad = [rank for rank, finite in enumerate(of_ranks.isfinite().tolist()) if not finite]
            if bad:
                self._not_finite(what, steps, bad)
        skipped, self._skipped = skipped - self._skipped, skipped
        if skipped > SKIPPED:
            self._not_finite("gradient is", steps, list(range(ranks)))
        seconds = max(time.perf_counter() - self._begin, 1e-9)
        loss, *terms = [float(of_ranks.sum() / ranks) for of_ranks in means]
        window: dict[str, Any] = {
            "loss": loss,
            "images_per_second": self._images * ranks / seconds,
            "tokens_per_second": self._tokens * ranks / seconds,
            "tokens_per_image": self._tokens / self._images,
            "data_wait": self._wait / seconds,
        }
        if terms:
            window["loss_terms"] = dict(zip(names[1:], terms, strict=True))
        if squares is not None:
            window["gradient_norm"] = float(norms.sum().sqrt())
        if skipped:
            window["skipped"] = skipped
        self._reset()
        return window

    def _not_finite(self, what: str, steps: tuple[int, int], bad: list[int]) -> NoReturn:
        """Raise NonFiniteLoss, with the first step of the window in which a rank's own loss was not finite."""
        finite = torch.stack(self._finite).tolist()
        micro_steps = max(1, len(finite) // (steps[1] - steps[0] + 1))
        firsts: list[int | None] = [None] * torch.distributed.get_world_size()
        mine = None if all(finite) else steps[0] + finite.index(False) // micro_steps
        torch.distributed.all_gather_object(firsts, mine)
        known = [first for first in firsts if first is not None]
        since = f"; the first loss that was not: step {min(known)}, rank {firsts.index(min(known))}" if known else ""
        raise NonFiniteLoss(
            f"the {what} not finite in steps {steps[0]} to {steps[1]} on ranks {bad}{since}. Earlier checkpoints are "
            f"untouched: lower optim.lr, set optim.clip=1, or resume with engine.precision=fp32"
        )


def check_loggers(log: config.Log) -> None:
    """Raises ImportError or ConfigError, naming the key, where a logger was asked for that cannot be had."""
    for key, wanted, package in (("tensorboard", log.tensorboard, "tensorboard"), ("wandb", log.wandb, "wandb")):
        if wanted and importlib.util.find_spec(package) is None:
            raise ImportError(
                f"log.{key}: the package {package} is not installed; install it, or set log.{key} to false or null"
            )
    functions("log.loggers", log.loggers)


class RunLog:
    """Rank 0's record of the run; on the other ranks, nothing.

    Args:
        folder: the run's.
        name: the run's.
        log: the section `log`.
        settings: the flattened configuration, for W&B.
        rank: of this process.
        step, total: steps done already, and steps of the run.
    """

    def __init__(
        self, folder: Path, name: str, log: config.Log, settings: dict[str, Any], rank: int, step: int, total: int
    ):
        self._bar = self._file = self._board = self._wandb = None
        self._others: list[Any] = []
        self._total = total
        if rank:
            return
        self._file = _reopen(folder / "log.jsonl", step)
        if sys.stderr.isatty():
            self._bar = tqdm(total=total, initial=step, desc=name, unit="step", dynamic_ncols=True, mininterval=0.5)
        if log.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step)
            self._board.add_text("config", "\n".join(f"    {key}: {value}" for key, value in settings.items()), step)
        if log.wandb:
            import wandb

            known = {"id": _wandb_id(folder / "wandb_id", step), "resume": "allow"}
            self._wandb = wandb.init(project=log.wandb, name=name, dir=folder, config=settings, **known)
        self._others = [make(folder, name, settings) for make in functions("log.loggers", log.loggers)]

    def advance(self) -> None:
        """One step is done."""
        if self._bar is not None:
            self._bar.update()

    def write(self, step: int, record: dict) -> None:
        """Write `record` for the state after `step` steps; nested sections keep their names, joined by slashes."""
        if self._file is None:
            return
        try:
            self._file.write(json.dumps({"step": step, **record}) + "\n")
            self._file.flush()
        except OSError as error:
            raise OSError(error.errno, f"{error.strerror}; checkpoints are intact", self._file.name) from None
        if skipped := record.get("skipped"):
            self.say(f"{skipped} of the steps up to {step} were skipped: their gradient was not finite")
        numbers = dict(_numbers(record))
        if "loss" in record:
            self._show(step, record)
        if self._board is not None:
            for key, value in numbers.items():
                self._board.add_scalar(tag(key), value, step)
        if self._wandb is not None:
            self._wandb.log(numbers, step=step)
        for other in self._others:
            other.write(step, numbers)

    def _show(self, step: int, record: dict) -> None:
        """The bar's words; where stderr is no terminal, a line of its own, of words that grep finds."""
        share = next(((name, record[name]) for name in ("mfu", "of_product") if name in record), None)
        words = {
            "loss": f"{record['loss']:.4f}",
            **{name: f"{value:.4f}" for name, value in record.get("loss_terms", {}).items()},
            **({"gradient_norm": f"{record['gradient_norm']:.3g}"} if "gradient_norm" in record else {}),
            "lr": f"{record['lr']:.1e}",
            **({"ema": f"{record['ema']:.4f}"} if "ema" in record else {}),
            "images/s": f"{record['images_per_second']:.0f}",
            "tokens/s": f"{record['tokens_per_second']:.0f}",
            **({share[0]: f"{share[1]:.0%}"} if share else {}),
            **({"memory": f"{record['peak_memory_gb']:.1f}GB"} if "peak_memory_gb" in record else {}),
            "data_wait": f"{record['data_wait']:.0%}",
        }
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(f"{name} {value}" for name, value in words.items()), refresh=False)
            return
        head = {"step": f"{step}/{self._total}", "epoch": record.get("epoch", 0)}
        tail = {"left": duration(record["seconds_left"]).replace(" ", "")} if "seconds_left" in record else {}
        print(" ".join(f"{name}={value}" for name, value in (head | words | tail).items()), file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """Print lines, above the progress bar where there is one."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        elif self._file is not None:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Finish all of it."""
        for sink in (self._bar, self._file, self._board, *self._others):
            if sink is not None:
                sink.close()
        if self._wandb is not None:
            self._wandb.finish()


def newest(path: Path, *keys: str) -> Any:
    """The newest value in the log at `path` behind these keys, one in another; None where no line has it."""
    for line in reversed(path.read_text().splitlines() if path.is_file() else []):
        try:
            value = json.loads(line)
        except json.JSONDecodeError:  # cut short by a kill
            continue
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None:
            return value
    return None


def _reopen(path: Path, step: int) -> TextIO:
    """The log for appending, without records of steps that a resumed run will do again, and lines that are none."""
    if path.is_file():
        kept = [line + "\n" for line in path.read_text(errors="replace").splitlines() if _step_of(line) <= step]
        with publish(path) as draft:
            draft.write_text("".join(kept))
    return open(path, "a")


def _step_of(line: str) -> float:
    """The step of a record, infinity for a line that is none, such as one that a kill cut short."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf


SPEED = (
    *("images_per_second", "tokens_per_second", "data_wait", "mfu", "of_product", "work_tflops", "peak_memory_gb"),
    *("seconds_left", "saving_blocked", "graphs/"),
)


def tag(key: str) -> str:
    """The TensorBoard tag of a number of the log: grouped as train/, speed/ or probe/."""
    if key.startswith("probe/"):
        return key
    group = "speed" if key.startswith(SPEED) else "train"
    return f"{group}/{key.replace('/', '_')}"


def _numbers(record: dict, prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, value in record.items():
        if isinstance(value, dict):
            yield from _numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float):
            yield prefix + key, value


def _wandb_id(path: Path, step: int) -> str:
    """What W&B knows the run by: a run that goes on from `step` keeps the one in the file `path`."""
    if not (step and path.is_file()):
        path.write_text(uuid.uuid4().hex)
    return path.read_text()
