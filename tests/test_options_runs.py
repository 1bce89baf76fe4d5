"""Runs with I-JEPA's options: one trajectory on any stage and ranks, a resume to the bit, mistakes said at once."""

import json
import shutil

import pytest
import torch

from tests.launch import PUBLISHED_MASKS, finish, losses, run, some, start

pytest.importorskip("deepspeed")
pytest.importorskip("nvidia.dali")

from safetensors.torch import load_file

from ijepa_fast.interop.load import read

ALL = (
    "target_norm: position, target_layers: 2, regulariser: vicreg, projector: [16, 8], mask_sets: 2, init: xavier, "
    "visible_weight: 0.5, visible_epochs: 0.001"
)
RANDOM = "teacher: random, target_norm: position, target_layers: 2"
SALT = "teacher: frozen, target_norm: batch, regulariser: sigreg, slices: 16"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A short run of another method, which leaves an encoder with a class token."""
    options = ["mask.min_keep=null", "model.predictor_dim=32", "optim.steps=2", "name=teacher"]
    return run(tmp_path_factory.mktemp("teachers"), *options, config="mae_cifar10")


def options_of(kind, teacher):
    chosen = {"all": ALL, "random": RANDOM, "salt": f"{SALT}, teacher_from: {teacher}"}[kind]
    return [
        "batch_size=16",
        f"objective.options={{{chosen}}}",
        "data.mean=[0.485,0.456,0.406]",
        "data.std=[0.229,0.224,0.225]",
    ]


def tensors_of(folder, step):
    found = {}
    for path in sorted((folder / "checkpoints" / f"step-{step:08d}").glob("rank-*")):
        found |= load_file(path)
    return found


@pytest.mark.slow
@pytest.mark.multi_rank
@pytest.mark.parametrize("kind", some(["all", "random", "salt"], "all", "salt"))
def test_stages_and_ranks_give_one_trajectory(tmp_path, teacher, kind):
    folders = [
        run(
            tmp_path,
            *options_of(kind, teacher),
            f"name=of-{ranks}-{zero}",
            f"engine.zero={zero}",
            "optim.steps=3",
            ranks=ranks,
        )
        for ranks, zero in ((1, 1), (2, 0), (2, 2), (2, 3))
    ]
    expected = losses(folders[0])
    weights = [read(folder).networks["encoder"] for folder in folders]
    for folder, state in zip(folders[1:], weights[1:]):
        assert losses(folder) == pytest.approx(expected, rel=1e-5)
        for name, tensor in weights[0].items():
            torch.testing.assert_close(state[name], tensor, rtol=1e-3, atol=2e-5, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("kind", some(["all", "random", "salt"], "random", "salt"))
def test_a_resume_is_to_the_bit(tmp_path, teacher, kind):
    """With running statistics, and with a teacher that is read again."""
    options = options_of(kind, teacher)
    unbroken = run(tmp_path, *options, "name=unbroken", "optim.steps=4")
    run(tmp_path, *options, "name=broken", "optim.steps=2")
    broken = run(tmp_path, *options, "name=broken", "optim.steps=4")
    assert losses(broken) == losses(unbroken)
    expected, found = tensors_of(unbroken, 4), tensors_of(broken, 4)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    carried = {name.partition("|")[0] for name in found if "|carried|" in name}
    more, expected_terms = {
        "all": ({"target_statistics"}, {"prediction", "visible", "similarity", "deviation", "covariance"}),
        "random": ({"target_statistics", "teacher"}, set()),
        "salt": ({"teacher"}, {"prediction", "sigreg"}),
    }[kind]
    assert carried == more
    last = json.loads((broken / "log.jsonl").read_text().splitlines()[-1])
    assert last.get("loss_terms", {}).keys() == expected_terms


@pytest.mark.slow
def test_a_teacher_that_changed_between_is_refused(tmp_path, teacher):
    copy = tmp_path / "teacher"
    shutil.copytree(teacher, copy)
    options = options_of("salt", copy)
    folder = run(tmp_path, *options, "optim.steps=2")
    (weights,) = copy.glob("checkpoints/step-*/weights.safetensors")
    content = bytearray(weights.read_bytes())
    content[-4] ^= 1  # the last bit of the last value
    weights.write_bytes(content)
    statuses, errors = finish(start(tmp_path, *options, "optim.steps=3"))
    assert statuses == [1]
    assert f"objective.options.teacher_from: {copy} holds other weights than when the run was begun" in errors
    assert sorted(path.name for path in (folder / "checkpoints").glob("step-*")) == ["step-00000002"]


@pytest.mark.slow
def test_what_is_wrong_with_a_teacher_is_said_at_the_start(tmp_path, teacher):
    for changes, words in (
        ([f"objective.options.teacher_from={tmp_path / 'nowhere'}"], "does not exist; expected a run's folder"),
        (["model.patch=8", *PUBLISHED_MASKS], "expected 4 x 4 patches of 8 pixels"),
        (["model.dim=64"], "expected features of width model.dim=64, got 32"),
    ):
        statuses, errors = finish(start(tmp_path, *options_of("salt", teacher), *changes))
        assert statuses == [1]
        assert "error: objective.options.teacher_from: " in errors
        assert words in errors
        assert not (tmp_path / "quickstart").exists()
