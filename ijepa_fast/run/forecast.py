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
from ijepa_fast.masks.packing import PackedBatch
from ijepa_fast.models.flops import PEAKS
from ijepa_fast.run.build import SYNTHETIC_IMAGES, build_masks, build_objective, method_of

STAGES = (0, 1, 2, 3)
DRAWS = 4  # batches of masks whose mean the plan uses
# Shares of the dense bf16 peak at which hours are stated: the best vision transformer found in public on Hopper, this
# project's aim, and the peak, under which no run can be.
UTILISATIONS = (0.29, 0.52, 1.0)


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank. What is allocated besides, buckets of a reduction and workspaces of kernels, is left out."""

    weights: int  # what the model computes with
    gradients: int
    masters: int  # fp32 weights of the optimiser, where they are others
    moments: int
    average: int  # fp32 EMA, where the target encoder does not hold it
    target: int  # the target encoder
    activations: int  # kept for the backward pass

    @property
    def total(self) -> int:
        """Sum."""
        return sum(vars(self).values())


def parameters(config: Config) -> tuple[int, int]:
    """Parameters of the encoder and of what else is trained, counted on no device."""
    with torch.device("meta"):
        objective = build_objective(config)
    return tuple(sum(p.numel() for p in net.parameters()) for net in (objective.encoder, objective.predictor))


def memory(config: Config, sizes: tuple[int, int], stage: int, ranks: int, activations: int) -> Memory:
    """Bytes on each of `ranks` at ZeRO `stage`.

    sizes: as `parameters` gives them; activations: bytes of a rank's micro-batch.
    """
    encoder, total = sizes[0], sum(sizes)
    low = config.engine.precision == "bf16"
    size = 2 if low else 4
    shards = ranks if stage else 1

    def share(elements: int, from_stage: int) -> int:
        return -(-elements // ranks) if stage >= from_stage else elements

    # Stage 3 gathers the average into a buffer before it copies it into the target encoder.
    target = size * encoder * (2 if stage == 3 else 1)
    return Memory(
        weights=size * share(total, 3),
        gradients=size * share(total, 2),
        masters=4 * -(-total // shards) if low or stage else 0,
        moments=8 * -(-total // shards),
        average=4 * -(-encoder // shards) if low else 0,
        target=target,
        activations=activations,
    )


def stack_values(dim: int, depth: int, ratio: float, tokens: int, used: int, recompute: bool) -> int:
    """Values that a stack of blocks keeps for its backward pass, its last block computing `used` of `tokens` rows.

    Of width `dim`: both LayerNorms' inputs and outputs, queries, keys, values, attention's output; of width `hidden`:
    GELU's input and output. With recomputation each block's two inputs, and all of the block being recomputed.
    """
    hidden = int(dim * ratio)

    def block(rows: int) -> int:
        return tokens * 4 * dim + rows * (4 * dim + 2 * hidden)

    norm = 2 * used * dim
    if recompute:
        return depth * 2 * tokens * dim + block(tokens) + norm
    return (depth - 1) * block(tokens) + block(used) + norm


def activations(config: Config, packed: PackedBatch) -> int:
    """Bytes that an I-JEPA step keeps for its backward pass on one micro-batch: context encoder, predictor, loss."""
    model, size = config.model, 2 if config.engine.precision == "bf16" else 4
    context = packed.context_index.numel()
    rows = packed.targets * packed.contexts * packed.images * packed.target_size
    narrow = packed.targets * context + rows
    stacks = stack_values(model.dim, model.depth, model.mlp_ratio, context, context, model.recompute)
    stacks += stack_values(model.predictor_dim, model.predictor_depth, 4.0, narrow, rows, model.recompute)
    width = -(-3 * model.patch**2 // 8) * 8
    patches = packed.images * packed.patches * width + context * width  # all patches, and the embedding's input
    predictions = 2 * rows * model.dim  # and their gradient
    return size * (stacks + patches + predictions)


@dataclass(frozen=True)
class Plan:
    """What `make` finds: bytes by (stage, ranks), and the run's work."""

    memory: dict[tuple[int, int], Memory]
    parameters: tuple[int, int]
    images: int  # of an epoch
    steps: int
    gflop_per_image: float
    tokens_per_image: dict[int, float]  # by number of ranks: `truncate` keeps fewer in a larger batch
    hours: dict[float, float]  # of one GPU, by utilisation


def make(config: Config, images: int | None = None, gpu: str = "H200", ranks: tuple[int, ...] = (1, 2, 8)) -> Plan:
    """The plan of a run over `images` an epoch (None: as many as the embedded data set, or ImageNet-1k, has).

    Numbers of ranks that do not divide the batch are left out. Raises ConfigError for a GPU that is not in flops.PEAKS,
    a batch that no number of ranks divides, and objectives other than I-JEPA.
    """
    if gpu not in PEAKS:
        raise ConfigError(f"--gpu: expected one of {', '.join(PEAKS)}, got {gpu}")
    if config.objective.method != "ijepa":
        raise ConfigError(
            f"objective.method={config.objective.method}: --plan knows the activations of ijepa only; plan that method"
        )
    images = images or (config.data.scenes if config.data.source == "scenes" else SYNTHETIC_IMAGES)
    fitting = [n for n in ranks if config.batch_size % (n * config.engine.accumulation) == 0]
    if not fitting:
        raise ConfigError(
            f"--ranks: batch_size={config.batch_size} is divided by none of {', '.join(map(str, ranks))} x "
            f"engine.accumulation={config.engine.accumulation}; name others, or change batch_size"
        )
    sizes, table, tokens, flop = parameters(config), {}, {}, 0.0
    for n in fitting:
        draw = build_masks(config, torch.device("cpu"), 0, n)
        batches = [draw(i) for i in range(DRAWS)]
        kept = max(activations(config, batch) for batch in batches)
        tokens[n] = float(np.mean([batch.tokens / batch.images for batch in batches]))
        flop = float(np.mean([method_of(config).work(config, batch).total / batch.images for batch in batches]))
        table |= {(stage, n): memory(config, sizes, stage, n, kept) for stage in STAGES}
    steps = config.optim.epochs * (images // config.batch_size)
    steps = steps if config.optim.steps is None else min(steps, config.optim.steps)
    seconds = flop * config.batch_size * steps / PEAKS[gpu]
    hours = {share: seconds / share / 3600 for share in UTILISATIONS}
    return Plan(table, sizes, images, steps, flop / 1e9, tokens, hours)


def report(config: Config, plan: Plan, gpu: str) -> str:
    """The plan as Markdown."""
    encoder, other = plan.parameters
    names = list(Memory.__dataclass_fields__)
    lines = [
        f"{config.name}: predictions, nothing was measured",
        f"{encoder / 1e6:.1f} M parameters in the encoder, {other / 1e6:.1f} M in the predictor; "
        f"{config.engine.precision}, batch {config.batch_size} in {config.engine.accumulation} micro-batch(es)",
        "",
        f"Bytes a rank, GB (recomputation {'on' if config.model.recompute else 'off'}):",
        "| ZeRO | ranks | " + " | ".join(names) + " | total |",
        "|" + "---|" * (len(names) + 3),
    ]
    for (stage, ranks), bytes_ in sorted(plan.memory.items(), key=lambda item: item[0][::-1]):
        cells = [f"{value / 1e9:.2f}" for value in (*vars(bytes_).values(), bytes_.total)]
        lines.append(f"| {stage} | {ranks} | " + " | ".join(cells) + " |")
    lines += [
        "",
        f"{plan.images} images an epoch, {plan.steps} steps; tokens an image by number of ranks: "
        + ", ".join(f"{n}: {count:.0f}" for n, count in plan.tokens_per_image.items()),
        f"{plan.gflop_per_image:.1f} GFLOP an image at {max(plan.tokens_per_image)} ranks, "
        f"{plan.gflop_per_image * 1e9 * config.batch_size * plan.steps / 1e18:.4g} EFLOP in all",
        "",
        f"| share of the {gpu}'s dense bf16 peak | hours on one {gpu} | hours on eight |",
        "|---|---|---|",
    ]
    lines += [f"| {share:.0%} | {hours:.4g} | {hours / 8:.4g} |" for share, hours in plan.hours.items()]
    return "\n".join(lines)
