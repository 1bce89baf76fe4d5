"""This project's own training step, as bench/throughput.py times it: bare, and through DeepSpeed."""

from __future__ import annotations

import torch

from bench.baselines.case import Case
from ijepa_fast import config
from ijepa_fast.engine.engine import DTYPES, Engine, start
from ijepa_fast.engine.graphs import CUDARecorder, Graphs
from ijepa_fast.engine.optim import parameter_groups
from ijepa_fast.kernels.adamw_ema import adamw_ema_multi_
from ijepa_fast.methods.method import Method
from ijepa_fast.models.blocks import compile_blocks


class BareStep:
    """This project's step without DeepSpeed: a method, and AdamW with EMA in one pass.

    Below fp32 the optimiser updates fp32 masters of weights and averages, and writes both low-precision copies.
    """

    def __init__(self, method: Method, case: Case, betas=(0.9, 0.999), compile=False, fp8=False, graphs=False):
        self.device, self.method, self.betas, self.steps = torch.device(case.device), method, betas, 0
        dtype = DTYPES[case.precision]
        for network in method.networks.values():
            network.to(self.device, dtype)
        method.carried = {name: tensor.to(self.device) for name, tensor in method.carried.items()}
        targets = {f"{name}.{k}": p for name, network in method.averaged.items() for k, p in network.named_parameters()}
        self.groups = []
        for group in parameter_groups(method.trained, method.averaged):
            params = [p.data for p in group["params"]]
            averages = [targets[name].data for name in group["names"]] if group["ema"] else None
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
            compile_blocks(*method.networks.values())
        if fp8:
            method.use_fp8()
        self.graphs, self.said = None, []  # why there are no graphs after all
        if graphs:
            params = [p for p in method.parameters() if p.requires_grad]
            for p in params:
                p.grad = torch.zeros_like(p)
            recorder = CUDARecorder(self.device)
            self.graphs = Graphs(method, [p.grad for p in params], 1.0, self.said.append, recorder)

    def __call__(self, batch, lr, weight_decay=0.04, momentum=0.996) -> torch.Tensor:
        """One step on `batch`, the method's arguments in host memory -> the loss, on the device."""
        if self.graphs is None:
            loss = self.loss(batch)
            loss.backward()
        else:
            loss, _ = self.graphs(*(_move(x, self.device) for x in batch))
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
            for p in params if self.graphs is None else ():
                p.grad = None
        self.method.average_changed()

    def loss(self, batch) -> torch.Tensor:
        """The loss of `batch`."""
        return self.method(*(_move(x, self.device) for x in batch))[0]


class EngineStep:
    """This project's step through DeepSpeed, as train.py runs it."""

    def __init__(self, method: Method, case: Case, zero: int, fp8=False, graphs=False):
        settings = config.Engine(device=torch.device(case.device).type, precision=case.precision, zero=zero)
        settings.cuda_graphs, settings.target_precision = "on" if graphs else "off", "fp8" if fp8 else None
        self.device, self.method = torch.device(case.device), method
        if not torch.distributed.is_initialized():
            threads = torch.get_num_threads()
            start(self.device, settings.timeout)
            torch.set_num_threads(threads)
        self.engine = Engine(method, settings, config.Optim(), case.batch, self.device)

    def __call__(self, batch, lr, weight_decay=0.04, momentum=0.996) -> torch.Tensor:
        """One step on `batch`, the method's arguments in host memory -> the loss, on the device."""
        loss, _ = self.engine.backward(*(_move(x, self.device) for x in batch))
        self.engine.step(lr, weight_decay, momentum)
        return loss

    loss = BareStep.loss


def _move(value, device: torch.device):
    """`value`, or every tensor of a list of them, on `device`."""
    if isinstance(value, list):
        return [_move(x, device) for x in value]
    return value.to(device, non_blocking=True)
