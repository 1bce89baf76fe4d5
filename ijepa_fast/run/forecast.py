"""What a run will need, before anything runs: memory by ZeRO stage and number of ranks, work, hours on a named GPU.

    ijepa-fast plan --config configs/in1k_vith14_ep300.yaml [key=value ...]

Everything here is calculated from the configuration and from masks that its sampler draws: predictions, no
measurements. No GPU, no images and no memory for the weights are needed, but for a method that does not say what it
keeps for its backward pass: that is counted in a forward pass of two images.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from ijepa_fast.config import Config, ConfigError
from ijepa_fast.engine.engine import wants_graphs
from ijepa_fast.methods.method import Method
from ijepa_fast.models.flops import MEMORIES, PEAKS
from ijepa_fast.run.build import SYNTHETIC_IMAGES, Length, build_method, micro_batch
from ijepa_fast.run.counted import IMAGES, saved_values
from ijepa_fast.run.traffic import Traffic, traffic
from ijepa_fast.run.traffic import report as traffic_report

STAGES = (0, 1, 2, 3)
DRAWS = 4  # batches of masks whose mean the plan uses
VALUE_BYTES = {"fp32": 4, "bf16": 2, "auto": 2}  # auto is bf16 on a GPU
RESERVE = 1e9  # bytes that the driver, DeepSpeed's buckets and workspaces take
MARGIN = 0.1  # of the rest: fragments of the allocator, outputs that are freed within a step
# Shares of the dense bf16 peak at which hours are stated: the best vision transformer found in public on Hopper, about
# the best language model found there, and the peak, under which no run can be.
UTILISATIONS = (0.29, 0.52, 1.0)


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank. What is allocated besides, buckets of a reduction and workspaces of kernels, is left out."""

    weights: int  # what the model computes with
    gradients: int
    masters: int  # fp32 weights of the optimiser, where they are others
    moments: int
    ema: int  # fp32, where the averages do not hold it
    averages: int  # I-JEPA's target encoder
    activations: int  # kept for the backward pass
    graphs: int = 0  # what CUDA graphs hold besides: see `graph_bytes`

    @property
    def total(self) -> int:
        """Sum."""
        return sum(vars(self).values())


def parameters(method: Method) -> tuple[int, int]:
    """Trained parameters: of the networks that have an average, and of the others."""
    sizes = {name: sum(p.numel() for p in network.parameters()) for name, network in method.trained.items()}
    averaged = sum(size for name, size in sizes.items() if name in method.averaged)
    return averaged, sum(sizes.values()) - averaged


def memory(precision: str, sizes: tuple[int, int], stage: int, ranks: int, activations: int) -> Memory:
    """Bytes on each of `ranks` at ZeRO `stage`.

    precision: engine.precision. sizes: as `parameters` gives them. activations: bytes of a rank's micro-batch.
    """
    averaged, total = sizes[0], sum(sizes)
    low, size = precision != "fp32", VALUE_BYTES[precision]
    shards = ranks if stage else 1

    def share(elements: int, from_stage: int) -> int:
        return -(-elements // ranks) if stage >= from_stage else elements

    # Stage 3 gathers the EMA into a buffer before it copies it into the averages.
    averages = size * averaged * (2 if stage == 3 else 1)
    return Memory(
        weights=size * share(total, 3),
        gradients=size * share(total, 2),
        masters=4 * -(-total // shards) if low or stage else 0,
        moments=8 * -(-total // shards),
        ema=4 * -(-averaged // shards) if low else 0,
        averages=averages,
        activations=activations,
    )


def graph_bytes(precision: str, total: int, stage: int, ranks: int, accumulation: int) -> int:
    """Bytes that CUDA graphs hold on each rank beside a step's own; the pool is as large as the largest batch's.

    The first graph is verified beside a copy of the gradient; micro-batches are added up in another one; and at stage 2
    the gradient is not shared out before it is whole.
    """
    copies = 1 + (accumulation > 1) + (1 - 1 / ranks if stage == 2 else 0)
    return int(VALUE_BYTES[precision] * total * copies)


@dataclass(frozen=True)
class Plan:
    """What `make` finds: bytes by (stage, ranks), and the run's work."""

    memory: dict[tuple[int, int], Memory]
    parameters: tuple[int, int]
    images: int  # of an epoch
    steps: int
    gflop_per_image: float
    tokens_per_image: dict[int, float]  # by number of ranks
    hours: dict[float, float]  # of one GPU, by utilisation
    counted: bool  # whether activations are those of a forward pass here, as the method does not say them
    traffic: dict[int, Traffic]  # by number of ranks, at engine.zero
    step_seconds: dict[int, float]  # by number of ranks, of a step's computing at the GPU's peak


def make(config: Config, images: int | None = None, gpu: str = "H200", ranks: tuple[int, ...] = (1, 2, 8)) -> Plan:
    """The plan of a run over `images` per epoch (None: as many as the embedded data set, or ImageNet-1k, has).

    Numbers of ranks that do not divide the batch are left out. Raises ConfigError for a GPU that is not in flops.PEAKS,
    and a batch that no number of ranks divides.
    """
    if gpu not in PEAKS:
        raise ConfigError(f"--gpu: expected one of {', '.join(PEAKS)}, got {gpu}")
    images = images or (config.data.scenes if config.data.source == "scenes" else SYNTHETIC_IMAGES)
    fitting = [n for n in ranks if config.batch_size % (n * config.engine.accumulation) == 0]
    if not fitting:
        raise ConfigError(
            f"--ranks: batch_size={config.batch_size} is divided by none of {', '.join(map(str, ranks))} x "
            f"engine.accumulation={config.engine.accumulation}; name others, or change batch_size"
        )
    length = Length.of(config, images)
    with torch.device("meta"):
        method = build_method(config, length.steps_per_epoch)
    own = "forecast" in method.capabilities
    counted = 0.0 if own else saved_values(config)
    sizes, flop = parameters(method), 0.0
    tokens: dict[int, float] = {}
    table: dict[tuple[int, int], Memory] = {}
    sent: dict[int, Traffic] = {}
    for n in fitting:
        batches = [
            method.draw(micro_batch(config, n), config.seed, step, 0, config.batch_size) for step in range(DRAWS)
        ]
        kept = VALUE_BYTES[config.engine.precision] * (
            max(method.saved_values(batch) for batch in batches) if own else round(counted * micro_batch(config, n))
        )
        tokens[n] = float(np.mean([batch.tokens / batch.images for batch in batches]))
        flop = float(np.mean([method.work(batch).total / batch.images for batch in batches]))
        for stage in STAGES:
            needed = memory(config.engine.precision, sizes, stage, n, kept)
            graphs = "off" if config.engine.cuda_graphs == "off" else "auto"
            engine = replace(config.engine, zero=stage, cuda_graphs=graphs)
            captured = wants_graphs(method, engine, config.optim, torch.device("cuda"))
            if stage == config.engine.zero and n > 1:
                size = VALUE_BYTES[config.engine.precision]
                sent[n] = traffic(size, sizes, stage, n, config.engine.accumulation, captured)
            if captured:
                held = graph_bytes(config.engine.precision, sum(sizes), stage, n, config.engine.accumulation)
                needed = replace(needed, graphs=held)
            table[stage, n] = needed
    seconds = flop * config.batch_size * length.steps / PEAKS[gpu]
    hours = {share: seconds / share / 3600 for share in UTILISATIONS}
    computing = {n: flop * config.batch_size / (n * PEAKS[gpu]) for n in fitting}
    return Plan(table, sizes, images, length.steps, flop / 1e9, tokens, hours, not own, sent, computing)


@dataclass(frozen=True)
class Device:
    """What a run is to fit on: its name, and its memory in bytes."""

    name: str
    memory: float

    def holds(self, needed: Memory) -> bool:
        """Whether it holds a rank, with RESERVE and MARGIN for what is left out."""
        return needed.total * (1 + MARGIN) + RESERVE <= self.memory


def cure(config: Config, plan: Plan, device: Device, gpu: str) -> str:
    """What to set so that a run fits on as few ranks as planned for, in one line."""
    least = min(ranks for _, ranks in plan.memory)
    if found := _fitting(plan, device, config.engine.zero):
        stage, ranks = found
        setting = "" if stage == config.engine.zero else f": set engine.zero={stage}"
        return f"fits on {ranks} x {device.name}{setting}"
    engine, model = config.engine, config.model
    tries: list[tuple[str, Config]] = []
    if not model.recompute:
        tries.append(("model.recompute=true", replace(config, model=replace(model, recompute=True))))
    parts = engine.accumulation
    while config.batch_size % (2 * parts * least) == 0:
        parts *= 2
        smaller = replace(config, engine=replace(engine, accumulation=parts))
        tries.append((f"engine.accumulation={parts}", smaller))
        both = replace(smaller, model=replace(model, recompute=True))
        tries.append((f"engine.accumulation={parts} model.recompute=true", both))
    for setting, changed in tries:
        again = make(changed, plan.images, gpu, tuple({ranks for _, ranks in plan.memory}))
        if found := _fitting(again, device, engine.zero):
            return f"does not fit as it is: set {setting} engine.zero={found[0]}, on {found[1]} x {device.name}"
    return f"does not fit on {device.name}, whatever is set: name more ranks, or a smaller model"


def _fitting(plan: Plan, device: Device, preferred: int) -> tuple[int, int] | None:
    """(ZeRO stage, ranks) of the fewest ranks that fit, at the stage `preferred` where it does; None where none fit."""
    found = [key for key, needed in plan.memory.items() if device.holds(needed)]
    return min(found, key=lambda key: (key[1], key[0] != preferred, key[0]), default=None)


def report(config: Config, plan: Plan, gpu: str, device: Device | None = None) -> str:
    """The plan as Markdown; rows that are equal are one. device: the one to fit on, by default the named GPU."""
    device = device or Device(gpu, MEMORIES[gpu])
    averaged, other = plan.parameters
    names = list(Memory.__dataclass_fields__)
    lines = [
        f"{config.name}: predictions, nothing was measured",
        f"{averaged / 1e6:.1f} M parameters that have an average, {other / 1e6:.1f} M that have none; "
        f"{config.engine.precision}, batch {config.batch_size} in {config.engine.accumulation} micro-batch(es)",
        "",
        f"Bytes per rank, GB (recomputation {'on' if config.model.recompute else 'off'}"
        + (f"; activations counted in a forward pass of {IMAGES} images here" if plan.counted else "")
        + "):",
        "| ZeRO | ranks | " + " | ".join(names) + f" | total | {device.name}, {device.memory / 1e9:.0f} GB |",
        "|" + "---|" * (len(names) + 4),
    ]
    rows: dict[tuple[str, ...], list[int]] = {}  # what stands in a row: the stages it is of
    for (stage, ranks), needed in sorted(plan.memory.items(), key=lambda item: item[0][::-1]):
        cells = [f"{value / 1e9:.2f}" for value in (*vars(needed).values(), needed.total)]
        fits = "fits" if device.holds(needed) else "does not fit"
        rows.setdefault((str(ranks), *cells, fits), []).append(stage)
    lines += [f"| {', '.join(map(str, stages))} | {' | '.join(cells)} |" for cells, stages in rows.items()]
    lines += [
        "",
        cure(config, plan, device, gpu),
        "",
        f"{plan.images} images per epoch, {plan.steps} steps; tokens per image by number of ranks: "
        + ", ".join(f"{n}: {count:.0f}" for n, count in plan.tokens_per_image.items()),
        f"{plan.gflop_per_image:.1f} GFLOP per image at {max(plan.tokens_per_image)} ranks, "
        f"{plan.gflop_per_image * 1e9 * config.batch_size * plan.steps / 1e18:.4g} EFLOP in all",
        "",
        f"| share of the {gpu}'s dense bf16 peak | hours on one {gpu} | hours on eight |",
        "|---|---|---|",
    ]
    lines += [f"| {share:.0%} | {hours:.4g} | {hours / 8:.4g} |" for share, hours in plan.hours.items()]
    if plan.traffic:
        lines += ["", *traffic_report(plan.traffic, plan.step_seconds, config.engine.zero, gpu)]
    return "\n".join(lines)
