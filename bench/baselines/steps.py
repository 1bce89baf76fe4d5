"""This project's own training step, as bench/throughput.py times it: bare, and through DeepSpeed."""

from __future__ import annotations

import torch

from bench.baselines.case import Case
from ijepa_fast.engine.graphs import Graphs
from ijepa_fast.engine.optim import parameter_groups
from ijepa_fast.kernels.adamw_ema import adamw_ema_multi_
from ijepa_fast.models.vit import compile_blocks

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class BareStep:
    """This project's step without DeepSpeed: objective, and AdamW with EMA in one pass.

    Below fp32 the optimiser updates fp32 masters of weights and average, and writes both low-precision copies.
    """

    def __init__(self, objective, case: Case, betas=(0.9, 0.999), average=True, compile=False, fp8=False, graphs=False):
        self.device, self.objective, self.betas, self.steps = torch.device(case.device), objective, betas, 0
        dtype = DTYPES[case.precision]
        objective.to(self.device, dtype)
        objective.target_encoder.to(self.device, dtype)
        targets = {f"encoder.{name}": p for name, p in objective.target_encoder.named_parameters()}
        self.groups = []
        for group in parameter_groups(objective.encoder, [objective.predictor]):
            params = [p.data for p in group["params"]]
            averages = [targets[name].data for name in group["names"]] if group["ema"] and average else None
            masters = params if dtype == torch.float32 else [p.float() for p in params]
            states = {
                "params": masters,
                "exp_avgs": [torch.zeros_like(p) for p in masters],
                "exp_avg_sqs": [torch.zeros_like(p) for p in masters],
                "emas": averages,
            }
            if dtype != torch.float32:
                states["param_out"] = params
                if averages is not None:
                    states |= {"emas": [p.float() for p in averages], "ema_out": averages}
            self.groups.append((group["params"], group["decay"], states))
        if compile:
            compile_blocks(objective, objective.target_encoder)
        if fp8:
            objective.use_fp8_targets()
        if graphs:
            objective.forward = Graphs(objective)

    def __call__(self, batch, lr, weight_decay=0.04, momentum=0.996) -> torch.Tensor:
        """One step on `batch`, the objective's arguments in host memory -> the loss, on the device."""
        loss = self.loss(batch)
        loss.backward()
        self.update(lr, weight_decay, momentum)
        return loss.detach()

    def update(self, lr, weight_decay=0.04, momentum=0.996) -> None:
        """Weights, averages and low-precision copies from the gradients, which are dropped."""
        self.steps += 1
        for params, decay, states in self.groups:
            adamw_ema_multi_(
                grads=[p.grad for p in params],
                **states,
                lr=lr,
                beta1=self.betas[0],
                beta2=self.betas[1],
                eps=1e-8,
                weight_decay=weight_decay if decay else 0.0,
                step=self.steps,
                momentum=momentum,
            )
            for p in params:
                p.grad = None
        if hasattr(self.objective, "target_changed"):
            self.objective.target_changed()

    def loss(self, batch) -> torch.Tensor:
        """The loss of `batch`."""
        return self.objective(*(_move(x, self.device) for x in batch))


class EngineStep:
    """This project's step through DeepSpeed, as train.py runs it."""

    def __init__(self, objective, case: Case, zero: int, fp8=False, graphs=False):
        # These need OmegaConf and DeepSpeed; the other steps do not.
        from ijepa_fast.config import Config, Data, Model, check
        from ijepa_fast.config import Engine as EngineConfig
        from ijepa_fast.engine.engine import Engine, start

        sizes, predictor = case.sizes, case.predictor_sizes
        names = ("dim", "depth", "heads", "mlp_ratio", "patch")
        narrow = {"predictor_dim": predictor["dim"], "predictor_depth": predictor["depth"]}
        model = Model(**{name: sizes[name] for name in names}, **narrow)
        settings = EngineConfig(device=torch.device(case.device).type, precision=case.precision, zero=zero)
        settings.cuda_graphs, settings.target_precision = graphs, "fp8" if fp8 else None
        data = Data(source="synthetic", crop=sizes["image_size"])
        config = Config(name="throughput", batch_size=case.batch, data=data, model=model, engine=settings)
        check(config)
        self.device, self.objective = torch.device(case.device), objective
        if not torch.distributed.is_initialized():
            threads = torch.get_num_threads()
            start(config, self.device)
            torch.set_num_threads(threads)
        self.engine = Engine(config, objective, self.device)

    def __call__(self, batch, lr, weight_decay=0.04, momentum=0.996) -> torch.Tensor:
        """One step on `batch`, the objective's arguments in host memory -> the loss, on the device."""
        loss = self.engine.backward(*(x.to(self.device, non_blocking=True) for x in batch))
        self.engine.step(lr, weight_decay, momentum)
        return loss

    loss = BareStep.loss


def _move(value, device: torch.device):
    """`value`, or every tensor of a list of them, on `device`."""
    if isinstance(value, list):
        return [_move(x, device) for x in value]
    return value.to(device, non_blocking=True)
