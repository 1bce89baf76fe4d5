"""`engine.precision`: what `auto` takes, and a word where bf16 was asked for and is the slower one."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

GAIN = 1.5  # times as fast as fp32's a bf16 product must be, so that a step gains
SECONDS = 0.05  # of timing both products
ROWS, WIDTH, HIDDEN = 1024, 384, 1536  # of the product: part of a ViT-S's MLP


@dataclass(frozen=True)
class Precision:
    """What is computed in, "bf16" or "fp32", and the reason, for a person."""

    name: str
    reason: str


def choose_precision(wanted: str, device: torch.device, before: str | None = None) -> Precision:
    """What `engine.precision` comes to on a device.

    `auto` is bf16 on a GPU; on a CPU a timing of one bf16 and one fp32 product decides, which bf16 wins where the
    processor has AMX. A run that goes on keeps its precision.

    Args:
        wanted: auto | bf16 | fp32.
        device: of the run.
        before: the precision of the run's last checkpoint, where there is one.
    """
    if wanted == "auto" and before is not None:
        return Precision(before, "as the run began")
    if wanted == "fp32":
        return Precision("fp32", "as asked for")
    if device.type == "cuda":
        return Precision("bf16", "on a GPU")
    gain = bf16_gain()
    if wanted == "auto":
        name = "bf16" if gain >= GAIN else "fp32"
        return Precision(name, f"on this processor a bf16 product is {gain:.2f} times as fast as an fp32 one")
    if gain >= 1:
        return Precision("bf16", "as asked for")
    return Precision("bf16", f"as asked for, though on this processor {_slower(gain)}; auto would take fp32")


def bf16_gain() -> float:
    """How many times as fast as an fp32 product a bf16 one is on this CPU; 0 where there is none. Takes SECONDS."""
    x, weight = torch.randn(ROWS, WIDTH), torch.randn(HIDDEN, WIDTH)
    low = x.bfloat16(), weight.bfloat16()
    try:
        times = [_fastest(partial(F.linear, *pair)) for pair in ((x, weight), low)]
    except RuntimeError:  # the library has no such product for this processor
        return 0.0
    return times[0] / times[1]


def product_rate(dtype: torch.dtype) -> float:
    """FLOP/s of the same product in `dtype` on this CPU, on the threads in force; takes SECONDS / 2."""
    x, weight = torch.randn(ROWS, WIDTH).to(dtype), torch.randn(HIDDEN, WIDTH).to(dtype)
    return 2 * ROWS * WIDTH * HIDDEN / _fastest(partial(F.linear, x, weight))


def _fastest(run: Callable[[], object]) -> float:
    run()
    best, end = float("inf"), time.perf_counter() + SECONDS / 2
    while (begin := time.perf_counter()) < end or best == float("inf"):
        run()
        best = min(best, time.perf_counter() - begin)
    return best


def _slower(gain: float) -> str:
    return f"a bf16 product takes {1 / gain:.1f} times as long as an fp32 one" if gain else "there are no bf16 products"
