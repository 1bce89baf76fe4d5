"""Training a decoder: each step is a function of its number and the weights before it, so that a resume is exact."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from ijepa_fast.engine.precision import choose_precision
from ijepa_fast.files import publish
from ijepa_fast.run.speed import duration
from ijepa_fast.visualise.conditions import Conditions
from ijepa_fast.visualise.decoder import TIMES, Decoder

RATE, WARMUP = 5e-4, 100  # learning rate, and steps in which it grows to that
DECAY = 0.999  # of the average, less in the first steps
UNTOLD = 0.1  # share of the images whose feature is withheld
WINDOW = 100  # steps between two lines, and means of the loss
SAVED = 60.0  # seconds between two checkpoints


class Stopped(Exception):
    """Training was saved after a signal. status: the exit status, 128 + the signal's number."""

    def __init__(self, number: int, step: int):
        super().__init__(f"stopped after step {step}, saved; the same command goes on")
        self.status = 128 + number


class Trainer:
    """A decoder in training on the `conditions`, told those of `kind`.

    drawing: its average, to draw with. losses: mean squared errors of v, one for each WINDOW of steps.
    """

    def __init__(
        self, decoder: Decoder, conditions: Conditions, kind: str, batch: int, seed: int, device: torch.device
    ):
        self.decoder, self.batch, self.seed, self.device = decoder.to(device), batch, seed, device
        self.images = as_signed(conditions.images[conditions.held :]).to(device)
        self.told = conditions.told(kind)[conditions.held :].to(device)
        self.average = AveragedModel(decoder, multi_avg_fn=_average)
        self.drawing = cast(Decoder, self.average.module)
        self.optimizer = torch.optim.AdamW(decoder.parameters(), RATE, weight_decay=0.0, fused=True)
        self.step, self.losses, self._sum = 0, list[float](), 0.0

    def advance(self) -> None:
        """One step."""
        rng = np.random.default_rng((self.seed, self.step))
        for group in self.optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (self.step + 1) / WARMUP)
        rows = torch.from_numpy(rng.integers(len(self.images), size=self.batch))
        blocks = torch.from_numpy(rng.integers(self.told.shape[1], size=self.batch))
        times = torch.from_numpy(rng.integers(TIMES, size=self.batch)).to(self.device)
        keep = torch.from_numpy(rng.random(self.batch) >= UNTOLD).to(self.device)
        images = self.images[rows]
        noise = torch.from_numpy(rng.standard_normal(images.shape, np.float32)).to(self.device)
        loss = self.decoder.errors(images, noise, times, self.told[rows, blocks], keep)[0].mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.average.update_parameters(self.decoder)
        self.step += 1
        self._sum += loss.item()
        if self.step % WINDOW == 0:
            self.losses.append(self._sum / WINDOW)
            self._sum = 0.0

    def train(self, steps: int, path: Path, made: dict[str, Any]) -> None:
        """Train until step `steps`, from the checkpoint at `path` where there is one of what was `made`; save there.

        Raises Stopped after SIGINT and SIGTERM; ValueError where the checkpoint is not of `made`, or cannot be read.
        """
        if not path.is_file():
            self._use(choose_precision("auto", self.device).name)
        else:
            self._load(path, made)
            if self.step < steps:
                print(f"continuing {path.parent} from step {self.step}", file=sys.stderr)
        bar = tqdm(total=steps, initial=min(self.step, steps), unit="step", disable=not sys.stderr.isatty())
        begin, first, saved = time.monotonic(), self.step, time.monotonic()
        with bar, _signals() as signalled:
            while self.step < steps:
                self.advance()
                bar.update()
                if self.step % WINDOW == 0:
                    rate = (self.step - first) / (time.monotonic() - begin)
                    bar.set_postfix_str(f"loss {self.losses[-1]:.4f}")
                    if bar.disable:
                        left = duration((steps - self.step) / rate).replace(" ", "")
                        words = f"step={self.step}/{steps} loss={self.losses[-1]:.4f} images/s={rate * self.batch:.0f}"
                        print(f"{words} left={left}", file=sys.stderr, flush=True)
                number = signalled()
                if number or self.step == steps or time.monotonic() - saved > SAVED:
                    self._save(path, made)
                    saved = time.monotonic()
                if number and self.step < steps:
                    raise Stopped(number, self.step)

    def _save(self, path: Path, made: dict[str, Any]) -> None:
        state: dict[str, Any] = {"made": made, "step": self.step, "losses": self.losses, "sum": self._sum}
        state["precision"] = self.decoder.precision
        for name in ("decoder", "average", "optimizer"):
            state[name] = getattr(self, name).state_dict()
        with publish(path, durable=True) as draft:
            torch.save(state, draft)

    def _load(self, path: Path, made: dict[str, Any]) -> None:
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
            then = state["made"]
        except Exception as error:
            raise ValueError(f"{path}: cannot be read ({type(error).__name__}); remove it to train anew") from None
        check_made(path.parent, then, made)
        for name in ("decoder", "average", "optimizer"):
            getattr(self, name).load_state_dict(state[name])
        self._use(state["precision"])
        self.step, self.losses, self._sum = state["step"], state["losses"], state["sum"]

    def _use(self, precision: str) -> None:
        self.decoder.precision = self.drawing.precision = precision


def check_made(folder: Path, then: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise ValueError where what is in `folder` was made of something else than now."""
    if other := [
        f"{name}={then.get(name)} then, {value} now" for name, value in now.items() if then.get(name) != value
    ]:
        raise ValueError(f"{folder} was begun with other settings: {', '.join(other)}; remove it to begin anew")


def as_signed(images: torch.Tensor) -> torch.Tensor:
    """uint8 (n, h, w, 3) -> fp32 (n, 3, h, w) in -1..1."""
    return images.permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous()


def _average(averages: Any, current: Any, count: Any) -> None:
    """The decay grows to DECAY, so that a short run does not draw with its first weights."""
    torch._foreach_lerp_(averages, current, 1 - min(DECAY, (1 + float(count)) / (10 + float(count))))


@contextmanager
def _signals() -> Iterator[Callable[[], int]]:
    """A function that says which of SIGINT and SIGTERM has come meanwhile, 0: none."""
    came: list[int] = []
    before = {n: signal.signal(n, lambda number, _: came.append(number)) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: came[0] if came else 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
