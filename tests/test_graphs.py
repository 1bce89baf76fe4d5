"""Steps through graphs, emulated on a CPU, against steps without: bitwise, through DeepSpeed; and what cannot be."""

import dataclasses
import json
from functools import partial

import pytest
import torch

pytest.importorskip("deepspeed")
pytest.importorskip("triton")

from ijepa_fast.config import ConfigError, flatten, load_config, present
from ijepa_fast.engine.engine import Engine, choose_device, fp8_gains, has_fp8, start, wants_graphs
from ijepa_fast.interop.weights import checkpoints
from ijepa_fast.run import checkpoint
from ijepa_fast.run.build import build_method, micro_batch
from tests.emulated_graphs import EmulatedRecorder
from tests.launch import ROOT, TINY, finish, losses
from tests.launch import start as launch

RATES = [(1e-2, 0.1, 0.9), (5e-3, 0.2, 0.99), (2e-2, 0.3, 0.999), (1e-2, 0.1, 0.8)]
SHAPES = (0, 1, 0, 2, 1, 0, 2, 1)  # the draws of the micro-batches, which come again


pytestmark = pytest.mark.usefixtures("ops_as_on_a_gpu")


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


def steps(engine, method, config, first=0, last=4):
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


def test_a_run_goes_on_with_graphs_and_without_from_the_same_checkpoint(tmp_path):
    config = config_of("engine.precision=bf16", "engine.target_precision=fp8", "engine.accumulation=2")
    engine, method = engine_of(config)
    steps(engine, method, config)
    expected = states(engine, method)
    engine, method = engine_of(config, EmulatedRecorder())
    steps(engine, method, config, last=2)
    flat = flatten(config)
    arch = checkpoint.architecture(engine.method.encoder, config.model, config.data, "ijepa", 2)
    checkpoint.write(tmp_path, checkpoint.snapshot(engine, 2), 2 * config.batch_size, flat, arch, keep=2)
    steps(engine, method, config, first=2)
    assert_same(states(engine, method), expected)
    # Into graphs that are captured already, and into a fresh engine.
    (saved,) = checkpoints(tmp_path)
    for loaded, its_method in ((engine, method), engine_of(config, EmulatedRecorder()), engine_of(config)):
        assert checkpoint.load(saved, loaded, flat, None)[0] == 2
        steps(loaded, its_method, config, first=2)
        assert_same(states(loaded, its_method), expected)


class Spoilt(EmulatedRecorder):
    """A replay that leaves out the last op but one which writes."""

    def capture(self, function):
        replay, result = super().capture(function)
        calls = self.tapes[-1].calls
        if len(calls) > 50:
            del calls[-40]
        return replay, result


class OutOfMemory(EmulatedRecorder):
    """No memory for a capture."""

    def capture(self, function):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore of it")


class Reads(EmulatedRecorder):
    """A step that reads a value."""

    def capture(self, function):
        return super().capture(lambda: (function(), torch.ones(2).sum().item())[0])


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (Spoilt, "a replayed step differs from a launched one"),
        (OutOfMemory, "cannot be captured (CUDA out of memory. Tried to allocate 2 GiB)"),
        (Reads, "cannot be captured (emulated graph: aten::_local_scalar_dense is not permitted"),
    ],
)
def test_what_fails_is_said_once_and_the_run_goes_on(kind, says, capsys):
    config = config_of("engine.precision=bf16")
    engine, method = engine_of(config)
    expected = steps(engine, method, config), states(engine, method)
    engine, method = engine_of(config, kind())
    found = steps(engine, method, config), states(engine, method)
    assert_same(found[0][0], expected[0][0])
    assert_same(found[1], expected[1])
    assert engine.graphs()["shapes"] == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "engine.cuda_graphs" in line]
    assert len(said) == 1
    assert says in said[0]
    assert said[0].endswith("from now on steps are launched without graphs")


def test_without_free_memory_no_further_shape_is_captured(capsys):
    config = config_of("engine.precision=fp32")
    engine, method = engine_of(config, EmulatedRecorder(free=0.05))
    steps(engine, method, config)
    assert engine.graphs() == {"replayed": 0.0, "shapes": 0, "gigabytes": 0.0}
    said = [line for line in capsys.readouterr().err.splitlines() if "engine.cuda_graphs" in line]
    assert len(said) == 1
    assert "0 shapes are captured, and no more are for want of memory" in said[0]


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        ([], "they need a CUDA device, and training is on cpu"),
        (["objective.method=ibot"], "objective.method=ibot does not declare them"),
        (["engine.zero=3"], "engine.zero=3 moves the weights"),
        (["optim.clip=1"], "optim.clip needs the gradient's norm"),
        (["mask.padding=false"], "without mask.padding few shapes come again"),
    ],
)
def test_graphs_that_cannot_be_are_refused_with_the_reason(overrides, reason):
    config = config_of()
    method = build_method(config)
    config = load_config(ROOT / "configs" / "quickstart.yaml", [*TINY, *overrides])
    if "objective.method=ibot" in overrides:
        method.capabilities, reason = frozenset(), reason.replace("ibot", "ijepa")
    method.setup = dataclasses.replace(method.setup, mask=config.mask)
    device = torch.device("cuda" if overrides else "cpu")
    for asked, refused in (("auto", False), ("off", False), ("on", True)):
        config.engine.cuda_graphs = asked
        if refused:
            with pytest.raises(ConfigError, match=f"engine.cuda_graphs=on: {reason}"):
                wants_graphs(method, config.engine, config.optim, device)
        else:
            assert not wants_graphs(method, config.engine, config.optim, device)


def test_graphs_are_the_default_on_a_gpu():
    config = config_of()
    assert wants_graphs(build_method(config), config.engine, config.optim, torch.device("cuda"))


@pytest.mark.parametrize(("given", "value"), [("on", "on"), ("off", "off"), ("true", "on"), ("auto", "auto")])
def test_the_switch_is_read_as_yaml_writes_it(given, value, tmp_path):
    assert load_config("quickstart", [f"engine.cuda_graphs={given}"]).engine.cuda_graphs == value
    assert present({"engine.cuda_graphs": False}) == {"engine.cuda_graphs": "off"}


@pytest.mark.parametrize(("capability", "there"), [((8, 0), False), ((8, 9), True), ((9, 0), True)])
def test_a_gpu_without_fp8_is_said(monkeypatch, capsys, capability, there):
    config_of()  # ranks are there
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    assert has_fp8(torch.device("cuda")) is there
    assert has_fp8(torch.device("cpu"))
    said = capsys.readouterr().err
    assert ("NVIDIA A100 has no fp8; the target encoder runs in engine.precision" in said) is not there


@pytest.mark.parametrize("faster", [False, True])
def test_fp8_is_taken_where_it_is_faster(monkeypatch, capsys, faster):
    model = build_method(config_of())
    monkeypatch.setattr("ijepa_fast.engine.engine.seconds_of", lambda *sizes: (2e-3, 1e-3 if faster else 3e-3))
    monkeypatch.setattr(torch, "tensor", partial(on_the_cpu, torch.tensor))
    assert fp8_gains(model, 4, torch.device("cuda")) is faster
    said = capsys.readouterr().err
    assert "2.00 ms without" in said
    assert ("which is faster" in said) is not faster
    assert fp8_gains(model, 4, torch.device("cpu"))


def on_the_cpu(make, *args, device=None, **options):
    """`make` without its device."""
    return make(*args, **options)


@pytest.mark.slow
@pytest.mark.parametrize("zero", [0, 2])
def test_two_ranks_train_as_through_deepspeed(tmp_path, zero):
    """Of what a run with graphs does itself, reducing and sharing is tried here; nothing can be captured."""
    options = ("optim.steps=3", f"engine.zero={zero}", "engine.precision=bf16", "engine.accumulation=2")
    engines = []
    for name, first in (("plain", None), ("graphs", UNCAPTURED)):
        statuses, errors = finish(launch(tmp_path, *options, f"name={name}", ranks=2, first=first))
        assert statuses == [0, 0], errors[-2000:]
        engines.append(errors)
    assert engines[1].count("cannot be captured (not here)") == 2
    assert losses(tmp_path / "graphs") == pytest.approx(losses(tmp_path / "plain"), rel=2e-3)
    (line, *_) = (tmp_path / "graphs" / "log.jsonl").read_text().splitlines()
    assert json.loads(line)["graphs"]["replayed"] == 0


UNCAPTURED = """
from functools import partial
from ijepa_fast.run import build

class Recorder:
    def run(self, function):
        return function()

    def capture(self, function):
        raise RuntimeError("not here")

    def free_share(self):
        return 1.0

    def reserved(self):
        return 0

build.Engine = partial(build.Engine, recorder=Recorder())
"""


# What the emulation itself finds.


def test_the_emulation_finds_what_a_graph_cannot_hold():
    recorder, memory = EmulatedRecorder(), torch.zeros(3)
    with pytest.raises(RuntimeError, match="not permitted"):
        recorder.capture(lambda: memory.sum().item())
    with pytest.raises(RuntimeError, match="not permitted"):
        recorder.capture(lambda: memory + torch.tensor([1.0, 2.0, 3.0]))


def test_the_emulation_freezes_addresses_and_numbers_and_undoes_a_capture():
    recorder, total, step = EmulatedRecorder(), torch.zeros(3), [1.0]

    def function():
        total.add_(step[0])
        return total * 2

    replay, result = recorder.capture(function)
    assert total.tolist() == [0, 0, 0]  # a capture runs nothing
    assert result.isnan().all()
    step[0] = 5.0
    replay()
    assert total.tolist() == [1, 1, 1]  # the number of the capture
    assert result.tolist() == [2, 2, 2]
    kept = recorder.run(lambda: total + 1)
    replay()
    assert kept.isnan().all()  # a run's memory is the pool's
    address = total
    total = torch.full((3,), 7.0)
    replay()
    assert address.tolist() == [3, 3, 3]
    assert total.tolist() == [7, 7, 7]
    del address
    with pytest.raises(RuntimeError, match="freed"):
        replay()
