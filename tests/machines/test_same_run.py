"""Two machines are the same run as one process, up to rounding, and each goes on with the other's checkpoints."""

import pytest

pytest.importorskip("deepspeed")
pytest.importorskip("nvidia.dali")

import torch
from safetensors.torch import load_file

from tests.launch import losses, run
from tests.machines.network import deepspeed, outcome, torchrun

OPTIONS = ("optim.steps=6", "log.keep=9")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run of one process."""
    return run(tmp_path_factory.mktemp("alone"), *OPTIONS)


def weights(folder, step):
    return load_file(folder / "checkpoints" / f"step-{step:08d}" / "weights.safetensors")


def assert_same(folder, alone):
    assert losses(folder) == pytest.approx(losses(alone), rel=1e-5)
    expected, found = weights(alone, 6), weights(folder, 6)
    assert expected.keys() == found.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-3, atol=2e-5, msg=key)


@pytest.mark.parametrize("zero", [1, 2])
def test_two_machines_are_one_run(two, alone, tmp_path, zero):
    """By torchrun."""
    made, _ = two
    statuses, said = outcome(torchrun(made, tmp_path, *OPTIONS, f"engine.zero={zero}"))
    assert statuses == [0, 0], said[-3000:]
    assert_same(tmp_path / "quickstart", alone)


@pytest.mark.slow
@pytest.mark.parametrize("zero", [1, 2])
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_a_run_goes_from_one_process_to_two_machines_and_back(two, alone, tmp_path, launcher, zero):
    made, folder = two
    run(tmp_path, "optim.steps=2", "log.keep=9")
    options = ("optim.steps=4", "log.keep=9", f"engine.zero={zero}")
    both = torchrun(made, tmp_path, *options) if launcher == "torchrun" else deepspeed(made, folder, tmp_path, *options)
    statuses, said = outcome(both)
    assert set(statuses) == {0}, said[-3000:]
    assert "continuing" in said
    assert "2 ranks" in said
    assert_same(run(tmp_path, *OPTIONS), alone)
