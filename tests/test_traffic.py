"""What ranks send in a step: what the engine's collectives are counted to hold, against what `plan` calculates."""

import json

import pytest

pytest.importorskip("deepspeed")

from ijepa_fast.config import load_config
from ijepa_fast.run import forecast
from ijepa_fast.run.traffic import LINKS, WITHIN, Traffic, traffic
from tests.launch import ROOT, TINY, finish, start

# Counts the bytes that a ring would send for each collective of the second step, at every stage, in one pair of ranks.
COUNT = """
import json, os, sys, torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from ijepa_fast.config import load_config
from ijepa_fast.engine import engine as module
from ijepa_fast.run.build import build_draw, build_engine, build_method

class Count(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.sent, self.ops = 0.0, {}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "c10d":
            largest = max((x.nbytes for x in tree_leaves(args) if isinstance(x, torch.Tensor)), default=0)
            times = 2 if op.name() == "c10d::allreduce_" else 1  # a reduction to everybody is two passes over the ring
            self.sent += times * largest * (ranks - 1) / ranks
            self.ops[op.name()] = self.ops.get(op.name(), 0) + 1
        return op(*args, **(kwargs or {}))

plain = module.deepspeed_config
def sharded(*arguments):  # no weight is too small to be shared out
    found = plain(*arguments)
    found["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return found
module.deepspeed_config = sharded

cpu, found = torch.device("cpu"), []
rank, ranks = module.start(cpu, 60)
for zero in range(4):
    config = load_config("configs/quickstart.yaml", [*sys.argv[3:], f"engine.zero={zero}"])
    method = build_method(config)
    engine = build_engine(config, method, cpu, ranks)
    draw, images = build_draw(config, method, cpu, rank, ranks), torch.zeros(4, 32, 32, 3, dtype=torch.uint8)
    for step in range(2):
        with Count() as count:
            engine.backward(images, draw(step))
            engine.step(1e-3, 0.0, 0.9)
    found.append(count.sent)
    print("ops", zero, count.ops, file=sys.stderr)
if rank == 0:
    print(json.dumps(found), file=sys.stderr)
sys.exit()
"""


@pytest.mark.multi_rank
def test_counted_is_what_is_calculated(tmp_path):
    """In fp32 on a CPU, two ranks; the difference is what partitions are padded by, at these sizes a hundredth."""
    statuses, errors = finish(start(tmp_path, ranks=2, first=COUNT))
    assert statuses == [0, 0], errors[-3000:]
    counted = next(json.loads(line) for line in errors.splitlines() if line.startswith("["))
    config = load_config(ROOT / "configs" / "quickstart.yaml", TINY)
    sizes = forecast.make(config, ranks=(2,)).parameters
    for stage, bytes_ in enumerate(counted):
        expected = traffic(4, sizes, stage, 2, 1, graphs=False).total
        assert bytes_ == pytest.approx(expected, rel=0.02), (stage, counted)


def test_a_ring_sends_less_than_twice_the_tensor():
    """All-reduce of P values: 2 (n - 1)/n; and by graphs the gradients of stage 1 are sent once."""
    sizes = (600, 400)
    assert traffic(2, sizes, 0, 8, 1, graphs=False) == Traffic(3500, 0, 0)
    assert traffic(2, sizes, 1, 8, 1, graphs=True) == Traffic(1750, 1750, 1050)
    assert traffic(2, sizes, 2, 8, 4, graphs=False) == Traffic(14000, 1750, 1050)
    assert traffic(2, sizes, 3, 8, 4, graphs=False) == Traffic(7000, 7000, 1050)
    large = traffic(2, (600_000_000, 400), 3, 8, 1, graphs=False)
    assert large.weights == 2 * large.gradients


def test_the_plan_of_many_ranks_says_what_the_links_take():
    config = load_config(ROOT / "configs" / "in1k_vith14_ep300.yaml", [])
    plan = forecast.make(config, ranks=(8, 64))
    text = forecast.report(config, plan, "H200")
    (row,) = [line for line in text.splitlines() if line.startswith("| 64 |") and "GB" not in line]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    total = plan.traffic[64].total
    assert float(cells[4]) == pytest.approx(total / 1e9, rel=0.01)
    assert cells[6 + list(LINKS).index(WITHIN)] == ""
    assert float(cells[6 + list(LINKS).index("100 Gb/s")]) == pytest.approx(total / 12.5e9, rel=0.01)
    assert "calculated, nothing was measured" in text
    assert forecast.make(config, ranks=(1,)).traffic == {}
