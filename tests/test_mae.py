"""MAE: parity with the published code, its masks, its read-out, and its graphs."""

from pathlib import Path

import numpy as np
import pytest
import torch

from ijepa_fast.engine.graphs import CUDARecorder, Graphs
from ijepa_fast.masks.samplers import make_sampler
from ijepa_fast.methods.mae import pack_visible
from tests.emulated_graphs import EmulatedRecorder
from tests.parity import TOLERANCE
from tests.parity_methods import parity_mae
from tests.small import loss_of, small_mae


def test_parity_with_the_published_code():
    with np.load(Path(__file__).parent / "data" / "mae_step.npz") as archive:
        errors = parity_mae(archive)
    assert len(errors) > 40
    assert max(errors.values()) < TOLERANCE, errors


def test_masks_it_cannot_use_are_refused():
    with pytest.raises(ValueError, match="one target block"):
        pack_visible(make_sampler("rasterized", (4, 4))(2, seed=0, step=0))


def test_it_has_no_average():
    model = small_mae()
    assert model.averaged == {}
    assert model.probed is model.encoder
    assert set(model.networks) == {"encoder", "decoder"}


def test_the_decoder_sees_every_patch_once():
    draw = small_mae().draw(3, seed=0, step=0)
    places = draw.decoder_places.view(3, 16)
    assert torch.equal(places.sort(dim=1).values, torch.arange(16, dtype=torch.int32).expand(3, -1))
    assert torch.equal(places[:, :4], draw.context_places.view(3, 4))
    assert torch.equal(places[:, 4:], draw.target_index[0] % 16)
    assert draw.tokens == 3 * (1 + 4 + 1 + 16)


def test_features_come_without_the_class_token():
    model, images = small_mae(), torch.randint(256, (3, 32, 32, 3), dtype=torch.uint8)
    patches = model.patchify(images)
    features = model.encoder(patches, 3)
    assert features.shape == (3 * 16, 32)
    torch.testing.assert_close(features[16:32], model.encoder(patches[16:32], 1))
    (last,) = model.encoder.layers(patches, 3, 1)
    torch.testing.assert_close(model.encoder.norm(last), features)


@pytest.mark.usefixtures("ops_as_on_a_gpu")
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_graphs_change_nothing(device):
    """Batches of one shape: run, captured, replayed."""
    model, images = small_mae().to(device), torch.randint(256, (4, 32, 32, 3), dtype=torch.uint8).to(device)
    said, gradients = [], [torch.zeros_like(p) for p in model.parameters()]
    recorder = EmulatedRecorder() if device == "cpu" else CUDARecorder(torch.device("cuda"))
    graphs = Graphs(model, gradients, 1.0, said.append, recorder)
    for step in range(4):
        draw = model.draw(4, 0, step).to(device)
        loss, _ = graphs(images, draw)
        expected = loss_of(model, images, draw)
        wanted = [expected, *torch.autograd.grad(expected, [*model.parameters()])]
        for a, b in zip([loss, *gradients], wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert len(graphs.captured) == 1
    assert not said
