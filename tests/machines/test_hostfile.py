"""`train --hostfile` on two machines: what is mistyped or away is named before anything starts; the rest trains."""

import pytest

pytest.importorskip("deepspeed")
pytest.importorskip("nvidia.dali")

from tests.launch import losses
from tests.machines.network import environment, outcome, said, trainer

SECONDS = 120


def launch(made, folder, runs, *overrides):
    """Type `train --hostfile` on the first machine: its exit status, and what it says."""
    (folder / "deepspeed_env").write_text("".join(f"{name}={value}\n" for name, value in environment().items()))
    command = ["python", "-m", "ijepa_fast", "train", "--hostfile", str(folder / "hostfile")]
    started = made[0].start(*command, *trainer(runs, *overrides)[1:], DS_ENV_FILE=str(folder / "deepspeed_env"))
    (status,), text = outcome([started], SECONDS)
    return status, text


def test_a_machine_that_is_mistyped_or_off_is_named(two, tmp_path):
    made, folder = two
    (folder / "hostfile").write_text("machine-a slots=1\nmachine-c slots=1\n")
    status, text = launch(made, folder, tmp_path)
    assert status == 1, text[-3000:]
    (error,) = said(text)
    assert "machine-c cannot be reached by ssh (Could not resolve hostname machine-c: " in error
    (folder / "hostfile").write_text("machine-a slots=1\nmachine-b slots=1\n")
    made[1].cut()
    status, text = launch(made, folder, tmp_path)
    assert status == 1, text[-3000:]
    (error,) = said(text)
    assert "machine-b cannot be reached by ssh (connect to host machine-b port 22: " in error
    assert not list(tmp_path.glob("quickstart*"))


@pytest.mark.slow
def test_two_machines_train(two, tmp_path):
    made, folder = two
    status, text = launch(made, folder, tmp_path, "optim.steps=2")
    assert status == 0, text[-3000:]
    assert "2 ranks" in text
    assert len(losses(tmp_path / "quickstart")) == 2
    assert "deepspeed ijepa_fast/train.py" in (tmp_path / "quickstart" / "launches.jsonl").read_text()
