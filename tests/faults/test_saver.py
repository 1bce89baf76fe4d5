"""A checkpoint is of the step it was begun at, however long its writer takes; what the writer meets is raised."""

import threading
import time

import pytest
import torch

pytest.importorskip("deepspeed")
pytest.importorskip("nvidia.dali")

from safetensors.torch import load_file

from ijepa_fast.run import checkpoint
from ijepa_fast.run.checkpoint import CheckpointError, snapshot
from ijepa_fast.run.saver import Saver
from tests.faults.test_not_finite import engine_of


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_the_copy_is_of_its_step(tmp_path, zero):
    """The writer starts when two further steps are done, and writes what was."""
    engine, method, backward = engine_of(zero, "fp32")

    def step(number):
        backward(number)
        engine.step(1e-3, 0.1, 0.9)

    go = threading.Event()
    arch = checkpoint.architecture(engine.method.encoder, method.setup.model, method.setup.data, "ijepa", 1)

    def write(taken, group):
        assert go.wait(60)
        checkpoint.write(tmp_path, taken, 8, {}, arch, keep=2, group=group)

    step(0)
    then = {name: tensor.clone() for name, tensor in snapshot(engine, 1).tensors.items()}
    with Saver(engine, write, 60) as saver:
        blocked = saver.save(1)
        step(1)
        step(2)
        assert not list(tmp_path.rglob("*.safetensors"))
        go.set()
        saver.wait()
        assert blocked < 5
    found = load_file(tmp_path / "checkpoints" / "step-00000001" / "rank-00000.safetensors")
    assert found.keys() == then.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in then.items())
    now = snapshot(engine, 3).tensors
    assert any(not torch.equal(now[name], tensor) for name, tensor in then.items())


def test_the_next_waits_for_the_last_and_a_failure_is_raised_once():
    engine, _, _ = engine_of(1, "fp32")
    written = []

    def write(taken, group):
        time.sleep(0.3)
        written.append(taken.step)
        if taken.step == 2:
            raise CheckpointError("no room")

    saver = Saver(engine, write, 60)
    assert saver.save(1) < 0.25
    assert saver.save(2) > 0.04
    with pytest.raises(CheckpointError, match="no room"):
        saver.save(3)
    assert not saver.failed
    assert written == [1, 2]

    def loop():
        with saver:
            saver.save(4)
            raise KeyError

    with pytest.raises(KeyError):  # an error of the loop stays the error; what is begun is finished
        loop()
    assert written == [1, 2, 4]
