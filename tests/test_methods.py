"""MAE and iBOT through the trainer: the same command, exact resumption, every ZeRO stage; and methods of another's."""

import json

import pytest
import torch

from tests.launch import ROOT, command, finish, losses, run, start

pytest.importorskip("deepspeed")
pytest.importorskip("nvidia.dali")
pytest.importorskip("PIL")

from safetensors.torch import load_file

from ijepa_fast.config import ConfigError, load_config
from ijepa_fast.run.build import build_objective
from tests.data_images import write_photos

TINY = {
    "mae_cifar10": ["mask.min_keep=null", "model.predictor_dim=32"],
    "ibot_cifar10": [
        "mask.min_keep=null",
        "objective.options={small_crops: 2, hidden: 16, bottleneck: 8, prototypes: 32}",
    ],
}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    write_photos(folder, 40, size=40)
    return folder


def checkpoint(folder, step):
    """Every tensor of a checkpoint's rank files."""
    tensors = {}
    for path in sorted((folder / "checkpoints" / f"step-{step:08d}").glob("rank-*")):
        tensors |= load_file(path)
    return tensors


@pytest.mark.slow
@pytest.mark.parametrize("config", TINY)
def test_resumed_is_bitwise_unbroken(tmp_path, photos, config):
    """Views, masks, dropped branches, temperatures and centres are part of it; an epoch is 5 steps."""
    options = (*TINY[config], f"data.source={photos}", "optim.epochs=4")
    unbroken = run(tmp_path, "name=unbroken", "optim.steps=6", *options, config=config)
    run(tmp_path, "name=broken", "optim.steps=3", *options, config=config)
    broken = run(tmp_path, "name=broken", "optim.steps=6", *options, config=config)
    assert losses(broken) == losses(unbroken)
    expected, found = checkpoint(unbroken, 6), checkpoint(broken, 6)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    if config == "ibot_cifar10":
        assert found["centre|carried|0"].any()
    summary = json.loads((broken / "summary.json").read_text())
    assert summary["steps"] == 6


@pytest.mark.slow
@pytest.mark.multi_rank
@pytest.mark.parametrize(("config", "ranks"), [("mae_cifar10", 1), ("ibot_cifar10", 2)])
def test_stage_3_gives_the_trajectory_of_stage_1(tmp_path, config, ranks):
    """Of iBOT on two ranks, whose centres are one."""
    options = (*TINY[config], "optim.steps=3")
    folders = [
        run(tmp_path, f"name=stage{stage}", f"engine.zero={stage}", *options, ranks=ranks, config=config)
        for stage in (1, 3)
    ]
    assert losses(folders[0]) == pytest.approx(losses(folders[1]), rel=1e-5)
    weights = [load_file(f / "checkpoints" / "step-00000003" / "weights.safetensors") for f in folders]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=1e-3, atol=1e-5, msg=name)


def overrides_of(config, *more):
    return command("runs", *TINY.get(config, ()), *more)[5:]


def test_maes_target_encoder_is_its_encoder():
    config = load_config(ROOT / "configs" / "mae_cifar10.yaml", overrides_of("mae_cifar10"))
    assert (config.optim.momentum, config.optim.final_momentum) == (0, 0)
    objective = build_objective(config)
    for p, q in zip(objective.encoder.parameters(), objective.target_encoder.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize(
    ("config", "override", "words"),
    [
        ("mae_cifar10", "objective.options={maksed: 0.5}", ["objective.options.maksed", "did you mean", "masked"]),
        ("mae_cifar10", "objective.options={masked: much}", ["objective.options.masked", "much"]),
        ("mae_cifar10", "mask.strategy=block", ["mask", "draws its own masks"]),
        ("mae_cifar10", "objective.method=bench.baselines.may", ["objective.method", "bench.baselines.may"]),
        ("quickstart", "objective.options={masked: 0.5}", ["objective.options", "ijepa"]),
    ],
)
def test_mistakes_name_the_key(config, override, words):
    with pytest.raises(ConfigError) as error:
        build_objective(load_config(ROOT / "configs" / f"{config}.yaml", [override]))
    for word in words:
        assert word in str(error.value)


def test_the_trainer_says_so_too(tmp_path):
    statuses, errors = finish(start(tmp_path, "objective.method=nowhere", "mask.min_keep=null", config="mae_cifar10"))
    assert statuses == [1]
    assert "error: objective.method" in errors
