"""adamw_ema: checks, dispatch and registration. csrc implements both schemas for the CPU, the second one for CUDA."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ijepa_fast.kernels.adamw_ema import cpu, reference
from ijepa_fast.kernels.adamw_ema.reference import step_scalars
from ijepa_fast.kernels.common import native
from ijepa_fast.kernels.common.checks import check_tensor
from ijepa_fast.kernels.common.dispatch import choice, runs_triton
from ijepa_fast.kernels.common.library import triton_launcher

_STATE = (torch.float32,)
_ANY = (torch.float32, torch.bfloat16)
_TENSORS = "Tensor(a!){0} param{1}, Tensor{0} grad{1}, Tensor(b!){0} exp_avg{1}, Tensor(c!){0} exp_avg_sq{1}, "


native.register(
    f"adamw_ema_({_TENSORS.format('', '')}"
    "Tensor(d!)? ema, Tensor scalars, Tensor(e!)? param_out, Tensor(f!)? ema_out) -> ()",
    cpu,
)
native.register(
    f"adamw_ema_multi_({_TENSORS.format('[]', 's')}"
    "Tensor(d!)[] emas, Tensor scalars, Tensor(e!)[] param_outs, Tensor(f!)[] ema_outs) -> ()",
    cpu,
)
native.register(
    f"adamw_ema_groups_({_TENSORS.format('[]', 's')}"
    "Tensor(d!)[] emas, Tensor scalars, int[] groups, Tensor(e!)[] param_outs, Tensor(f!)[] ema_outs) -> ()",
    cpu,
)


def adamw_ema_(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    ema: torch.Tensor | None,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    momentum: float,
    param_out: torch.Tensor | None = None,
    ema_out: torch.Tensor | None = None,
) -> None:
    """torch.optim.AdamW's update, then ema = momentum ema + (1 - momentum) param, in place, in one pass.

    Args:
        param: fp32, any shape, contiguous; so are exp_avg, exp_avg_sq and ema.
        grad: fp32 or bf16, of param's shape.
        exp_avg: first moment.
        exp_avg_sq: second moment.
        ema: the exponential moving average, or None for plain AdamW.
        lr: learning rate of this step.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled weight decay.
        step: the number of this step, from 1.
        momentum: of the EMA, at this step.
        param_out: fp32 or bf16, of param's shape: receives the new parameter.
        ema_out: fp32 or bf16, of param's shape: receives the new EMA.

    A CUDA graph replays with other hyperparameters if it captured `torch.ops.ijepa_fast.adamw_ema_`, whose `scalars`
    may lie on the device: copy `step_scalars(...)` into them before each replay.

    Raises:
        ValueError: for a wrong dtype, shape, device or layout, and a step below 1.
    """
    _check("", param, grad, exp_avg, exp_avg_sq, ema, param_out, ema_out)
    scalars = _scalars(lr, beta1, beta2, eps, weight_decay, step, momentum)
    _choose("adamw_ema_", param)(param, grad, exp_avg, exp_avg_sq, ema, scalars, param_out, ema_out)


def adamw_ema_multi_(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    exp_avgs: Sequence[torch.Tensor],
    exp_avg_sqs: Sequence[torch.Tensor],
    emas: Sequence[torch.Tensor] | None,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    momentum: float,
    param_out: Sequence[torch.Tensor | None] | None = None,
    ema_out: Sequence[torch.Tensor | None] | None = None,
) -> None:
    """`adamw_ema_` for each tensor of a list, all on one device, with the same hyperparameters.

    `param_out` and `ema_out` may be None for some of the parameters. Raises ValueError as adamw_ema_ does.
    """
    given: dict[str, Sequence[torch.Tensor | None] | None] = {"grads": grads, "exp_avgs": exp_avgs}
    given |= {"exp_avg_sqs": exp_avg_sqs, "emas": emas, "param_out": param_out, "ema_out": ema_out}
    columns: list[Sequence[torch.Tensor | None]] = []
    for name, tensors in given.items():
        if tensors is None and name in ("emas", "param_out", "ema_out"):
            tensors = [None] * len(params)
        if tensors is None or len(tensors) != len(params):
            count = tensors if tensors is None else len(tensors)
            raise ValueError(f"adamw_ema_multi_: {name}: expected {len(params)} tensors, got {count}")
        columns.append(tensors)
    scalars = _scalars(lr, beta1, beta2, eps, weight_decay, step, momentum)

    # One call of the op for all tensors that have the same optional ones, in the same dtypes: as a rule there is one.
    calls: dict[tuple, list] = {}
    for i, row in enumerate(zip(params, *columns)):
        param, *others = row
        _check(f"s[{i}]", param, *others)
        if param.device != params[0].device:
            raise ValueError(f"adamw_ema_multi_: params[{i}]: expected device {params[0].device}, got {param.device}")
        calls.setdefault(tuple(tensor is not None and tensor.dtype for tensor in row), []).append(row)
    for kind, rows in calls.items():
        lists = [list(column) if dtype else [] for dtype, column in zip(kind, zip(*rows))]
        _choose("adamw_ema_multi_", params[0])(*lists[:5], scalars, *lists[5:])


def adamw_ema_groups_(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    exp_avgs: Sequence[torch.Tensor],
    exp_avg_sqs: Sequence[torch.Tensor],
    emas: Sequence[torch.Tensor],
    scalars: torch.Tensor,
    groups: Sequence[int],
    param_outs: Sequence[torch.Tensor] = (),
    ema_outs: Sequence[torch.Tensor] = (),
) -> None:
    """`adamw_ema_` for each tensor of a list, with hyperparameters by group that lie on the device: one launch.

    A CUDA graph that holds it reads them anew in every replay.

    Args:
        params: as in `adamw_ema_multi_`, as are the moments.
        grads: all of one dtype.
        exp_avgs: first moments.
        exp_avg_sqs: second moments.
        emas: averages of the first len(emas) parameters; the others have none.
        scalars: (G, 9) fp64 on the device, a row of `step_scalars` for each group.
        groups: the row of each parameter.
        param_outs: copies of all new parameters, of one dtype, or ().
        ema_outs: copies of all averages, of one dtype, or ().

    Raises:
        ValueError: for a wrong dtype, shape, device or layout, and lists of other lengths.
    """
    count = len(params)
    if len(groups) != count:
        raise ValueError(f"adamw_ema_groups_: groups: expected {count} of them, got {len(groups)}")
    lists = {"grads": (grads, count), "exp_avgs": (exp_avgs, count), "exp_avg_sqs": (exp_avg_sqs, count)}
    lists |= {"param_outs": (param_outs, count if param_outs else 0), "emas": (emas, min(len(emas), count))}
    lists |= {"ema_outs": (ema_outs, len(emas) if ema_outs else 0)}
    for name, (given, expected) in lists.items():
        if len(given) != expected:
            raise ValueError(f"adamw_ema_groups_: {name}: expected {expected} of them, got {len(given)}")
    check_tensor("adamw_ema_groups_", "scalars", scalars, (None, 9), torch.float64, params[0].device)
    if not 0 <= min(groups) <= max(groups) < len(scalars):
        raise ValueError(f"adamw_ema_groups_: groups: expected rows of {len(scalars)}, got {sorted(set(groups))}")
    for i in range(count):
        rest = [tensors[i] if i < len(tensors) else None for tensors in (emas, param_outs, ema_outs)]
        _check(f"s[{i}]", params[i], grads[i], exp_avgs[i], exp_avg_sqs[i], *rest)
        for name, tensors in (("grads", grads), ("param_outs", param_outs), ("ema_outs", ema_outs)):
            if i < len(tensors) and tensors[i].dtype != tensors[0].dtype:
                raise ValueError(f"adamw_ema_groups_: {name}[{i}]: expected {tensors[0].dtype}, got {tensors[i].dtype}")
    if choice("adamw_ema") == "auto":
        function: Callable = torch.ops.ijepa_fast.adamw_ema_groups_
    elif runs_triton("adamw_ema", params[0]):
        function = triton_launcher(reference, "adamw_ema_groups_")
    else:
        function = reference.adamw_ema_groups_
    state = [list(tensors) for tensors in (params, grads, exp_avgs, exp_avg_sqs, emas)]
    function(*state, scalars, list(groups), list(param_outs), list(ema_outs))


def _choose(name: str, tensor: torch.Tensor) -> Callable:
    """The registered op serves csrc, on both devices; where Triton was asked for, it is called directly."""
    automatic = choice("adamw_ema") == "auto"
    if runs_triton("adamw_ema", tensor) and not automatic:
        return triton_launcher(reference, name)
    registered = automatic and (tensor.is_cuda or native.available())
    return getattr(torch.ops.ijepa_fast if registered else reference, name)


def _scalars(lr, beta1, beta2, eps, weight_decay, step, momentum) -> torch.Tensor:
    if step < 1:
        raise ValueError(f"adamw_ema: step: expected steps counted from 1, got {step}")
    return step_scalars(
        lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay, step=step, momentum=momentum
    )


_NAMES = ("param", "grad", "exp_avg", "exp_avg_sq", "ema", "param_out", "ema_out")
_DTYPES = (_STATE, _ANY, _STATE, _STATE, _STATE, _ANY, _ANY)


def _check(suffix: str, param: torch.Tensor, *others: torch.Tensor | None) -> None:
    shape, device = param.shape, param.device
    for i, tensor in enumerate((param, *others)):
        # A list has hundreds of tensors, so what is right is passed quickly and check_tensor only words the error.
        right = tensor is None and i > 3
        if isinstance(tensor, torch.Tensor):
            right = tensor.dtype in _DTYPES[i] and tensor.shape == shape
            right = right and tensor.device == device and tensor.is_contiguous()
        if not right:
            check_tensor("adamw_ema", _NAMES[i] + suffix, tensor, tuple(shape), _DTYPES[i], device)
