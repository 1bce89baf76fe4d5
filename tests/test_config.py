"""Configurations: the ready ones hold the published values, and mistakes name the key."""

from pathlib import Path

import pytest

pytest.importorskip("omegaconf")

from ijepa_fast.config import (
    Config,
    ConfigError,
    Data,
    Model,
    check,
    flatten,
    is_fixed,
    keys,
    load_config,
    present,
    resolve,
    save_config,
)

CONFIGS = Path(__file__).parents[1] / "configs"
QUICKSTART = CONFIGS / "quickstart.yaml"

# Published: (width, depth, heads, patch, crop, predictor depth, epochs, warm-up), FACTS of the recipes' files.
PUBLISHED = {
    "in1k_vith14_ep300": (1280, 32, 16, 14, 224, 12, 300, 40),
    "in1k_vith16_448_ep300": (1280, 32, 16, 16, 448, 12, 300, 40),
    "in22k_vith14_ep66": (1280, 32, 16, 14, 224, 12, 66, 3),
    "in22k_vitg16_ep44": (1408, 40, 16, 16, 224, 16, 44, 3),
}
COMMON = {
    "batch_size": 2048,
    "data.scale": [0.3, 1.0],
    "data.flip": False,
    "data.interpolation": "bilinear",
    "mask.strategy": "multiblock-reference",
    "mask.policy": "truncate",
    "mask.targets": 4,
    "mask.target_scale": [0.15, 0.2],
    "mask.target_aspect": [0.75, 1.5],
    "mask.context_scale": [0.85, 1.0],
    "mask.min_keep": 10,
    "model.predictor_dim": 384,
    "objective.options.loss": "smooth_l1",
    "optim.lr": 1e-3,
    "optim.start_lr": 2e-4,
    "optim.final_lr": 1e-6,
    "optim.weight_decay": 0.04,
    "optim.final_weight_decay": 0.4,
    "optim.weight_decay_shape": "cosine",
    "optim.betas": [0.9, 0.999],
    "optim.eps": 1e-8,
    "optim.ema": 0.996,
    "optim.final_ema": 1.0,
    "optim.clip": 0.0,
    "engine.precision": "bf16",
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_recipes_hold_the_published_values(name):
    flat = flatten(load_config(CONFIGS / f"{name}.yaml"))
    keys = ("model.dim", "model.depth", "model.heads", "model.patch", "data.crop", "model.predictor_depth")
    keys += ("optim.epochs", "optim.warmup_epochs")
    assert tuple(flat[key] for key in keys) == PUBLISHED[name]
    assert {key: flat[key] for key in COMMON} == COMMON


def test_giant_has_the_published_mlp_ratio():
    assert load_config(CONFIGS / "in22k_vitg16_ep44.yaml").model.mlp_ratio == 48 / 11


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_config_loads_and_names_its_command(path):
    assert load_config(path).name
    header = path.read_text().split("\n\n")[0]
    assert f"--config configs/{path.name}" in header
    assert "Expected" in header


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optim.lrr=1", ["optim.lrr", "did you mean optim.lr"]),
        ("optim=1", ["optim", "section"]),
        ("optim.lr=fast", ["optim.lr", "fast"]),
        ("engine.zero=4", ["engine.zero", "0, 1, 2, 3", "4"]),
        ("data.crop=65", ["data.crop=65", "model.patch=8", "set data.crop to 64"]),
        ("model.dim=0", ["model.dim is not set", "model.arch", "vit_huge"]),
        ("model.depth=-1", ["model.depth", "at least 0"]),
        ("model.heads=5", ["model.dim", "model.heads=5"]),
        ("model.arch=vit_enormous", ["model.arch", "vit_huge", "vit_enormous"]),
        ("batch_size=0", ["batch_size", "at least 1"]),
        ("engine.accumulation=7", ["batch_size", "engine.accumulation=7"]),
        ("mask.policy=budget", ["mask.budget", "policy"]),
        ("mask.budget=9", ["mask.budget", "policy"]),
        ("data.scale=[0.5]", ["data.scale", "two numbers"]),
        ("data.scale=[0.5,2]", ["data.scale", "at most 1"]),
        ("model.patch_std=0", ["model.patch_std", "more than 0"]),
        ("optim.warmup_epochs=99", ["optim.warmup_epochs", "optim.epochs"]),
        ("nonsense", ["nonsense", "key=value"]),
        ("optim.betas=[0.9]", ["optim.betas", "two numbers"]),
        ("optim.betas=[0.9,1]", ["optim.betas", "at most"]),
        ("optim.steps=0", ["optim.steps", "at least 1"]),
        ("optim.lr=-1", ["optim.lr", "at least 0"]),
        ("optim.ema=2", ["optim.ema", "at most 1"]),
        ("optim.horizon=0", ["optim.horizon", "more than 0"]),
        ("data.mean=[0.5]", ["data.mean", "3 numbers", "ijepa_fast stats"]),
        ("data.std=[0,1,1]", ["data.std", "more than 0"]),
        ("data.max_bad_share=2", ["data.max_bad_share", "at most 1"]),
    ],
)
def test_mistakes_name_the_key_and_the_way_out(override, words):
    with pytest.raises(ConfigError) as error:
        load_config(QUICKSTART, [override])
    for word in words:
        assert word in str(error.value)


def test_missing_file():
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        load_config("nowhere.yaml")


def test_a_saved_config_loads_to_the_same(tmp_path):
    config = load_config(QUICKSTART, ["optim.lr=2e-3", "kernels={layer_norm: reference}"])
    save_config(config, tmp_path / "config.yaml")
    assert flatten(load_config(tmp_path / "config.yaml")) == flatten(config)


def test_checking_changes_nothing():
    config = load_config(QUICKSTART)
    before = flatten(config)
    check(config)
    assert flatten(config) == before
    unresolved = Config(name="x", data=Data(source="synthetic"), model=Model(arch="vit_tiny"))
    assert resolve(unresolved).model.dim == 192
    assert unresolved.model.dim == 0


@pytest.mark.parametrize(("key", "f"), list(keys(Config)), ids=[name for name, _ in keys(Config)])
def test_every_key_says_what_it_is(key, f):
    assert f.metadata["meaning"]
    assert isinstance(f.metadata["fixed"], bool)


def test_keys_of_earlier_versions_are_accepted_with_a_word(capsys):
    old = ["optim.momentum=0.9", "optim.final_momentum=0.95", "optim.momentum_shape=cosine", "mask.ladder=false"]
    config = load_config(QUICKSTART, [*old, "objective.loss=l2", "objective.target=pixels"])
    assert (config.optim.ema, config.optim.final_ema, config.optim.ema_shape) == (0.9, 0.95, "cosine")
    assert not config.mask.padding
    own = {"target_layers": 0, "init": "xavier"}  # of the file
    assert config.objective.options == {"loss": "l2", "target": "pixels"} | own
    assert "optim.momentum is called optim.ema now" in capsys.readouterr().err


def test_methods_of_earlier_versions_are_accepted_with_a_word(capsys):
    old = ["objective.method=bench.baselines.mae", "objective.loss=l2", "objective.target=features"]
    config = load_config(CONFIGS / "mae_cifar10.yaml", old)
    assert config.objective.method == "mae"
    assert config.objective.options == {}
    assert "bench.baselines.mae is called mae now" in capsys.readouterr().err


def test_flattened_configurations_of_earlier_versions():
    then = {"objective.method": "bench.baselines.mae", "objective.loss": "l2", "objective.options": {"masked": 0.5}}
    assert present(then) == {"objective.method": "mae", "objective.options.masked": 0.5}
    assert present({"objective.loss": "l2", "optim.momentum": 1}) == {"objective.options.loss": "l2", "optim.ema": 1}
    # A fixed key whose default changed does not make today's run another; a value that somebody chose does.
    assert present({"data.max_pixels": 178_956_970, "seed": 1}) == {"seed": 1}
    assert present({"data.max_pixels": 1000}) == {"data.max_pixels": 1000}


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "a/../../x", "..", "."])
def test_a_run_lies_inside_the_folder_of_runs(name):
    with pytest.raises(ConfigError, match=r"name=.*: expected the name of a folder inside runs; choose another"):
        load_config(QUICKSTART, [f"name={name}"])
    assert load_config(QUICKSTART, ["name=sweep/a..b"]).folder == Path("runs/sweep/a..b")


@pytest.mark.parametrize(
    ("key", "fixed"),
    [
        ("seed", True),
        ("data.source", True),
        ("objective.options.loss", True),
        ("optim.lr", False),
        ("batch_size", False),
        ("engine.zero", False),
    ],
)
def test_what_a_resumed_run_may_change(key, fixed):
    assert is_fixed(key) is fixed
