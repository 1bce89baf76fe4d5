"""The one place that knows DeepSpeed: start it, run a step on it, keep the averages of the networks."""

from __future__ import annotations

import datetime
import logging
import os
import socket
import sys
from typing import Any

import torch

from ijepa_fast import config
from ijepa_fast.config import ConfigError
from ijepa_fast.cores import threads
from ijepa_fast.engine.clipping import ClipEach, ClipTogether
from ijepa_fast.engine.graphs import CUDARecorder, Recorder
from ijepa_fast.engine.interface import facing
from ijepa_fast.engine.optim import AdamWEMA, parameter_groups
from ijepa_fast.engine.partitions import LAYOUTS, Sharded
from ijepa_fast.engine.update import GraphStep
from ijepa_fast.kernels.common.dispatch import choice
from ijepa_fast.kernels.common.memory import keep_freed_memory
from ijepa_fast.kernels.common.over_ranks import ranks
from ijepa_fast.kernels.varlen_attention import measure_dense_attention
from ijepa_fast.kernels.varlen_attention.dense import FASTEST
from ijepa_fast.methods.method import Method
from ijepa_fast.models.blocks import compile_blocks
from ijepa_fast.models.fp8 import seconds_of

# Buckets are allocated in every step, and on a CPU there is nobody to send them to.
CPU_BUCKET = 8_000_000
RENDEZVOUS = 600  # seconds, at least, for all ranks to start
AFTER = 60  # seconds that NCCL waits longer than the host, which can say what is wrong; NCCL aborts the process
FP8 = (8, 9)  # compute capability of the first GPUs with fp8
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def choose_device(wanted: str) -> torch.device:
    """The rank's device by `engine.device`. Raises ConfigError for a GPU that is not there."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "engine.device=cuda: torch sees no CUDA device; set engine.device=cpu or install a CUDA torch"
        )
    if wanted == "cpu" or not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        return torch.device("cpu")
    device, there = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))), torch.cuda.device_count()
    if device.index >= there:
        error = ConfigError(
            f"local rank {device.index} has no GPU: torch sees {there}; start at most {there} ranks here"
        )
        vars(error)["of_this_rank"] = True
        raise error
    torch.cuda.set_device(device)
    return device


def start(device: torch.device, timeout: int, store: Any = None) -> tuple[int, int]:
    """Join the other ranks, or be the only one where no launcher started us. Returns (rank, number of ranks).

    timeout: seconds after which a silent rank ends the run. store: where the ranks have met; None: as the environment
    says.
    """
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if "RANK" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in alone.items()})
    # A shared-memory all-reduce for the CPU, compiled on first use: half a minute and a compiler for nothing here.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "nccl" if device.type == "cuda" else "gloo"
    bound = datetime.timedelta(seconds=max(timeout, RENDEZVOUS))
    if store is not None:
        if interface := facing(os.environ["MASTER_ADDR"]):
            os.environ["GLOO_SOCKET_IFNAME"] = interface
        place, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        own = device if device.type == "cuda" else None
        # All ranks are there: they connect within `timeout`, and may then take their time to list images.
        within = datetime.timedelta(seconds=min(timeout, RENDEZVOUS))
        torch.distributed.init_process_group(
            backend, timeout=within, store=store, rank=place, world_size=size, device_id=own
        )
        _bound_waits(max(timeout, RENDEZVOUS))
    try:
        deepspeed.init_distributed(dist_backend=backend, timeout=bound, auto_mpi_discovery=False)
    except RuntimeError as error:
        raise port_in_use(error) or error from None
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    if device.type == "cpu":
        local = int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
        torch.set_num_threads(threads(local))
        keep_freed_memory()
    return rank, ranks


def leave(all_end: bool) -> None:
    """Give the connections to the other ranks back before this process ends; their threads might abort it later.

    all_end: whether every rank ends now. Where one of several has failed, the others may still wait for it, and it does
    not wait for them.
    """
    if torch.distributed.is_initialized() and (all_end or torch.distributed.get_world_size() == 1):
        torch.distributed.destroy_process_group()


def port_in_use(error: RuntimeError) -> ConfigError | None:
    """What to say of an error that means that another program has the port where the ranks meet; None of others."""
    if "EADDRINUSE" not in str(error) and "already in use" not in str(error):
        return None
    return ConfigError(
        f"MASTER_PORT={os.environ['MASTER_PORT']}: another program has this port; start with another one "
        f"(deepspeed --master_port, torchrun --master-port), or with train --ranks, which finds a free one"
    )


class Engine:
    """A method on DeepSpeed.

    Args:
        method: in fp32 on the CPU; moved and cast here, its averages with it.
        settings: the section `engine`.
        optim: the section `optim`.
        micro_batch: images of a micro-batch of one rank.
        device: of this rank.
        recorder: what captures graphs; tests give an emulation.

    Raises ConfigError for engine.cuda_graphs=on where there can be none.
    """

    def __init__(
        self,
        method: Method,
        settings: config.Engine,
        optim: config.Optim,
        micro_batch: int,
        device: torch.device,
        recorder: Recorder | None = None,
    ):
        import deepspeed

        self.method, self.device, self._clips = method, device, optim.clip > 0
        dtype = DTYPES[settings.precision]
        # Kept in fp32: DeepSpeed casts the modules' own tables.
        tables = {name: dict(network.named_buffers()).get("positions") for name, network in method.networks.items()}
        self.positions = {name: table.clone() for name, table in tables.items() if table is not None}
        for network in [*method.averaged.values(), *method.frozen.values()]:
            network.to(device, dtype)
        for name, tensor in method.carried.items():
            method.carried[name] = tensor.to(device)
        if settings.target_stream and device.type == "cuda":
            method.target_stream = torch.cuda.Stream(device)
        if device.type == "cuda":
            measure_target(method, micro_batch, dtype, device)
        # ZeRO 3 gathers weights in hooks that a compiled block cannot hold.
        if settings.compile or (settings.compile is None and device.type == "cuda" and settings.zero < 3):
            compile_blocks(*method.networks.values(), *method.frozen.values())
        groups = parameter_groups(method.trained, method.averaged, method.undecayed, method.unclipped)
        self.optimizer = AdamWEMA(
            [{name: group[name] for name in ("params", "ema", "decay", "clip")} for group in groups],
            betas=(optim.betas[0], optim.betas[1]),
            eps=optim.eps,
        )
        self.shapes = {
            name: tuple(param.shape)
            for group in groups
            for name, param in zip(group["names"], group["params"], strict=True)
        }
        each = optim.clip > 0 and optim.clip_by == "parameter"
        ours = each or (optim.clip > 0 and bool(method.unclipped))
        self._engine, *_ = deepspeed.initialize(
            model=method,
            optimizer=self.optimizer,
            config=deepspeed_config(settings, 0 if ours else optim.clip, micro_batch, device),
        )
        _bound_waits(settings.timeout + (AFTER if device.type == "cuda" else 0))
        # DeepSpeed's bf16 stage 0 takes a step with zero gradients to make the state, which would count as the first.
        self.optimizer.state.clear()
        self.layout = LAYOUTS[settings.zero](self._engine, self.optimizer, groups)
        if each:
            held = self.layout.partitions, self.layout.replicated
            self.optimizer.clip = ClipEach(*held, optim.clip, list(self.shapes))
        elif ours:
            self.optimizer.clip = ClipTogether(self.layout.replicated, optim.clip, self.layout.clipped)
        averages = method.averaged.items()
        self.layout.tie({f"{name}.{key}": p for name, network in averages for key, p in network.named_parameters()})
        fp8 = settings.target_precision == "fp8" and has_fp8(device) and fp8_gains(method, micro_batch, device)
        if fp8:
            method.use_fp8()
        self._graphs: GraphStep | None = None
        possible = device if recorder is None else torch.device("cuda")
        if wants_graphs(method, settings, optim, possible) and not isinstance(self.layout, Sharded):
            method.use_graphs()
            recorder = recorder or CUDARecorder(device)
            parts = (method, self.optimizer, self.layout, settings.accumulation)
            self._graphs = GraphStep(*parts, _say_of_rank, recorder, fp8)

    def backward(self, images: Any, draw: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss of a micro-batch and its terms (scalars, on the device, detached); its gradient is accumulated."""
        if self._graphs is not None:
            return self._graphs.backward(images, draw)
        result = self._engine(images, draw)
        if not (isinstance(result, tuple) and len(result) == 2):
            kind = type(self.method).__name__
            raise ConfigError(f"{kind}.forward: expected (loss, its terms by name), got {type(result).__name__}")
        loss, terms = result
        self._engine.backward(loss)
        return loss.detach(), terms

    def step(self, lr: float, weight_decay: float, ema: float, norm: bool = False) -> None:
        """Called after every micro-batch: at the last one of the step, update weights and averages.

        norm: whether to take the gradient's norm too, a pass over it: see `gradient_squares`.
        """
        graphs = self._graphs
        update = self._engine.is_gradient_accumulation_boundary() if graphs is None else graphs.at_boundary
        if update:
            self.optimizer.squares = torch.zeros((), dtype=torch.float64, device=self.device) if norm else None
            for group in self.optimizer.param_groups:
                group["lr"], group["momentum"] = lr, ema
                group["weight_decay"] = weight_decay if group["decay"] else 0.0
            if isinstance(self.optimizer.clip, ClipTogether):
                self.optimizer.clip.begin()
        if graphs is None:
            self._engine.step()
            if update:
                self._gather()
        elif update:
            graphs.step()

    def graphs(self) -> dict[str, float] | None:
        """For the log: share of the micro-steps since the last call that were replayed, shapes captured, GB held.

        None without CUDA graphs.
        """
        return None if self._graphs is None else self._graphs.graphs.record()

    def gradient_squares(self) -> torch.Tensor | None:
        """This rank's part of the squared gradient norm of the last step; None where none was taken.

        A fp64 scalar on the device; the sum over ranks is the square of the norm: before clipping, but in
        fp32 at ZeRO 0, where DeepSpeed does not tell it.
        """
        if self.optimizer.squares is None:
            return None
        ranks = torch.distributed.get_world_size()
        whole = self._engine.get_global_grad_norm() if self._clips else None  # the optimiser saw it clipped
        if whole is not None:
            return torch.as_tensor(whole, dtype=torch.float64, device=self.device).square() / ranks
        return self.optimizer.squares / (ranks if self.layout.replicated else 1)

    @property
    def skipped(self) -> int:
        """Steps since the start that DeepSpeed skipped, as their gradient was not finite: in bf16 at ZeRO 0, at ZeRO 3.

        At ZeRO 1 and 2, and in fp32 at ZeRO 0, it does not look: there the weights are not finite afterwards.
        """
        return self._engine.skipped_steps

    def health(self) -> torch.Tensor:
        """0 where this rank's fp32 weights and second moments are finite, NaN where not; a scalar, on the device.

        A gradient that was not finite leaves its mark there for good, so that no step has to look at its own.
        """
        masters = [partition.master for partition in self.layout.partitions]
        held = [master.detach() for master in masters]
        held += [self.optimizer.state[master]["exp_avg_sq"] for master in masters if self.optimizer.state[master]]
        return torch.stack(torch._foreach_norm(held, 1)).double().sum() * 0

    def place(self, positions: dict[str, torch.Tensor]) -> None:
        """Use other position tables than the fixed ones: {network: (N, width)}."""
        for name, table in positions.items():
            self.positions[name].copy_(table)
            self.method.networks[name].get_buffer("positions").copy_(table)

    def restored(self) -> None:
        """Called when masters and optimiser state were overwritten: bring them into all networks."""
        self.optimizer.refresh_copies()
        self.layout.publish()
        self._gather()
        self.method.resumed()

    def _gather(self) -> None:
        """Bring the EMA into the averages, and tell the method, which may keep something made from them."""
        self.layout.gather()
        self.method.average_changed()


def wants_graphs(method: Method, settings: config.Engine, optim: config.Optim, device: torch.device) -> bool:
    """Whether a run takes CUDA graphs. Raises ConfigError, with the reason, for `on` where there can be none."""
    if settings.cuda_graphs == "off":
        return False
    name = type(method).__module__.rpartition(".")[2]
    reasons = {
        f"they need a CUDA device, and training is on {device.type}": device.type != "cuda",
        f"objective.method={name} does not declare them": "graphs" not in method.capabilities,
        "the ranks exchange statistics within a step": method.exchanges and ranks() > 1,
        "engine.zero=3 moves the weights in every step; set engine.zero to at most 2": settings.zero == 3,
        "optim.clip needs the gradient's norm in every step; set optim.clip=0": optim.clip > 0,
        "without mask.padding few shapes come again; set mask.padding=true": method.reads_mask
        and not method.setup.mask.padding,
    }
    reason = next((reason for reason, holds in reasons.items() if holds), None)
    if reason and settings.cuda_graphs == "on":
        raise ConfigError(f"engine.cuda_graphs=on: {reason}, or set engine.cuda_graphs=auto")
    return reason is None


def has_fp8(device: torch.device) -> bool:
    """Whether the device multiplies fp8; says so where not. A CPU does it by way of fp32, for tests."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) >= FP8:
        return True
    if torch.distributed.get_rank() == 0:
        print(
            f"engine.target_precision=fp8: {torch.cuda.get_device_name(device)} has no fp8; the target encoder runs in "
            f"engine.precision",
            file=sys.stderr,
        )
    return False


def fp8_gains(method: Method, images: int, device: torch.device) -> bool:
    """Whether a block of the averaged encoder is faster in fp8 at `images` whole images; says so where not.

    All ranks go by the first one's measurement: the target encoder is the same on all. On a CPU, which has no fp8, yes.
    """
    encoder = target_encoder(method)
    if encoder is None or device.type != "cuda":
        return True
    plain, fp8 = seconds_of(encoder.blocks[0], images, encoder.patches + (encoder.cls_token is not None))
    gains = torch.tensor(fp8 < plain, dtype=torch.int32, device=device)
    torch.distributed.broadcast(gains, 0)
    if torch.distributed.get_rank() == 0:
        taken = "it runs in fp8" if fp8 < plain else "it runs in engine.precision, which is faster"
        print(
            f"engine.target_precision=fp8: a block of the target encoder takes {1e3 * fp8:.2f} ms in fp8 and "
            f"{1e3 * plain:.2f} ms without; {taken}",
            file=sys.stderr,
        )
    return bool(gains)


def target_encoder(method: Method) -> Any:
    """The encoder that makes the targets: averaged or frozen; None where there is none."""
    return next(
        (each for each in [*method.averaged.values(), *method.frozen.values()] if hasattr(each, "blocks")), None
    )


def measure_target(method: Method, images: int, dtype: torch.dtype, device: torch.device) -> None:
    """Let the target encoder attend by the fastest backend at `images` whole images, and say which that is."""
    encoder = target_encoder(method)
    if encoder is None or choice("varlen_attention") != "auto":
        return
    heads = encoder.blocks[0].attn.heads
    tokens = encoder.patches + (encoder.cls_token is not None)
    found = measure_dense_attention(images, tokens, heads, encoder.dim // heads, dtype, device)
    if torch.distributed.get_rank() == 0:
        taken = FASTEST[heads, encoder.dim // heads]
        print(
            f"target attention: {taken}; " + ", ".join(f"{name} {1e3 * s:.2f} ms" for name, s in found.items()),
            file=sys.stderr,
        )


def _say_of_rank(text: str) -> None:
    print(f"rank {torch.distributed.get_rank()}: {text}", file=sys.stderr)


def _bound_waits(seconds: int) -> None:
    """Let no process group, DeepSpeed's own among them, wait longer for a rank."""
    c10d = torch.distributed.distributed_c10d
    for group in list(c10d._world.pg_map):
        c10d._set_pg_timeout(datetime.timedelta(seconds=seconds), group)


def deepspeed_config(settings: config.Engine, clip: float, micro_batch: int, device: torch.device) -> dict:
    """What DeepSpeed is told. bf16 keeps fp32 masters, and nothing is scaled.

    DeepSpeed looks at no gradient where that can be turned off, which costs a pass over it and a wait for the device in
    every step, and skips a step in silence: Engine.health tells. Its norm is computed only to be clipped.
    """
    on_gpu = device.type == "cuda"
    bucket = settings.bucket if on_gpu else min(settings.bucket, CPU_BUCKET)
    return {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": settings.accumulation,
        "gradient_clipping": clip,
        "bf16": {"enabled": settings.precision == "bf16", "check_grad_overflow": False},
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": settings.zero,
            "compute_grad_norm": settings.zero not in (1, 2) or clip > 0,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            "overlap_comm": settings.zero > 0 and on_gpu,
            "contiguous_gradients": True,
        },
        "steps_per_print": 1 << 60,
    }
