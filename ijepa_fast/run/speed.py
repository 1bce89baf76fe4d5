"""How fast a run is beside what its device can do, what memory it takes, and how long it will go on."""

from __future__ import annotations

import resource
from typing import Any

import torch

from ijepa_fast.engine.precision import product_rate
from ijepa_fast.masks.draw import Draw
from ijepa_fast.methods.method import Method
from ijepa_fast.models.flops import PEAKS


def peak(device: torch.device, precision: str) -> tuple[float, str] | None:
    """FLOP/s of a device to measure a run by, and what they are; None for a GPU whose data sheet is not known here.

    On a GPU the dense bf16 peak of its data sheet, on a CPU a matrix product of an MLP, measured now, in the run's
    precision and on its threads.
    """
    if device.type != "cuda":
        rate = product_rate(torch.bfloat16 if precision == "bf16" else torch.float32)
        return rate, f"what {precision} products reach here, {rate / 1e9:.0f} GFLOP/s a rank"
    name = torch.cuda.get_device_name(device)
    known = next((gpu for gpu in PEAKS if gpu in name.replace("-", " ").split()), None)
    if known is None:
        return None
    return PEAKS[known], f"the {known}'s dense bf16 peak, {PEAKS[known] / 1e12:.0f} TFLOP/s"


class Speed:
    """What a log line says of speed and memory.

    device, precision: of the run. total: its steps. batch: its images of a step. ranks: how many.
    """

    def __init__(self, method: Method, device: torch.device, precision: str, total: int, batch: int, ranks: int):
        self._method, self._device, self._total, self._batch, self._ranks = method, device, total, batch, ranks
        self.peak = peak(device, precision)

    def record(self, step: int, draw: Draw, window: dict[str, Any]) -> dict[str, Any]:
        """Of a window of the log (Meter.read), after `step`; draw: of its last micro-batch, on the host or not.

        work_tflops: TFLOP/s of all ranks, the work as it is executed here. mfu: their share of the GPUs' peak;
        of_product: of what products were measured to reach on the CPU. peak_memory_gb: of this rank, since its start.
        seconds_left: of training.
        """
        rate = window["images_per_second"]
        flops = self._method.work(draw).total / draw.images * rate
        record = {"work_tflops": flops / 1e12, "peak_memory_gb": peak_memory(self._device) / 1e9}
        if self.peak is not None:
            record["mfu" if self._device.type == "cuda" else "of_product"] = flops / (self.peak[0] * self._ranks)
        return record | {"seconds_left": (self._total - step) * self._batch / rate}


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process has had: allocated on the GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def duration(seconds: float) -> str:
    """3.2e4 -> "8 h 53 min"."""
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if seconds < 90:
        return f"{seconds:.0f} s"
    if minutes < 120:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"
