"""Where the time of this project's step goes, stage by stage, beside what the roofline predicts for each.

Used by `bench/throughput.py --breakdown`. A stage's prediction is its work over the rate of a matrix product measured
in the same run, or its bytes over the bandwidth of a copy measured here, whichever takes longer; so it is the time on
this machine if nothing else limited it, not a measurement.
"""

from __future__ import annotations

import time

import numpy as np
import torch

from bench.baselines.case import Case
from bench.baselines.contenders import LR, Contender, ijepa_work
from ijepa_fast.kernels.target_loss import target_loss

STAGES = ("data", "target", "context", "predictor", "backward", "optimiser")


# Cycles for which the GPU is kept waiting before each stage, about 80 ms: the host launches the stage meanwhile, so
# what is measured is the kernels' time, as in a CUDA graph, and not the time of the launches.
HEAD_START = 150_000_000


class Marks:
    """Times of a step's stages: CUDA events, which wait for nothing, or the clock on a CPU."""

    def __init__(self, device: torch.device, head_start: int = 0):
        self.cuda, self.head_start = device.type == "cuda", head_start
        self.starts, self.ends = [], []

    def mark(self) -> None:
        """The stage before ends, the next begins."""
        self._record(self.ends)
        if self.cuda and self.head_start:
            torch.cuda._sleep(self.head_start)
        self._record(self.starts)

    def _record(self, times: list) -> None:
        if self.cuda:
            times.append(torch.cuda.Event(enable_timing=True))
            times[-1].record()
        else:
            times.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Of each stage; waits for the device."""
        pairs = zip(self.starts, self.ends[1:])
        if self.cuda:
            torch.cuda.synchronize()
            return [a.elapsed_time(b) / 1e3 for a, b in pairs]
        return [b - a for a, b in pairs]


def timed_step(step, batch) -> list[float]:
    """One step of a BareStep on `batch`, as its `__call__` takes it; seconds of each of STAGES."""
    method, marks = step.method, Marks(step.device, HEAD_START)
    marks.mark()
    images, draw = (x.to(step.device, non_blocking=True) for x in batch)
    patches = method.patchify(images)
    marks.mark()
    with torch.no_grad():
        targets = method.targets(patches, draw)
    marks.mark()
    context = method.encoder.context(patches, draw)
    marks.mark()
    loss = target_loss(method.predictor(context, draw), targets, draw.prediction_rows, kind=method.options.loss)
    marks.mark()
    loss.backward()
    marks.mark()
    step.update(LR)
    marks.mark()
    return marks.seconds()


def bandwidth(device: str) -> float:
    """Bytes per second, read and written, of a copy of 256 MB."""
    source = torch.ones(64 * 2**20, device=device)
    target, seconds = torch.empty_like(source), []
    for _ in range(6):
        marks = Marks(torch.device(device))
        marks.mark()
        target.copy_(source)
        marks.mark()
        seconds += marks.seconds()
    return 2 * source.numel() * 4 / float(np.median(seconds))


def predict(contender: Contender, case: Case, rate: float, speed: float) -> list[float]:
    """Seconds of each stage by the roofline: `rate` in FLOP/s, `speed` in bytes/s; the mean of the prepared batches."""
    method = contender.step.method
    works = [ijepa_work(case, draw)[1] for _, draw in contender.batches]
    teacher = np.mean([w.teacher for w in works])
    context, narrow = (np.mean([w.trained[part] for w in works]) for part in ("context", "predictor"))
    embedding = np.mean([w.no_input_gradient for w in works])
    size = 2 if case.low_precision else 4
    pixels = case.batch * case.crop**2 * 3
    averaged, other = (sum(p.numel() for p in net.parameters()) for net in (method.encoder, method.predictor))
    # A gradient and fp32 weight, two moments (and average) read, the latter written; low-precision copies written.
    copies = 2 if case.low_precision else 0
    moved = averaged * (size + 32 + 2 * copies) + other * (size + 24 + copies)
    products = [teacher, context, narrow, 2 * (context + narrow) - embedding]
    return [pixels * (1 + size) / speed, *(float(work) / rate for work in products), moved / speed]


def breakdown(contender: Contender, case: Case, rate: float, steps: int) -> list[dict]:
    """A record a stage: median measured seconds over `steps` steps, and the roofline's seconds at `rate` FLOP/s."""
    for i in range(2):
        contender.run(i)
    seconds = [timed_step(contender.step, contender.batches[i % len(contender.batches)]) for i in range(steps)]
    predicted = predict(contender, case, rate, bandwidth(case.device))
    return [
        {"stage": stage, "measured_seconds": float(measured), "roofline_seconds": float(wanted)}
        for stage, measured, wanted in zip(STAGES, np.median(seconds, axis=0), predicted, strict=True)
    ]


def table(stages: list[dict]) -> str:
    """The records as a Markdown table, with their sum."""
    total = {"stage": "step"} | {k: sum(s[k] for s in stages) for k in ("measured_seconds", "roofline_seconds")}
    lines = ["| stage | measured, ms | roofline's prediction, ms | prediction / measured |", "|---|---|---|---|"]
    for s in [*stages, total]:
        measured, wanted = s["measured_seconds"], s["roofline_seconds"]
        lines.append(f"| {s['stage']} | {1e3 * measured:.2f} | {1e3 * wanted:.2f} | {wanted / measured:.0%} |")
    return "\n".join(lines)
