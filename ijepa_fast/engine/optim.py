"""AdamW whose state holds the exponential moving average (EMA) of the weights, of I-JEPA's target encoder say.

As a state of the optimiser the EMA lives on the same fp32 partition as the moments, so ZeRO shards it with them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import product
from typing import Any

import torch
from torch import nn

from ijepa_fast.kernels.adamw_ema import adamw_ema_groups_, adamw_ema_multi_, step_scalars

# Number of the group, fp32 weights, their gradient, and where else the new weights are written.
Update = tuple[int, torch.Tensor, torch.Tensor, torch.Tensor | None]
STATES = ("exp_avg", "exp_avg_sq", "ema")


class AdamWEMA(torch.optim.Optimizer):
    """torch.optim.AdamW, then ema = momentum * ema + (1 - momentum) * weight, in one pass over memory.

    The EMA of a group is kept where the group sets `ema=True`; it starts as the weight before the first step, or as
    what `tie` gives.

    Args:
        params: parameters or groups of them.
        lr: learning rate; weight_decay: decoupled; betas, eps: Adam's; momentum: of the EMA.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.996,
        ema: bool = False,
    ):
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, momentum=momentum, ema=ema, clip=True)
        super().__init__(params, defaults)
        self._copies: dict[torch.Tensor, torch.Tensor] = {}
        self.clip: Callable[[list[torch.Tensor]], object] | None = None  # of the gradients of a group's parameters
        self._scalars: torch.Tensor | None = None  # (groups, 9), on the device
        self.squares: torch.Tensor | None = None  # where set, a fp64 scalar: `step` adds the gradients' squares to it

    def tie(self, param: torch.Tensor, target: torch.Tensor) -> None:
        """Let `target`, of `param`'s shape, hold its EMA from now on, starting as it is.

        In fp32 `target` is the state itself; in bf16 every step writes a copy into it, in the same pass.
        """
        state = self.init_state(param, ema=False)
        state["ema"] = target.detach() if target.dtype == torch.float32 else target.detach().float()
        if target.dtype != torch.float32:
            self._copies[param] = target.detach()

    @torch.no_grad()
    def refresh_copies(self) -> None:
        """Write the EMA into the bf16 targets again, after the state was loaded."""
        for param, copy in self._copies.items():
            copy.copy_(self.state[param]["ema"])

    def init_state(self, param: torch.Tensor, ema: bool) -> dict:
        """The state of `param`; made if there is none: step 0, zero moments, the EMA equal to the weight."""
        state = self.state[param]
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(param, dtype=torch.float32)
            state["exp_avg_sq"] = torch.zeros_like(param, dtype=torch.float32)
        if ema and "ema" not in state:
            state["ema"] = param.detach().to(torch.float32, copy=True)
        return state

    @torch.no_grad()
    def advance(self, updates: Sequence[Update]) -> None:
        """Count a step of the parameters of `updates`, and bring its numbers to the device for `apply`."""
        steps = {}
        for number, param, _, _ in updates:
            state = self.init_state(param, self.param_groups[number]["ema"])
            state["step"] += 1
            steps[number] = state["step"]
        rows = [
            step_scalars(
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                step=steps[number],
                momentum=group["momentum"],
            )
            for number, group in enumerate(self.param_groups)
        ]
        host, device = torch.stack(rows), updates[0][1].device
        if self._scalars is None:
            self._scalars = host.to(device, copy=True)
        self._scalars.copy_(host.pin_memory() if device.type == "cuda" else host, non_blocking=True)

    @torch.no_grad()
    def apply(self, updates: Sequence[Update]) -> None:
        """The step that `advance` counted, from gradients where they lie; a CUDA graph may hold it.

        Parameters with an EMA come first; all or none have a copy to write.
        """
        numbers, params, gradients, copies = zip(*updates, strict=True)
        states = [self.state[param] for param in params]
        averaged = [param for param, state in zip(params, states, strict=True) if "ema" in state]
        assert self._scalars is not None
        adamw_ema_groups_(
            params,
            gradients,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [self.state[param]["ema"] for param in averaged],
            self._scalars,
            numbers,
            [copy for copy in copies if copy is not None],
            [self._copies[param] for param in averaged if param in self._copies],
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient."""
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            states = [self.init_state(p, group["ema"]) for p in params]
            if not params:
                continue
            if self.squares is not None:
                norms = torch._foreach_norm([p.grad for p in params], dtype=torch.float32)
                self.squares += torch.stack(norms).double().square().sum()
            if self.clip is not None and group["clip"]:
                self.clip(params)
            for state in states:
                state["step"] += 1
            adamw_ema_multi_(
                params,
                [p.grad for p in params],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [state["ema"] for state in states] if group["ema"] else None,
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                step=states[0]["step"],
                momentum=group["momentum"],
                ema_out=[self._copies[p] for p in params] if params[0] in self._copies else None,
            )
        return loss


def parameter_groups(
    trained: dict[str, nn.Module],
    averaged: Collection[str] = (),
    undecayed: Collection[str] = (),
    unclipped: Collection[str] = (),
) -> list[dict]:
    """Groups as published: biases and 1-D tensors are not decayed. Only networks named in `averaged` have an EMA.

    trained: the networks by name. undecayed: names of other parameters that are not decayed. unclipped: of those whose
    gradients are not clipped.
    Each group has `params`, `names` ("<network>.<parameter>"), `ema`, `decay` and `clip` (whether weight decay and
    clipping apply).
    """
    groups = []
    for ema in (True, False):
        networks = {name: network for name, network in trained.items() if (name in averaged) is ema}
        named = [(f"{name}.{key}", p) for name, network in networks.items() for key, p in network.named_parameters()]
        for decay, clip in product((True, False), (True, False)):
            chosen = [(n, p) for n, p in named if (decays(n, p, undecayed), n not in unclipped) == (decay, clip)]
            if chosen:
                names, params = zip(*chosen)
                groups.append({"params": list(params), "names": list(names), "ema": ema, "decay": decay, "clip": clip})
    return groups


def decays(name: str, param: torch.Tensor, undecayed: Collection[str] = ()) -> bool:
    """Whether weight decay applies to the parameter `name`; see `parameter_groups`."""
    return param.ndim > 1 and not name.endswith("bias") and name not in undecayed
