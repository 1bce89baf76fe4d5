"""`init`: a new run that starts from other weights: exactly, in all three networks, at every ZeRO stage."""

import pytest
import torch

pytest.importorskip("PIL")

from tests.interop_files import HEADS, published
from tests.launch import PUBLISHED_MASKS, ROOT, TINY, command, run

pytest.importorskip("deepspeed")
pytest.importorskip("nvidia.dali")

from ijepa_fast.config import ConfigError, load_config
from ijepa_fast.eval.figures import Figure
from ijepa_fast.interop.huggingface import save_hf
from ijepa_fast.interop.load import load, read
from ijepa_fast.interop.weights import resample_positions, save_weights
from ijepa_fast.report import summary
from ijepa_fast.run.build import build_method
from ijepa_fast.run.sources import untrained
from ijepa_fast.train import main

MODEL = ["data.crop=64", "model.patch=8", "model.dim=96", "model.depth=3", f"model.heads={HEADS}"]
MODEL += ["model.predictor_dim=48", "model.predictor_depth=2"]
# A step that leaves the trained weights as they are, and the average: what is saved is what was begun with.
STILL = ["optim.steps=1", "optim.start_lr=0", "optim.lr=0", "optim.final_lr=0", "optim.ema=1", "optim.final_ema=1"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("published") / "published.pth.tar"
    torch.save(published(), path)
    return path


def assert_same(found, weights, but=()):
    for name in ("encoder", "predictor", "target_encoder"):
        state, wanted = found.networks[name], weights.networks[name]
        assert state.keys() == wanted.keys()
        for key, tensor in wanted.items():
            if key not in but:
                assert torch.equal(state[key], tensor), (name, key)


@pytest.mark.slow
def test_a_run_begins_with_the_published_networks(checkpoint, tmp_path):
    """To the bit, also where it computes in bf16."""
    folder = run(tmp_path, *MODEL, *STILL, f"init={checkpoint}", "engine.zero=3", "engine.precision=bf16")
    weights = read(checkpoint, HEADS)
    assert not torch.equal(
        weights.networks["encoder"]["norm.weight"], weights.networks["target_encoder"]["norm.weight"]
    )
    assert_same(read(folder), weights)


def test_before_training_is_what_it_begins_with(checkpoint, monkeypatch, capsys):
    """Not the random weights of its seed; where the file was moved away since, no figures rather than wrong ones."""
    options = [*TINY, *MODEL, "data.crop=80"]
    found = untrained(load_config("quickstart", [*options, f"init={checkpoint}"]), torch.device("cpu"))
    wanted = load(checkpoint, image_size=80, heads=HEADS)
    for name, tensor in wanted.encoder.state_dict().items():
        assert torch.equal(found.encoder.state_dict()[name], tensor), name
    assert torch.equal(found.encoder.positions, wanted.encoder.positions)
    probed = ["probe.enabled=true", "probe.test=somewhere"]
    moved = load_config("quickstart", [*options, *probed, "init=/moved.pth.tar"])
    with pytest.raises(ConfigError, match=r"init: /moved\.pth\.tar does not exist"):
        untrained(moved, torch.device("cpu"))
    figure = Figure("kind", "linear", "accuracy", 0.5, None, (), 0.25, None, 1000)
    monkeypatch.setattr(summary, "evaluate", lambda encoder, *labelled: [figure])
    figures = summary._evaluate(moved, build_method(moved), (None, None, None), torch.device("cpu"))
    assert [figure.untrained for figure in figures] == [None]
    assert "figures before training are left out: init: /moved.pth.tar" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.multi_rank
def test_on_two_ranks_at_another_resolution_and_resumed(checkpoint, tmp_path):
    """Positions are resampled, kept in the checkpoint, and found again by a run that goes on without the file."""
    options = [*MODEL, *STILL, "data.crop=80", f"init={checkpoint}"]
    folder = run(tmp_path, *options, ranks=2)
    weights, tables = read(checkpoint, HEADS), ("pos_embed", "predictor_pos_embed")
    assert_same(read(folder), weights, but=tables)
    wanted = resample_positions(weights.networks["encoder"]["pos_embed"], weights.arch.grid, (10, 10))
    assert torch.equal(read(folder).networks["encoder"]["pos_embed"], wanted)
    moved = checkpoint.rename(checkpoint.with_suffix(".moved"))
    try:
        resumed = read(run(tmp_path, *options, "optim.steps=2", ranks=1))
    finally:
        moved.rename(checkpoint)
    assert resumed.arch.step == 2
    assert_same(resumed, weights, but=tables)
    for name, table in zip(("target_encoder", "predictor"), tables):
        assert torch.equal(
            resumed.networks[name][table],
            resample_positions(weights.networks[name][table], weights.arch.grid, (10, 10)),
        )


@pytest.mark.slow
def test_a_run_that_trains_on_from_an_encoder_alone(checkpoint, tmp_path):
    """From a Hugging Face folder: both encoders move a little from its weights, and the predictor begins anew."""
    weights = read(checkpoint, HEADS)
    save_hf(tmp_path / "hf", weights.networks["target_encoder"], weights.arch)
    options = [
        "optim.steps=2",
        "optim.start_lr=1e-4",
        "optim.lr=1e-4",
        "engine.zero=0",
        "objective.options.init=published",
    ]
    folder = run(tmp_path, *MODEL, f"init={tmp_path / 'hf'}", *options)
    found = read(folder)
    for name in ("encoder", "target_encoder"):
        difference = (
            (found.networks[name]["norm.weight"] - weights.networks["target_encoder"]["norm.weight"]).abs().max()
        )
        assert 0 < difference < 1e-2, name
    key = "predictor_embed.weight"
    assert (found.networks["predictor"][key] - weights.networks["predictor"][key]).abs().mean() > 1e-2
    assert found.networks["predictor"][key].std() == pytest.approx(0.02, rel=0.2)
    assert load(folder).crop == 64


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.dim=64", ["encoder.patch_embed.proj.weight", "(64, 3, 8, 8)", "(96, 3, 8, 8)"]),
        ("model.patch=16", ["encoder.patch_embed.proj.weight", "(96, 3, 16, 16)", "(96, 3, 8, 8)"]),
        ("model.depth=2", ["encoder.blocks.2.", "the model does not"]),
        ("model.depth=4", ["encoder.blocks.3.", "the weights lack it"]),
        ("model.predictor_dim=24", ["predictor.mask_token", "(1, 1, 24)", "(1, 1, 48)"]),
        ("model.heads=2", ["init: the weights have 4 heads, the model 2"]),
        ("init=/nowhere.pth.tar", ["/nowhere.pth.tar does not exist"]),
    ],
)
def test_weights_that_do_not_fit_end_with_one_sentence(checkpoint, tmp_path, monkeypatch, capsys, override, words):
    monkeypatch.chdir(ROOT)
    known = tmp_path / "heads_in_the_header.safetensors"
    save_weights(known, read(checkpoint, HEADS))
    init = known if "heads" in override else checkpoint
    assert main(command(tmp_path, *MODEL, f"init={init}", "mask.min_keep=1", *PUBLISHED_MASKS, override)[2:]) == 1
    errors = capsys.readouterr().err
    assert errors.count("error: ") == 1
    for word in words:
        assert word in errors
    assert not (tmp_path / "quickstart").exists()
