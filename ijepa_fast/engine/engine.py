"""The one place that knows DeepSpeed: start it, run a step on it, keep the target encoder the encoder's average."""

from __future__ import annotations

import datetime
import logging
import os
import socket

import torch
from torch import nn

from ijepa_fast.config import Config, ConfigError
from ijepa_fast.engine.graphs import Graphs
from ijepa_fast.engine.optim import AdamWEMA, parameter_groups
from ijepa_fast.engine.partitions import LAYOUTS
from ijepa_fast.kernels.common.memory import keep_freed_memory
from ijepa_fast.models.vit import compile_blocks

NETWORKS = ("encoder", "predictor", "target_encoder")
# Buckets are allocated in every step; this many fp32 values are no more than keep_freed_memory can keep.
CPU_BUCKET = 8_000_000
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def choose_device(config: Config) -> torch.device:
    """The rank's device by `engine.device`. Raises ConfigError for a GPU that is not there."""
    wanted = config.engine.device
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "engine.device=cuda: torch sees no CUDA device; set engine.device=cpu or install a CUDA torch"
        )
    if wanted == "cpu" or not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    return device


def start(config: Config, device: torch.device) -> tuple[int, int]:
    """Join the other ranks, or be the only one where no launcher started us. Returns (rank, number of ranks)."""
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if "RANK" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({key: str(value) for key, value in alone.items()})
    # A shared-memory all-reduce for the CPU, compiled on first use: half a minute and a compiler for nothing here.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        dist_backend="nccl" if device.type == "cuda" else "gloo",
        timeout=datetime.timedelta(seconds=config.engine.timeout),
        auto_mpi_discovery=False,
    )
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    micro = config.engine.accumulation * ranks
    if config.batch_size % micro:
        raise ConfigError(
            f"batch_size={config.batch_size} is not divisible by {ranks} ranks x engine.accumulation="
            f"{config.engine.accumulation}; set batch_size to a multiple of {micro}"
        )
    if device.type == "cpu":
        local = int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local))
        keep_freed_memory()
    return rank, ranks


class Engine:
    """An objective on DeepSpeed.

    Args:
        objective: as build.method_of describes it, in fp32 on the CPU; moved and cast here, its target encoder with it.
        device: of this rank.
    """

    def __init__(self, config: Config, objective: nn.Module, device: torch.device):
        import deepspeed

        self.objective, self.device = objective, device
        self.accumulation = config.engine.accumulation
        dtype = DTYPES[config.engine.precision]
        # Kept in fp32: DeepSpeed casts the modules' own tables.
        networks = {name: getattr(objective, name) for name in NETWORKS}
        self.positions = {name: net.positions.clone() for name, net in networks.items() if hasattr(net, "positions")}
        objective.target_encoder.to(device, dtype)
        if config.engine.target_stream and device.type == "cuda":
            objective.target_stream = torch.cuda.Stream(device)
        compile_for(config, device, objective)
        groups = parameter_groups(objective.encoder, [objective.predictor])
        self.optimizer = AdamWEMA(
            [{key: group[key] for key in ("params", "ema", "decay")} for group in groups],
            betas=tuple(config.optim.betas),
            eps=config.optim.eps,
        )
        self.shapes = {
            name: tuple(param.shape)
            for group in groups
            for name, param in zip(group["names"], group["params"], strict=True)
        }
        settings = deepspeed_config(config, torch.distributed.get_world_size())
        self._engine, *_ = deepspeed.initialize(model=objective, optimizer=self.optimizer, config=settings)
        # DeepSpeed's bf16 stage 0 takes a step with zero gradients to make the state, which would count as the first.
        self.optimizer.state.clear()
        self.layout = LAYOUTS[config.engine.zero](self._engine, self.optimizer, groups)
        targets = {f"encoder.{name}": p for name, p in objective.target_encoder.named_parameters()}
        self.layout.tie(targets)
        if config.engine.target_precision == "fp8":
            objective.use_fp8_targets()
        if config.engine.cuda_graphs and device.type == "cuda":
            objective.forward = Graphs(objective)

    @property
    def carried(self) -> dict[str, torch.Tensor]:
        """What the objective moves beside its weights, by name, the same on all ranks (iBOT's centres)."""
        return getattr(self.objective, "carried", {})

    def backward(self, *batch) -> torch.Tensor:
        """Loss of one micro-batch (scalar, on the device, detached); its gradient is accumulated."""
        loss = self._engine(*batch)
        self._engine.backward(loss)
        return loss.detach()

    def step(self, lr: float, weight_decay: float, momentum: float) -> None:
        """Called after every micro-batch: at the last one of the step, update weights, EMA and target encoder."""
        update = self._engine.is_gradient_accumulation_boundary()
        if update:
            for group in self.optimizer.param_groups:
                group["lr"], group["momentum"] = lr, momentum
                group["weight_decay"] = weight_decay if group["decay"] else 0.0
        self._engine.step()
        if update:
            self._gather()

    def place(self, positions: dict[str, torch.Tensor]) -> None:
        """Use other position tables than the fixed ones: {network: (N, width)}."""
        for name, table in positions.items():
            self.positions[name].copy_(table)
            getattr(self.objective, name).positions.copy_(table)

    def restored(self) -> None:
        """Called when masters and optimiser state were overwritten: bring them into both encoders and the predictor."""
        self.optimizer.refresh_copies()
        self.layout.publish()
        self._gather()

    def _gather(self) -> None:
        """Bring the averages into the target encoder, and tell the objective that keeps something made from them."""
        self.layout.gather()
        if hasattr(self.objective, "target_changed"):
            self.objective.target_changed()


def compile_for(config: Config, device: torch.device, objective: nn.Module) -> None:
    """Compile the blocks of all three networks where `engine.compile` says so."""
    engine = config.engine
    if device.type == "cuda" and engine.zero < 3 if engine.compile is None else engine.compile:
        compile_blocks(objective.encoder, objective.predictor, objective.target_encoder)


def deepspeed_config(config: Config, ranks: int) -> dict:
    """What DeepSpeed is told. bf16 keeps fp32 masters; nothing is scaled or checked for overflow (see the loop)."""
    engine = config.engine
    on_gpu = torch.cuda.is_available() and engine.device != "cpu"
    bucket = engine.bucket if on_gpu else min(engine.bucket, CPU_BUCKET)
    return {
        "train_micro_batch_size_per_gpu": config.batch_size // (ranks * engine.accumulation),
        "gradient_accumulation_steps": engine.accumulation,
        "gradient_clipping": config.optim.clip,
        "bf16": {"enabled": engine.precision == "bf16"},
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": engine.zero,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            "overlap_comm": engine.zero > 0 and on_gpu,
            "contiguous_gradients": True,
        },
        "steps_per_print": 1 << 60,
    }
