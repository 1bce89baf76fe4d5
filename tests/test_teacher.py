"""Frozen and random teachers: their targets, what a step and a resume do with them, which are refused."""

import pytest
import torch

from ijepa_fast.config import ConfigError
from ijepa_fast.models import teacher as teachers
from ijepa_fast.models.fp8 import FP8Block
from ijepa_fast.models.teacher import fingerprint, former_fingerprint
from ijepa_fast.models.vit import Encoder
from tests.small import BATCH, frozen, images_of, model_of, teacher_of
from tests.steps import loss_and_gradients


def test_a_frozen_teacher_of_the_same_weights_gives_the_same_loss():
    ema, images = model_of(), images_of()
    model = frozen(ema.target_encoder)
    draw = ema.draw(BATCH, 0, 0)
    assert torch.equal(model(images, draw)[0], ema(images, draw)[0])
    assert model.averaged == {}
    assert model.probed is model.encoder
    assert "teacher" not in model.networks
    assert len([*model.parameters()]) == len([*ema.parameters()])


@pytest.mark.parametrize("kind", [{"class_token": True}, {"class_token": True, "readout": "class"}])
def test_a_teacher_with_a_class_token_is_read_by_its_patches(kind):
    teacher = teacher_of(**kind)
    model = frozen(teacher)
    patches, draw = model.patchify(images_of()), model.draw(BATCH, 0, 0)
    expected = teacher(patches, BATCH, "patches")[draw.union_index.long()]
    assert torch.equal(model.targets(patches, draw), expected)


def test_other_weights_of_the_teacher_are_noticed_on_resume():
    model = frozen(teacher_of())
    assert int(model.carried["teacher"]) == fingerprint(model.target_encoder) != 0
    model.resumed()
    model.carried["teacher"].add_(1)
    with pytest.raises(ConfigError, match=r"teacher_from: somewhere holds other weights"):
        model.resumed()


def test_a_run_that_noted_its_teacher_by_a_sum_goes_on():
    model = frozen(teacher_of())
    model.carried["teacher"].fill_(former_fingerprint(model.target_encoder))
    model.resumed()
    assert int(model.carried["teacher"]) == fingerprint(model.target_encoder)


def permuted(encoder):
    """Two values of a matrix change places."""
    with torch.no_grad():
        weight = encoder.blocks[0].mlp.fc1.weight
        weight.view(-1)[:2] = weight.view(-1)[:2].flip(0).clone()


def moved(encoder):
    """The learned positions of another image size, say, in the fixed ones' place."""
    encoder.positions.add_(1)


@pytest.mark.parametrize("change", [permuted, moved])
def test_a_fingerprint_is_of_places_too(change):
    teacher = teacher_of()
    before = fingerprint(teacher)
    assert 0 <= before < 2**61
    assert fingerprint(teacher.to(torch.float64)) == before
    change(teacher)
    assert fingerprint(teacher) != before


@pytest.mark.parametrize("kind", ["frozen", "random"])
def test_a_step_behind_a_frozen_teacher_checks_and_refreshes_nothing(monkeypatch, kind):
    """Either would wait for the device, or quantise weights that never move."""
    model = frozen(teacher_of()) if kind == "frozen" else model_of(teacher="random")
    model.ready()
    model.use_fp8()
    called = []
    monkeypatch.setattr(teachers, "check_same", lambda *_: called.append("check"))
    monkeypatch.setattr(FP8Block, "refresh", lambda _: called.append("refresh"))
    loss_and_gradients(model, images_of(), model.draw(BATCH, 0, 0))
    model.average_changed()
    assert called == []
    model.resumed()
    assert called == ["check"]


def test_layers_are_those_of_the_frozen_teacher():
    """Whose depth is not the student's, 2."""
    assert frozen(teacher_of(5), target_layers=4).target_layers == 4
    for depth, layers in ((1, 2), (5, 6)):
        with pytest.raises(ConfigError) as error:
            frozen(teacher_of(depth), target_layers=layers)
        assert f"target_layers={layers}: expected at most the {depth} blocks of the teacher" in str(error.value)


def test_other_channels_of_a_teacher_are_named_first():
    model = model_of(teacher="frozen", teacher_from="somewhere")
    with pytest.raises(ConfigError, match=r"images of data.channels=3 channels, got one of 1"):
        model.give("teacher", Encoder(64, 8, 32, 2, 2, channels=1), (0.449,), (0.226,))


def test_a_random_teacher_is_the_encoder_as_it_begins_and_stays():
    """At first its targets are the average's; then the encoder moves and the teacher does not."""
    torch.manual_seed(3)
    ema = model_of()
    torch.manual_seed(3)
    model = model_of(teacher="random", target_layers=2)
    model.ready()
    begun = fingerprint(model.encoder)
    assert (
        begun == fingerprint(ema.target_encoder) == fingerprint(model.target_encoder) == int(model.carried["teacher"])
    )
    assert model.averaged == {}
    assert model.probed is model.encoder
    assert len([*model.parameters()]) == len([*ema.parameters()])
    loss_and_gradients(model, images_of(), model.draw(BATCH, 0, 0))
    assert all(param.grad is None for param in model.target_encoder.parameters())
    with torch.no_grad():
        model.encoder.norm.weight.add_(1)
    assert fingerprint(model.target_encoder) == begun != fingerprint(model.encoder)


def test_other_random_weights_are_noticed_on_resume():
    model = model_of(teacher="random")
    model.ready()
    model.resumed()
    model.carried["teacher"].add_(1)
    with pytest.raises(ConfigError, match=r"teacher=random: seed and model give other weights here"):
        model.resumed()
