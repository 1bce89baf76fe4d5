"""What the op tests share: error budgets against fp64, gradients with random upstream, gradcheck, opcheck, compiles.

The budget of docs/numerics.md: an op's largest error against fp64 is at most twice that of its reference run in the
same low precision, plus a few units of fp32 rounding. Nothing here imports triton.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from unittest import mock

import torch

from ijepa_fast.kernels.common import library

Outputs = tuple[torch.Tensor, ...]


def assert_within_budget(actual: torch.Tensor, eager: torch.Tensor, exact: torch.Tensor, name: str = "result") -> None:
    """Fail unless max|actual - exact| <= 2 max|eager - exact| + 8 fp32 eps max|exact|.

    `actual` and `eager` have one dtype and shape, `exact` is fp64 of the same inputs.
    """
    assert actual.shape == exact.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    assert actual.dtype == eager.dtype, f"{name}: dtype {actual.dtype}, expected {eager.dtype}"
    if exact.numel() == 0:
        return
    assert torch.isfinite(actual).all(), f"{name}: {int((~torch.isfinite(actual)).sum())} values are not finite"
    error = (actual.double() - exact).abs().max().item()
    eager_error = (eager.double() - exact).abs().max().item()
    budget = 2 * eager_error + 8 * torch.finfo(torch.float32).eps * exact.abs().max().item()
    assert error <= budget, f"{name}: error {error:.3g} over the budget {budget:.3g} (eager: {eager_error:.3g})"


def differentiate(
    function: Callable, inputs: Sequence[torch.Tensor], upstream: Sequence[torch.Tensor]
) -> tuple[Outputs, Outputs]:
    """Outputs of `function(*inputs)` and the gradients of its floating-point inputs for the upstream gradients."""
    leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    variables = [x for x in leaves if x.requires_grad]
    gradients = torch.autograd.grad(outputs, variables, [g.to(y.dtype) for g, y in zip(upstream, outputs)])
    return tuple(y.detach() for y in outputs), gradients


def random_upstream(function: Callable, inputs: Sequence[torch.Tensor]) -> Outputs:
    """A standard normal tensor for each output of `function(*inputs)`, in its dtype."""
    with torch.no_grad():
        outputs = function(*inputs)
    return tuple(torch.randn_like(y) for y in (outputs if isinstance(outputs, tuple) else (outputs,)))


def check_against_reference(
    op: Callable, reference: Callable, inputs: Sequence[torch.Tensor], names: Sequence[str] = ()
) -> None:
    """Hold `op` to the error budget of `reference`: every output, every gradient, with random upstream gradients.

    Both are called with `inputs` (floating-point ones are differentiated, each in its own dtype); `reference` once more
    with them in fp64. `names` are those of the floating-point inputs, for messages.
    """
    upstream = random_upstream(reference, inputs)
    exact = differentiate(
        reference, [x.double() if x.is_floating_point() else x for x in inputs], [g.double() for g in upstream]
    )
    eager = differentiate(reference, inputs, upstream)
    actual = differentiate(op, inputs, upstream)
    for i, results in enumerate(zip(actual[0], eager[0], exact[0], strict=True)):
        assert_within_budget(*results, name=f"output {i}")
    for i, results in enumerate(zip(actual[1], eager[1], exact[1], strict=True)):
        assert_within_budget(*results, name=f"gradient of {names[i] if names else i}")


def gradcheck(function: Callable, *inputs: torch.Tensor) -> None:
    """fp64 gradcheck of `function` at `inputs` (fp64; those that are to be differentiated require grad)."""
    assert torch.autograd.gradcheck(function, inputs)


def opcheck(op: Callable, *arguments: object) -> None:
    """torch.library.opcheck of a registered op; and its PyTorch implementation on the CPU agrees with its kernel."""
    torch.library.opcheck(op, arguments)
    kernel = _call(op, arguments, device=None)
    with mock.patch.object(library, "interpreted", return_value=False):
        torch.testing.assert_close(_call(op, arguments, device="cpu"), kernel, check_device=False)


def _call(op, arguments, device):
    copies = [x.to(device or x.device, copy=True) if isinstance(x, torch.Tensor) else x for x in arguments]
    return op(*copies), [x for x in copies if isinstance(x, torch.Tensor)]


def count_compiles(function: Callable, calls: Sequence[Sequence[object]]) -> int:
    """How many of `calls` torch.compile(fullgraph, dynamic) had to compile `function` for.

    Results, and gradients of the tensors that require them, must equal those of the function itself.
    """
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    compiles = 0
    for arguments in calls:
        # One call can count twice: a float argument is traced as a symbol first and then as the constant it is.
        before = counter.frame_count
        results = compiled(*arguments)
        compiles += counter.frame_count > before
        expected = function(*arguments)
        variables = [x for x in arguments if isinstance(x, torch.Tensor) and x.requires_grad]
        if variables:
            upstream = [torch.randn_like(y) for y in (expected if isinstance(expected, tuple) else (expected,))]
            results, expected = (
                (ys, torch.autograd.grad(ys, variables, upstream, allow_unused=True)) for ys in (results, expected)
            )
        torch.testing.assert_close(results, expected, rtol=0, atol=0)
    return compiles
