"""Random images: the interface of the training loader, and nothing to wait for."""

import time

import pytest
import torch

pytest.importorskip("PIL")

from ijepa_fast.data.synthetic import SyntheticLoader


def test_batches_steps_and_epochs_are_a_training_loaders():
    loader = SyntheticLoader(batch_size=4, crop=8, count=24, world_size=2, rank=1, start_step=2, draw=lambda s: s * 10)
    batches = [next(loader) for _ in range(3)]
    loader.close()
    assert [b.draw for b in batches] == [20, 30, 40]
    assert [b.epoch for b in batches] == [0, 1, 1]
    assert all(b.images.shape == (4, 8, 8, 3) and b.images.dtype == torch.uint8 for b in batches)
    assert batches[0].indices.tolist() == [4, 5, 6, 7]


def test_several_sides_give_several_views_and_ranks_see_other_pixels():
    loaders = [SyntheticLoader(batch_size=2, crop=[8, 4], rank=rank, world_size=2) for rank in range(2)]
    one, two = (next(loader).images for loader in loaders)
    assert [tuple(view.shape) for view in one] == [(2, 8, 8, 3), (2, 4, 4, 3)]
    assert not torch.equal(one[0], two[0])
    for loader in loaders:
        loader.close()


def test_the_next_steps_extra_is_made_while_this_step_is_worked_on():
    made = []
    loader = SyntheticLoader(batch_size=1, crop=4, draw=made.append)
    next(loader)
    deadline = time.monotonic() + 30
    while len(made) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    loader.close()
    assert made == [0, 1]


def test_an_error_in_extra_reaches_the_caller():
    loader = SyntheticLoader(batch_size=1, crop=4, draw=lambda step: 1 // step)
    with pytest.raises(ZeroDivisionError):
        next(loader)
    loader.close()
