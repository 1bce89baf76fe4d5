"""The comparison of methods: the command trains, probes, searches and resumes, and says first what cannot be."""

import json
from functools import partial

import numpy as np
import pytest

pytest.importorskip("omegaconf")
pytest.importorskip("nvidia.dali")
pytest.importorskip("PIL")

from PIL import Image

from bench import learning
from bench.compare import train
from bench.compare.images import Images
from bench.compare.minutes import steps_in
from bench.compare.presets import Preset
from bench.compare.tables import tables
from ijepa_fast.eval.attentive import AttentiveProtocol
from ijepa_fast.eval.figures import figures_of

TINY = ["model.dim=32", "model.depth=2", "model.heads=2", "model.predictor_dim=32", "model.predictor_depth=1"]


def command(folder, out, *options):
    """A few steps of the runs that the options name."""
    sizes = ["--preset", "cpu", "--batch", "8", "--images", "40", "--seeds", "0", "--ends", "none"]
    return ["--data", str(folder), "--out", str(out), *sizes, *options, *TINY]


def write(folder, train_images=20, kinds=("bright", "dark")):
    """Classes that are told by their brightness, so many images of each to train on and 10 to test on."""
    generator = np.random.default_rng(0)
    for split, count in (("train", train_images), ("test", 10)):
        for kind in kinds:
            (folder / split / kind).mkdir(parents=True)
            low = 128 if kind == "bright" else 0
            for i in range(count):
                pixels = generator.integers(low, low + 128, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / kind / f"{i}.jpg")
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write(tmp_path_factory.mktemp("photos"))


@pytest.mark.slow
def test_the_command_trains_probes_and_does_nothing_twice(tmp_path, photos, capsys, monkeypatch):
    short = partial(AttentiveProtocol, epochs=1, least_steps=4)
    monkeypatch.setattr("ijepa_fast.eval.attentive.AttentiveProtocol", short)
    options = command(photos, tmp_path, "--runs", "mae,random,cae", "--steps", "4", "--probes", "2")
    options += ["--ends", "blocks,attentive,lowshot"]
    assert learning.main(options) == 0
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "learning.json").read_text())
    assert [record["run"] for record in result["records"]] == ["mae", "random", "cae"]
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["tokens-512-of-4.safetensors"]
    ends = ["linear", "linear, block 1", "linear, block 2", "linear, best", "10-NN", "20-NN", "attentive"]
    for record in result["records"]:
        points = record["points"]
        assert [point["step"] for point in points] == [0, 2, 4]
        assert points[2]["petaflop"] == pytest.approx(2 * points[1]["petaflop"])
        assert points[2]["seconds"] > points[1]["seconds"] > 0
        assert {"version", "date", "host", "device", "versions", "commit"} <= record.keys()
        untrained = {figure.probe: figure.value for figure in figures_of(points[0])}
        for point, probes in zip(points, ([*ends, train.LOW_SHOT], ["linear", "10-NN", "20-NN"], untrained)):
            figures = figures_of(point)
            assert [f.probe for f in figures] == list(probes)
            assert [f.untrained for f in figures] == [untrained[f.probe] for f in figures]
            assert {(f.task, f.metric, f.chance, f.n) for f in figures} == {("class", "accuracy", 0.5, 20)}
            assert all(f.error > 0 for f in figures)
    assert (tmp_path / "learning.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "masks.png").exists()
    assert "| random | 1 | 4 |" in printed
    assert "| run | learning rate | linear | best block | 20-NN | attentive | 1 % low-shot |" in printed
    assert (tmp_path / "learning.md").read_text() == printed == tables(result) + "\n"

    monkeypatch.setattr(train.subprocess, "run", lambda *args, **kwargs: pytest.fail("trained again"))
    assert learning.main(options) == 0
    assert capsys.readouterr().out == printed
    assert learning.main([*options, "optim.lr=1"]) == 1
    assert "other settings" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.thorough
def test_options_are_compared_by_one_command(tmp_path, photos, capsys):
    """One at a time and together, with a teacher that the same command trained, whose steps are counted beside."""
    runs = ["--runs", "mae,sigreg0.0002,salt+xavier+deep", "--steps", "2", "--probes", "1"]
    assert learning.main([*command(photos, tmp_path, *runs), "model.depth=3"]) == 0
    result = json.loads((tmp_path / "learning.json").read_text())
    mae, sigreg, salt = result["records"]
    assert [mae["run"], sigreg["run"], salt["run"]] == ["mae", "sigreg0.0002", "salt+xavier+deep"]
    trained = (tmp_path / "salt+xavier+deep-0" / "config.yaml").read_text()
    assert f"teacher_from: {tmp_path / 'mae-0' / 'weights.safetensors'}" in trained
    assert not [setting for setting in salt["settings"] if str(tmp_path) in setting]  # a folder may be moved
    assert "objective.options.target_layers=3" in salt["settings"]
    assert mae["teacher"] is sigreg["teacher"] is None
    last = mae["points"][-1]
    assert salt["teacher"] == {"run": "mae"} | {key: last[key] for key in ("step", "petaflop", "seconds")}
    assert "| salt+xavier+deep | 1 | 2 |" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.thorough
def test_a_rate_is_searched_on_training_images_and_taken(tmp_path, photos, monkeypatch):
    """Trials keep their figures, and the run has the best one's rate; a nuisance run has that of the clean one."""
    monkeypatch.setattr("bench.compare.search.MOST", 3)
    runs = ["--runs", "ijepa,ijepa@noise32", "--steps", "2", "--probes", "1", "--search-lr", "--search-steps", "1"]
    assert learning.main(command(photos, tmp_path, *runs)) == 0
    result = json.loads((tmp_path / "learning.json").read_text())
    assert list(result["search"]) == ["ijepa"]
    found = result["search"]["ijepa"]
    rates = [trial["lr"] for trial in found["trials"]]
    assert rates == [2.5e-4, 5e-4, 1e-3]
    assert {record["lr"] for record in result["records"]} == {found["rate"]} <= set(rates)
    best = next(trial for trial in found["trials"] if trial["lr"] == found["rate"])
    assert best["figures"]["class, linear"] == max(trial["figures"]["class, linear"] for trial in found["trials"])
    kept = json.loads((tmp_path / "search" / "0.0005" / "ijepa-1000" / "learning.json").read_text())
    assert {figure.n for figure in figures_of(kept["points"][-1])} == {20}  # half of the 40 training images


def test_steps_fit_into_the_minutes(tmp_path, photos):
    """Timed once; the time kept is the time used."""
    images = Images(photos / "train", photos / "test", tmp_path)
    tiny = ["model.dim=32", "model.depth=1", "model.heads=2", "model.predictor_depth=1", "engine.precision=fp32"]
    preset = Preset(steps=4, batch=4, probes=2, images=20, seeds=(0,))
    steps = steps_in(1.0, "cae", preset, images, tiny)
    assert steps == steps_in(1.0, "cae", preset, images, tiny)
    kept = json.loads((tmp_path / "cae-steps.json").read_text())
    assert steps == round(60 / kept["seconds_per_step"]) > 100


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--runs", "nowhere"], "--runs: expected of "),
        (["--runs", "ijepa@fog3"], "got ijepa@fog3"),
        (["--runs", "ijepa@noise0"], "got ijepa@noise0"),
        (["--runs", "ijepa,salt"], "salt: its teacher is the run mae of the same seed, not found in "),
        (["--runs", "salt,mae"], "name mae before it"),
        (["--runs", "mae,salt@noise32"], "name mae@noise32 before it"),
        (["--minutes", "0"], "--minutes: expected more than 0 and no --steps beside it"),
        (["--minutes", "1", "--steps", "5"], "--minutes: expected more than 0 and no --steps beside it"),
        (["--minutes", "1", "--runs", "mae,salt"], "--minutes: salt has a teacher that is not there"),
        (["--images", "19"], "--images: expected at least 20"),
        (["--seeds", "one"], "--seeds: expected whole numbers"),
        (["--seeds", "1000", "--search-lr"], "--seeds: 1000 is the seed of --search-lr"),
        (["--search-steps", "5"], "--search-steps: there is no search without --search-lr"),
        (["--ends", "blocks,none"], "--ends: expected of blocks, attentive, lowshot, or none"),
        (["--steps", "2", "--probes", "3"], "--probes: expected at most the 2 steps of a run, got 3"),
        (["--batch", "41"], "--batch: expected at most the 40 images of --data, got 41"),
        (["--runs", "ijepa@share8"], "--batch: expected at most the 4 images of --data, got 8"),
        (["--runs", "ijepa", "optim.lr=-1"], "optim.lr: expected at least 0"),
        (["--runs", "ijepa,dino", "objective.options.target=pixels"], "objective.options.target"),
        (["--runs", "ijepa", "data.nothing=1"], "data.nothing"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_trained(tmp_path, photos, options, words, capsys, monkeypatch):
    monkeypatch.setattr(train.subprocess, "run", lambda *args, **kwargs: pytest.fail("trained"))
    assert learning.main(command(photos, tmp_path, *options)) == 1
    error = capsys.readouterr().err
    assert words in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: folder, "does not exist"),
        (lambda folder: write(folder, kinds=("bright",)), "/train: all images have the same class"),
        (lambda folder: write(folder, train_images=9), "expected at least 20 training images"),
        (lambda folder: write(folder, train_images=4), "k-NN takes at least 10 training images, got 8"),
        (lambda folder: write(folder) / "train" / "bright", "does not exist"),
    ],
    ids=["nothing", "one class", "fewer than 20", "fewer than neighbours", "no parts"],
)
def test_images_that_cannot_be_probed_are_named(tmp_path, make, words, capsys):
    assert learning.main(command(make(tmp_path / "photos"), tmp_path / "out")) == 1
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_images_without_labels_are_named(tmp_path, capsys):
    for part in ("train", "test"):
        (tmp_path / part).mkdir()
        for i in range(20):
            Image.new("RGB", (32, 32)).save(tmp_path / part / f"{i}.png")
    assert learning.main(command(tmp_path, tmp_path / "out")) == 1
    assert "found no labels" in capsys.readouterr().err
