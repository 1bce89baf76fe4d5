"""What the ranks of a run send each other in a step, by ZeRO stage, and how long that takes over a link. Calculated.

Each collective is a ring: of n ranks, each sends (n - 1)/n of a tensor to gather or to reduce-scatter it, and twice
that to all-reduce it. One ring over several machines leaves each machine once, so that what counts is the sum of a
machine's links.
"""

from __future__ import annotations

from dataclasses import dataclass

# Bytes per second in one direction, of data sheets: what a machine sends to the next one, all its adapters together.
LINKS = {
    "NVLink 4, one machine": 450e9,
    "8 x 400 Gb/s": 400e9,
    "8 x 100 Gb/s": 100e9,
    "100 Gb/s": 12.5e9,
    "10 Gb/s": 1.25e9,
}
WITHIN = "NVLink 4, one machine"
GPUS = 8  # of a machine
KEPT = 1e9  # parameters that pass between two uses of a weight, up to which DeepSpeed keeps it gathered at ZeRO 3


@dataclass(frozen=True)
class Traffic:
    """Bytes that each rank sends in a step."""

    gradients: int
    weights: int
    averages: int

    @property
    def total(self) -> int:
        """Sum."""
        return self.gradients + self.weights + self.averages


def traffic(size: int, sizes: tuple[int, int], stage: int, ranks: int, accumulation: int, graphs: bool) -> Traffic:
    """What each of `ranks` sends in a step at ZeRO `stage`.

    size: bytes of a value, as the model computes with it. sizes: trained parameters that have an average, and others.
    graphs: whether steps are CUDA graphs, which reduce-scatter once where DeepSpeed all-reduces. Padding of partitions,
    and the few numbers by which ranks agree, are left out.
    """
    averaged, total = sizes[0], sum(sizes)
    ring = size * (ranks - 1) / ranks
    whole = total * ring
    if stage == 0:
        return Traffic(round(2 * whole), 0, 0)
    averages = round(averaged * ring)
    if stage == 3:  # weights are gathered for each micro-batch, and again for its backward pass where there are many
        gathers = accumulation * (1 if 2 * total <= KEPT else 2)
        return Traffic(round(whole * accumulation), round(whole * gathers), averages)
    passes = 1 if graphs else 2 * (accumulation if stage == 2 else 1)
    return Traffic(round(whole * passes), round(whole), averages)


def links(ranks: int) -> dict[str, float]:
    """The links that `ranks` can have between them."""
    return {name: speed for name, speed in LINKS.items() if ranks <= GPUS or name != WITHIN}


def report(found: dict[int, Traffic], seconds: dict[int, float], stage: int, gpu: str) -> list[str]:
    """Lines of Markdown. found: by number of ranks. seconds: of a step's computing, at the dense peak of `gpu`."""
    lines = [
        f"Sent by each rank in a step at ZeRO {stage}, calculated, nothing was measured: GB, and seconds over the",
        f"links of a machine of {GPUS} GPUs, at full speed, nothing overlapped; beside them a step's computing at the",
        f"{gpu}'s dense bf16 peak, which is not reached:",
        "| ranks | gradients | weights | averages | total | computing, s | " + " | ".join(LINKS) + " |",
        "|" + "---|" * (6 + len(LINKS)),
    ]
    for ranks, sent in found.items():
        cells = [f"{value / 1e9:.3g}" for value in (sent.gradients, sent.weights, sent.averages, sent.total)]
        possible = links(ranks)
        times = [f"{sent.total / LINKS[link]:.3g}" if link in possible else "" for link in LINKS]
        lines.append(f"| {ranks} | {' | '.join([*cells, f'{seconds[ranks]:.3g}', *times])} |")
    return lines
