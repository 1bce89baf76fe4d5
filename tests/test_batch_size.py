"""A run that goes on with another batch size: at the image where it was, with the schedules of the images seen."""

import numpy as np
import pytest

pytest.importorskip("deepspeed")
pytest.importorskip("nvidia.dali")
pytest.importorskip("yaml")

import yaml

import ijepa_fast
from ijepa_fast.run.checkpoint import CheckpointError, read_state
from tests.launch import TINY

SMALL = [*(item for item in TINY if not item.startswith("data.source")), "optim.epochs=5"]
# Weights that stay as they are: the loss of a step is then a function of its images and masks alone.
STILL = ["optim.lr=0", "optim.start_lr=0", "optim.final_lr=0", "optim.ema=1", "optim.final_ema=1"]


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """Trains on 60 images in this process, and gives the records of the log."""
    runs = tmp_path_factory.mktemp("runs")
    images = runs / "images.npy"
    np.save(images, np.random.default_rng(0).integers(0, 256, (60, 40, 40, 3), dtype=np.uint8))

    def train(*overrides):
        options = {key: yaml.safe_load(value) for key, _, value in (o.partition("=") for o in [*SMALL, *overrides])}
        run = ijepa_fast.train(str(images), runs=str(runs), **options)
        return run.log, run.folder

    return train


@pytest.mark.parametrize(("first", "then"), [(8, 12), (12, 6)])
def test_it_goes_on_as_a_run_of_the_new_size(train, first, then):
    """48 images in steps of one size and 36 in steps of another, against a run of the other size from the start."""
    name, before, after = f"name=changed-{first}-{then}", 48 // first, 36 // then
    train(name, *STILL, f"batch_size={first}", f"optim.steps={before}")
    records, folder = train(name, *STILL, f"batch_size={then}", f"optim.steps={before + after}")
    whole, _ = train(f"name=whole-{then}", *STILL, f"batch_size={then}", f"optim.steps={84 // then}")
    trained = [record for record in records if "loss" in record]
    assert [record["step"] for record in trained] == list(range(1, before + after + 1))
    assert [first, then] in [record["changed"]["batch_size"] for record in records if "changed" in record]
    for key in ("images", "epoch", "loss", "tokens_per_image", "weight_decay"):
        assert [record[key] for record in trained[before:]] == [record[key] for record in whole[-after:]], key
    assert len({record["loss"] for record in whole}) == len(whole)
    state = read_state(folder / "checkpoints" / f"step-{before + after:08d}")
    assert state["images"] == 84


def test_it_ends_with_the_epochs(train):
    """5 epochs of 7 steps of 8 images, of 5 steps of 12: 4 of these were done by 6 steps."""
    train("name=ends", "batch_size=8", "optim.steps=6")
    records, _ = train("name=ends", "batch_size=12", "optim.epochs=2")
    assert (records[-1]["step"], records[-1]["images"], records[-1]["epoch"]) == (12, 120, 1)
    assert records[-1]["seconds_left"] == 0


def test_a_size_that_does_not_fit_is_an_error(train):
    _, folder = train("name=unfit", "batch_size=8", "optim.steps=6")
    with pytest.raises(CheckpointError, match=r"seen 48 images, .*batch_size=10; set batch_size=8 or 12, the nearest"):
        train("name=unfit", "batch_size=10")
    with pytest.raises(CheckpointError, match=r"batch_size=35; set batch_size=24 or 48, the nearest"):
        train("name=unfit", "batch_size=35")
    with pytest.raises(CheckpointError, match="set fewer ranks or less accumulation: no multiple of 5 fits"):
        train("name=unfit", "batch_size=10", "engine.accumulation=5")
    assert [path.name for path in (folder / "checkpoints").glob("step-*")] == ["step-00000006"]
