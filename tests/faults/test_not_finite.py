"""A gradient that is not finite is noticed at every stage, no step pays for that, and nothing of it is saved."""

import math
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.faults.run import saved
from tests.launch import ROOT, TINY, finish
from tests.launch import start as start_run

pytest.importorskip("deepspeed")
pytest.importorskip("nvidia.dali")

from ijepa_fast.config import load_config
from ijepa_fast.engine.engine import choose_device, start
from ijepa_fast.run.build import build_engine, build_method

CASES = [(zero, precision) for zero in (0, 1, 2, 3) for precision in ("fp32", "bf16")]
# Ops that engine.step may dispatch at a model of 59 tensors; views count too. DeepSpeed's defaults have 16 a tensor in
# bf16 at ZeRO 1. What it does in bf16 at ZeRO 0, and at ZeRO 3, cannot be turned off.
OPS = {(0, "fp32"): 12, (0, "bf16"): 1550, (3, "fp32"): 860, (3, "bf16"): 860}
SKIPS = {(0, "bf16"), (3, "fp32"), (3, "bf16")}  # where DeepSpeed looks at the gradient, and it cannot be turned off


class Count(TorchDispatchMode):
    """Counts the ops that are dispatched."""

    def __init__(self):
        super().__init__()
        self.ops = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops[str(func)] += 1
        return func(*args, **(kwargs or {}))


def engine_of(zero, precision, *others):
    overrides = [*TINY, *others, f"engine.zero={zero}", f"engine.precision={precision}", "engine.device=cpu"]
    config = load_config(ROOT / "configs" / "quickstart.yaml", overrides)
    device, threads = choose_device("cpu"), torch.get_num_threads()
    start(device, config.engine.timeout)
    torch.set_num_threads(threads)
    method = build_method(config)
    engine = build_engine(config, method, device, 1)

    def backward(step):
        images = torch.randint(0, 256, (8, 32, 32, 3), dtype=torch.uint8)
        return engine.backward(images, method.draw(8, 0, step))

    return engine, method, backward


@pytest.mark.parametrize(("zero", "precision"), CASES)
def test_a_bad_gradient_is_noticed(zero, precision):
    engine, method, backward = engine_of(zero, precision)
    backward(0)
    engine.step(1e-3, 0.1, 0.99)
    assert engine.health() == 0
    assert engine.skipped == 0
    weight = method.encoder.blocks[0].norm1.weight
    handle = weight.register_hook(lambda grad: grad * math.inf)
    loss, _ = backward(1)
    engine.step(1e-3, 0.1, 0.99)
    handle.remove()
    assert loss.isfinite()
    assert engine.health().isnan().item() is ((zero, precision) not in SKIPS)
    assert engine.skipped == ((zero, precision) in SKIPS)


@pytest.mark.parametrize(("zero", "precision"), CASES)
def test_ops_of_a_step(zero, precision):
    engine, _, backward = engine_of(zero, precision)
    for step in range(2):
        backward(step)
        engine.step(1e-3, 0.1, 0.99)
    backward(2)
    with Count() as count:
        engine.step(1e-3, 0.1, 0.99)
    assert sum(count.ops.values()) <= OPS.get((zero, precision), 345), count.ops


@pytest.mark.parametrize("clip", [0.0, 1e-3])
@pytest.mark.parametrize(("zero", "precision"), CASES)
def test_the_norm_of_a_gradient_where_it_is_asked_for(zero, precision, clip):
    engine, method, backward = engine_of(zero, precision, f"optim.clip={clip}")
    grads = {}
    for name, p in method.named_parameters():
        p.register_hook(lambda grad, name=name: grads.__setitem__(name, grad.double().square().sum()))
    for asked in (True, False):
        backward(0)
        engine.step(1e-3, 0.1, 0.99, norm=asked)
        found = engine.gradient_squares()
        if not asked:
            assert found is None
            continue
        assert found.dtype == torch.float64
        clipped = clip and (zero, precision) == (0, "fp32")  # where DeepSpeed does not tell the norm before
        expected = found.new_tensor(clip).square() if clipped else sum(grads.values())
        torch.testing.assert_close(found, expected, rtol=1e-2 if precision == "bf16" else 1e-4, atol=0)


INJECT = """
import math
from ijepa_fast.engine.engine import Engine

backward, calls = Engine.backward, []

def third_is_bad(self, images, draw):
    calls.append(None)
    weight = self.method.encoder.blocks[0].norm1.weight
    if len(calls) == 3:
        weight.register_hook(lambda grad: grad * math.inf)
    return backward(self, images, draw)

Engine.backward = third_is_bad
"""


@pytest.mark.parametrize("zero", [0, 1])
def test_a_run_ends_and_saves_nothing_of_it(tmp_path, zero):
    options = ("log.every=5", "log.checkpoint_every=1", "log.keep=9", f"engine.zero={zero}", "optim.steps=9")
    statuses, errors = finish(start_run(tmp_path, *options, first=INJECT))
    assert statuses == [1]
    assert "the weights are not finite in steps 3 to 3 on ranks [0]" in errors
    assert saved(tmp_path / "quickstart") == [1, 2]
