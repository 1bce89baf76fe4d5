"""What a run will need, before anything runs: memory by ZeRO stage and number of ranks, work, hours on a named GPU.

    python -m ijepa_fast train --plan --config configs/in1k_vith14_ep300.yaml [key=value ...]

Everything here is calculated from the configuration and from masks that its sampler draws: predictions, no
measurements. No GPU, no images and no memory for the weights are needed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ijepa_fast.config import Config, ConfigError
from ijepa_fast.methods.method import Method
from ijepa_fast.models.flops import PEAKS
from ijepa_fast.run.build import SYNTHETIC_IMAGES, Length, build_method, micro_batch

STAGES = (0, 1, 2, 3)
DRAWS = 4  # batches of masks whose mean the plan uses
VALUE_BYTES = {"fp32": 4, "bf16": 2, "auto": 2}  # auto is bf16 on a GPU
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


def make(config: Config, images: int | None = None, gpu: str = "H200", ranks: tuple[int, ...] = (1, 2, 8)) -> Plan:
    """The plan of a run over `images` per epoch (None: as many as the embedded data set, or ImageNet-1k, has).

    Numbers of ranks that do not divide the batch are left out. Raises ConfigError for a GPU that is not in flops.PEAKS,
    a batch that no number of ranks divides, and methods that cannot be forecast.
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
    if "forecast" not in method.capabilities:
        raise ConfigError(
            f"objective.method={config.objective.method} does not say what it keeps for its backward pass, so --plan "
            f"cannot be made; plan a method that does, such as ijepa"
        )
    sizes, flop = parameters(method), 0.0
    tokens: dict[int, float] = {}
    table: dict[tuple[int, int], Memory] = {}
    for n in fitting:
        batches = [
            method.draw(micro_batch(config, n), config.seed, step, 0, config.batch_size) for step in range(DRAWS)
        ]
        kept = VALUE_BYTES[config.engine.precision] * max(method.saved_values(batch) for batch in batches)
        tokens[n] = float(np.mean([batch.tokens / batch.images for batch in batches]))
        flop = float(np.mean([method.work(batch).total / batch.images for batch in batches]))
        table |= {(stage, n): memory(config.engine.precision, sizes, stage, n, kept) for stage in STAGES}
    seconds = flop * config.batch_size * length.steps / PEAKS[gpu]
    hours = {share: seconds / share / 3600 for share in UTILISATIONS}
    return Plan(table, sizes, images, length.steps, flop / 1e9, tokens, hours)


def report(config: Config, plan: Plan, gpu: str) -> str:
    """The plan as Markdown."""
    averaged, other = plan.parameters
    names = list(Memory.__dataclass_fields__)
    lines = [
        f"{config.name}: predictions, nothing was measured",
        f"{averaged / 1e6:.1f} M parameters that have an average, {other / 1e6:.1f} M that have none; "
        f"{config.engine.precision}, batch {config.batch_size} in {config.engine.accumulation} micro-batch(es)",
        "",
        f"Bytes per rank, GB (recomputation {'on' if config.model.recompute else 'off'}):",
        "| ZeRO | ranks | " + " | ".join(names) + " | total |",
        "|" + "---|" * (len(names) + 3),
    ]
    for (stage, ranks), bytes_ in sorted(plan.memory.items(), key=lambda item: item[0][::-1]):
        cells = [f"{value / 1e9:.2f}" for value in (*vars(bytes_).values(), bytes_.total)]
        lines.append(f"| {stage} | {ranks} | " + " | ".join(cells) + " |")
    lines += [
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
    return "\n".join(lines)
