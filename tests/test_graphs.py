"""Steps through graphs, emulated on a CPU, against steps without: bitwise, through DeepSpeed; and what cannot be."""

import dataclasses

import pytest
import torch

pytest.importorskip("deepspeed")
pytest.importorskip("triton")

from ijepa_fast.config import ConfigError, load_config
from ijepa_fast.engine.engine import Engine, choose_device, start
from ijepa_fast.kernels.common import dispatch, library
from ijepa_fast.run import checkpoint
from ijepa_fast.config import flatten
from ijepa_fast.run.build import build_engine, build_method, micro_batch
from tests.emulated_graphs import EmulatedRecorder
from tests.launch import ROOT, TINY

RATES = [(1e-2, 0.1, 0.9), (5e-3, 0.2, 0.99), (2e-2, 0.3, 0.999), (1e-2, 0.1, 0.8)]
SHAPES = (0, 1, 0, 2, 1, 0, 2, 1)  # the draws of the micro-batches, which come again


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    """The kernels' path; what is switched off is what the CPU alone checks."""
    from ijepa_fast.kernels.predictor_tokens import ops as predictor_ops
    from ijepa_fast.kernels.varlen_attention import ops as attention_ops

    for module in (predictor_ops, attention_ops):
        monkeypatch.setattr(module, "check_sequences", lambda *arguments: None)
    # Ops are called as on a GPU, and inside they do what a CPU is fastest at.
    monkeypatch.setattr(library, "interpreted", lambda: False)
    before = {op: dispatch.choice(op) for op in dispatch.OPS}
    dispatch.use({op: "triton" for op in dispatch.TRITON if op not in ("adamw_ema", "mask_sampler")})
    yield
    dispatch.use(before)


def config_of(*overrides):
    config = load_config(ROOT / "configs" / "quickstart.yaml", [*TINY, "engine.device=cpu", *overrides])
    device, threads = choose_device("cpu"), torch.get_num_threads()
    start(device, config.engine.timeout)
    torch.set_num_threads(threads)
    return config


def engine_of(config, recorder=None):
    method = build_method(config)
    if recorder is None:
        method.use_graphs()  # the same padding
    engine = Engine(method, config.engine, config.optim, micro_batch(config, 1), torch.device("cpu"), recorder)
    return engine, method


def steps(engine, method, config, first=0, last=len(RATES)):
    """Losses, norms of the gradient, and what `watch` saw."""
    accumulation, micro = config.engine.accumulation, micro_batch(config, 1)
    watched, found, norms = [], [], []
    method.watch = lambda features, draw: watched.append((features.clone(), draw.union_index))
    for step in range(first, last):
        for i in range(accumulation):
            number = step * accumulation + i
            images = torch.randint(
                256, (micro, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(number)
            )
            loss, _ = engine.backward(images, method.draw(micro, 0, SHAPES[number % len(SHAPES)]))
            found.append(loss)
            engine.step(*RATES[step], norm=True)
        norms.append(engine.gradient_squares())
    method.watch = None
    return found, norms, [x for pair in watched for x in pair]


def states(engine, method):
    """All that a run is made of."""
    found = {name: p.clone() for n in method.networks.values() for name, p in n.state_dict(prefix=str(id(n))).items()}
    found = list(found.values())
    for partition in engine.layout.partitions:
        state = engine.optimizer.state[partition.master]
        found += [partition.master.detach().clone(), *(state[key].clone() for key in sorted(state) if key != "step")]
    return found


def assert_same(found, expected):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))


CASES = [
    ("engine.zero=1", "engine.precision=bf16"),
    ("engine.zero=0", "engine.precision=bf16", "engine.accumulation=2"),
    ("engine.zero=2", "engine.precision=bf16", "engine.accumulation=2", "model.recompute=true"),
    ("engine.zero=1", "engine.precision=bf16", "engine.target_precision=fp8", "engine.accumulation=2"),
    ("engine.zero=0", "engine.precision=fp32"),
    ("engine.zero=2", "engine.precision=fp32", "model.recompute=true"),
]


@pytest.mark.parametrize("overrides", CASES, ids=" ".join)
def test_steps_through_graphs_are_the_launched_ones(overrides):
    config = config_of(*overrides)
    engine, method = engine_of(config)
    expected = steps(engine, method, config), states(engine, method)
    recorder = EmulatedRecorder()
    engine, method = engine_of(config, recorder)
    found = steps(engine, method, config), states(engine, method)
    assert_same(found[0][0], expected[0][0])
    torch.testing.assert_close(found[0][1], expected[0][1], rtol=1e-5, atol=0)
    assert_same(found[0][2], expected[0][2])
    assert_same(found[1], expected[1])
    assert engine.graphs()["shapes"] >= 1
    assert recorder.replays >= 3
