"""Curves of learning: schedules span the run, time and work add up, and the command trains, probes and resumes."""

import json
import shutil

import numpy as np
import pytest

pytest.importorskip("omegaconf")
pytest.importorskip("nvidia.dali")
pytest.importorskip("PIL")

from PIL import Image

from bench import learning
from bench.learning import PRESETS, RUNS, Preset
from ijepa_fast.config import load_config
from ijepa_fast.engine.schedules import Schedule
from ijepa_fast.eval.figures import figures_of
from ijepa_fast.run.build import Length, build_method
from tests.launch import ROOT

SMALL = Preset(steps=300, batch=64, probes=3, images=100, seeds=(0,))


def config_of(name, preset, images=50_000):
    base, changes = RUNS[name]
    overrides = [*changes, *learning.overrides_of(preset, images), *learning.method_overrides(name, preset, images)]
    return load_config(ROOT / "configs" / f"{base}.yaml", ["name=x", *overrides])


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("preset", [SMALL, PRESETS["gpu"]], ids=["cpu", "gpu"])
def test_schedules_span_the_run(name, preset):
    config = config_of(name, preset)
    length = Length.of(config, 50_000)
    schedule, total = Schedule(config.optim, length.steps_per_epoch), length.steps
    assert total == preset.steps
    rates = [schedule.learning_rate(step) for step in range(total)]
    assert max(rates) == pytest.approx(config.optim.lr)
    assert np.argmax(rates) == pytest.approx(0.1 * total, abs=2)
    assert rates[-1] == pytest.approx(config.optim.final_lr, abs=1e-6)
    if build_method(config).averaged:
        kept = np.prod([schedule.ema_momentum(step) for step in range(total)])
        assert kept < 0.01  # of the first weights in the average


def test_all_compare_the_same_encoder_and_batch():
    configs = [config_of(name, SMALL) for name in RUNS]
    shared = {(c.model.dim, c.model.depth, c.model.heads, c.model.patch, c.data.crop, c.batch_size) for c in configs}
    assert len(shared) == 1


def test_work_by_method():
    """Pixels need no target encoder; MAE sees a quarter of the patches, iBOT two large crops and small ones."""
    work = {name: learning.work_per_image(config_of(name, SMALL)) for name in ("ijepa", "mae", "pixels", "ibot")}
    assert max(work["mae"], work["pixels"]) < work["ijepa"] < work["ibot"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Two classes, bright and dark, 20 of each to train on and 10 to test on."""
    folder, generator = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for split, count in (("train", 20), ("test", 10)):
        for kind, low in (("bright", 128), ("dark", 0)):
            (folder / split / kind).mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(low, low + 128, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / kind / f"{i}.jpg")
    return folder


def test_images_without_two_classes_are_refused_before_any_run(photos, tmp_path, capsys):
    for part in ("train", "test"):
        shutil.copytree(photos / part / "dark", tmp_path / "data" / part / "dark")
    options = ["--data", str(tmp_path / "data"), "--preset", "cpu", "--out", str(tmp_path / "out")]
    assert learning.main([*options, "--runs", "mae"]) == 1
    assert "/train: all images have the same class" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("mae*"))


@pytest.mark.slow
def test_the_command_trains_probes_and_does_nothing_twice(tmp_path, photos, capsys, monkeypatch):
    options = ["--data", str(photos), "--runs", "mae,random,cae", "--preset", "cpu", "--out", str(tmp_path)]
    options += ["--steps", "4", "--batch", "8", "--probes", "2", "--images", "40", "--seeds", "0"]
    options += ["model.dim=32", "model.depth=2", "model.heads=2", "model.predictor_depth=1"]
    assert learning.main(options) == 0
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "learning.json").read_text())
    assert [record["run"] for record in result["records"]] == ["mae", "random", "cae"]
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["tokens-512-of-4.safetensors"]
    for record in result["records"]:
        points = record["points"]
        assert [point["step"] for point in points] == [0, 2, 4]
        assert points[2]["petaflop"] == pytest.approx(2 * points[1]["petaflop"])
        assert points[2]["seconds"] > points[1]["seconds"] > 0
        assert {"version", "date", "host", "device", "versions", "commit"} <= record.keys()
        untrained = figures_of(points[0])
        for point in points:
            figures = figures_of(point)
            assert [f.probe for f in figures] == ["linear", "10-NN", "20-NN"]
            assert [f.untrained for f in figures] == [f.value for f in untrained]
            assert {(f.task, f.metric, f.chance, f.n) for f in figures} == {("class", "accuracy", 0.5, 20)}
    assert (tmp_path / "learning.png").read_bytes().startswith(b"\x89PNG")
    assert "| random | 1 | 4 |" in printed

    monkeypatch.setattr(learning.subprocess, "run", lambda *args, **kwargs: pytest.fail("trained again"))
    assert learning.main(options) == 0
    assert capsys.readouterr().out == printed
    assert learning.main([*options, "optim.lr=1"]) == 1
    assert "other settings" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.thorough
def test_options_are_compared_by_one_command(tmp_path, photos, capsys):
    """One at a time and together, with a teacher that the same command trained."""
    options = ["--data", str(photos), "--runs", "mae,sigreg0.0002,salt+xavier+deep", "--preset", "cpu"]
    options += [
        "--out",
        str(tmp_path),
        "--steps",
        "2",
        "--batch",
        "8",
        "--probes",
        "1",
        "--images",
        "40",
        "--seeds",
        "0",
    ]
    options += ["model.dim=32", "model.depth=3", "model.heads=2", "model.predictor_dim=32", "model.predictor_depth=1"]
    assert learning.main(options) == 0
    result = json.loads((tmp_path / "learning.json").read_text())
    assert [record["run"] for record in result["records"]] == ["mae", "sigreg0.0002", "salt+xavier+deep"]
    salt = result["records"][2]["settings"]
    assert f"objective.options.teacher_from={tmp_path / 'mae-0' / 'weights.safetensors'}" in salt
    assert "objective.options.target_layers=3" in salt
    assert "| salt+xavier+deep | 1 | 2 |" in capsys.readouterr().out
    assert learning.main([*options[:3], "salt", *options[4:], "--seeds", "1"]) == 1
    assert "its teacher is the run mae of the same seed" in capsys.readouterr().err


@pytest.mark.parametrize("name", [*learning.OPTIONS, "xavier+deep+flip"])
def test_every_option_is_a_run_of_i_jepas(name):
    base, changes = learning.changes_of(name)
    found = load_config(base, changes)
    assert found.objective.method == "ijepa"
    if "salt" not in name:
        options = build_method(found).options
        assert options != build_method(load_config(base, [])).options or found.data.flip
    assert learning.changes_of(f"{name}+nothing") is None


def test_steps_fit_into_the_minutes(tmp_path, photos):
    """Timed once; twice the time is twice the steps."""
    tiny = ["model.dim=32", "model.depth=1", "model.heads=2", "model.predictor_depth=1", "engine.precision=fp32"]
    preset = Preset(steps=4, batch=4, probes=2, images=20, seeds=(0,))
    steps = learning.steps_in(1.0, "cae", preset, photos, tmp_path, tiny)
    assert steps == learning.steps_in(1.0, "cae", preset, photos, tmp_path, tiny)
    kept = json.loads((tmp_path / "cae-steps.json").read_text())
    assert steps == round(60 / kept["seconds_per_step"]) > 100


@pytest.mark.parametrize("options", [["--minutes", "0"], ["--minutes", "1", "--steps", "5"]])
def test_minutes_that_cannot_be_are_named(options, capsys):
    with pytest.raises(SystemExit):
        learning.main(["--data", ".", *options])
    assert "--minutes: expected more than 0 and no --steps beside it" in capsys.readouterr().err


def test_a_run_that_does_not_exist_is_named(capsys):
    with pytest.raises(SystemExit) as stop:
        learning.main(["--data", ".", "--runs", "nowhere"])
    assert stop.value.code == 2
    assert "nowhere" in capsys.readouterr().err
