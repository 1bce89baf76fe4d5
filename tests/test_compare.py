"""What the comparison is made of: runs and their settings, images, the search, tables and plots."""

import io
import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("omegaconf")
pytest.importorskip("nvidia.dali")
pytest.importorskip("PIL")

from PIL import Image

from bench.compare import plots, tables
from bench.compare.images import Images, texture
from bench.compare.presets import PRESETS, Preset, settings
from bench.compare.runs import AVERAGE, BASE, GROUPS, OPTIONS, STUDENT, SWEEPS, find
from bench.compare.search import MOST, search, searched
from bench.compare.train import Job, halves, work_per_image
from bench.learning import names_of
from ijepa_fast import configs
from ijepa_fast.config import check_rates, load_config
from ijepa_fast.engine.schedules import Schedule
from ijepa_fast.eval.figures import Figure
from ijepa_fast.eval.labels import open_labelled
from ijepa_fast.methods.method import METHODS
from ijepa_fast.run.build import Length, build_method
from tests.documented import PAGES, lines
from tests.launch import ROOT

SMALL = ("model.dim=48", "model.depth=3", "model.heads=3", "model.predictor_dim=48", "model.predictor_depth=1")
SHORT = Preset(steps=300, batch=64, probes=3, images=100, seeds=(0,), overrides=SMALL)


def config_of(name, preset, images=50_000, more=(), base=None):
    base = base or find(name).config
    teacher = ["objective.options.teacher_from=."] if "salt" in name else []
    return load_config(base, [*settings(name, preset, images, base, more, []), *teacher])


# Runs.


@pytest.mark.parametrize("name", METHODS)
def test_schedules_span_the_run(name):
    assert_spans(config_of(name, SHORT), SHORT)


def assert_spans(config, preset):
    length = Length.of(config, 50_000)
    schedule, total = Schedule(config.optim, length.steps_per_epoch), length.steps
    assert total == preset.steps
    rates = [schedule.learning_rate(step) for step in range(0, total, max(1, total // 300))]
    every = total / len(rates)
    assert max(rates) == pytest.approx(config.optim.lr, rel=1e-3)
    assert np.argmax(rates) * every == pytest.approx(0.1 * total, abs=2 * every)
    assert schedule.learning_rate(total - 1) == pytest.approx(config.optim.final_lr, abs=1e-6)
    if build_method(config).averaged:
        kept = np.prod([schedule.ema_momentum(step) for step in range(total)])
        assert kept < 0.01  # of the first weights in the average


def test_all_methods_have_the_same_encoder_and_batch():
    plain = replace(SHORT, overrides=())
    configs = [config_of(name, plain) for name in METHODS]
    assert {(*sizes(config), config.batch_size) for config in configs} == {(192, 6, 3, 4, 32, 64)}


def sizes(config):
    return config.model.dim, config.model.depth, config.model.heads, config.model.patch, config.data.crop


def test_the_gpu_preset_is_200_epochs_of_vit_t_in_memory():
    preset = PRESETS["gpu"]
    assert preset.steps * preset.batch == pytest.approx(200 * 50_000, rel=0.01)
    for name, memory in (("ijepa", "device"), ("mae", "device"), ("dino", True)):  # several views are made on the host
        config = config_of(name, preset)
        assert (*sizes(config), config.batch_size) == (192, 12, 3, 4, 32, 512)
        assert (config.data.memory, config.engine.precision) == (memory, "bf16")
    assert_spans(config_of("ijepa", preset), preset)


@pytest.mark.parametrize("group", GROUPS)
def test_every_run_of_every_group_can_be(group):
    """Its settings are a configuration, and what a run changes is in it, whatever encoder the preset has."""
    for name in GROUPS[group]:
        run, more = find(name), ()
        base = run.config
        if group == "tasks":
            more, base = ("data.crop=64", "model.patch=8"), {BASE: "quickstart"}.get(base, base)
        config = config_of(name, SHORT, more=more, base=base)
        model = config.model
        assert (config.data.crop // model.patch) == 8
        if group == "sizes":
            assert (model.dim, model.depth) == tuple(map(int, name.split("x")))
        elif group == "predictor-width":
            assert model.predictor_dim == int(name.removeprefix("predictor-width"))
        elif group == "targets":
            assert build_method(config).sampler.targets == int(name.removeprefix("targets").replace("multiblock", "4"))
        else:
            assert (model.dim, model.depth) == (48, 3)


def test_groups_of_the_paper_are_there():
    assert [len(sweep.runs) for sweep in SWEEPS.values()] == [10, 6, 4, 2, 4, 4, 8, 4, 4, 12]
    assert GROUPS["noise"][:4] == (AVERAGE, f"{AVERAGE}@noise16", f"{AVERAGE}@noise32", f"{AVERAGE}@noise64")
    assert GROUPS["masks"][0] == "mae"  # the teacher comes first
    assert set(GROUPS["fair"]) >= {
        "ijepa",
        "salt+xavier+flip+crop",
        AVERAGE,
        STUDENT,
        "mae",
        "data2vec",
        "dino",
        "ibot",
        "lejepa",
        "pixels",
    }


@pytest.mark.parametrize("name", [*OPTIONS, "xavier+deep+flip", "xavier+block+pixels"])
def test_every_option_is_a_run_of_i_jepas(name):
    found = load_config(BASE, find(name).changes)
    assert found.objective.method == "ijepa"
    if "salt" not in name:
        options = build_method(found).options
        plain = load_config(BASE)
        assert options != build_method(plain).options or (found.data, found.mask, found.optim) != (
            plain.data,
            plain.mask,
            plain.optim,
        )
    assert find(f"{name}+nothing") is None


def test_a_run_that_says_how_its_average_moves_keeps_that():
    optim = config_of(AVERAGE, SHORT).optim
    assert (optim.ema, optim.final_ema, optim.lr) == (0.9995, 0.99, load_config(BASE).optim.lr)
    assert PRESETS["cpu"].rate(AVERAGE) == 2e-3
    assert config_of("ijepa", SHORT).optim.final_ema == config_of("xavier", SHORT).optim.ema != 0.9995
    quick, more = load_config("quickstart").optim, ("data.crop=64", "model.patch=8")
    scenes = config_of("ijepa", SHORT, more=more, base="quickstart").optim
    assert (scenes.ema, scenes.final_ema) == (quick.ema, quick.final_ema) == (0.9995, 0.995)


def test_a_run_without_a_rate_has_that_of_the_run_it_is_like():
    preset = Preset(1, 1, 1, 1, (0,), rates={"ijepa": 1.0, "mae": 2.0, "salt": 3.0})
    expected = {
        "ijepa": 1,
        "xavier": 1,
        "targets2": 1,
        "salt": 3,
        "salt@noise16": 3,
        "mae@share4": 2,
        "xavier@noise16": 1,
    }
    assert {name: preset.rate(name) for name in expected} == expected
    assert preset.rate("dino") is None
    assert searched(["targets2", "mae@noise16", "salt@noise16", "64x3", "pixels", "xavier+targets2"]) == [
        "ijepa",
        "mae",
        "salt",
        "64x3",
        "pixels",
        "xavier+targets2",
    ]


def test_work_by_method():
    """Pixels need no target encoder; MAE sees a quarter of the patches, iBOT two large crops and small ones."""
    work = {name: work_per_image(config_of(name, SHORT)) for name in ("ijepa", "mae", "pixels", "ibot")}
    assert max(work["mae"], work["pixels"]) < work["ijepa"] < work["ibot"]


# Images.


@pytest.fixture(scope="module")
def grey(tmp_path_factory):
    """Eight flat grey images of each of two classes to train on, two to test on."""
    folder = tmp_path_factory.mktemp("grey")
    for part, count in (("train", 8), ("test", 2)):
        for kind in ("a", "b"):
            (folder / part / kind).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (32, 32), (128, 128, 128)).save(folder / part / kind / f"{i}.png")
    return folder


def pixels(labelled, i):
    return np.asarray(Image.open(io.BytesIO(labelled.source.read(i))), np.float64)


def test_the_nuisance_is_of_one_image_and_only_its_strength_changes(grey, tmp_path):
    images = Images(grey / "train", grey / "test", tmp_path)
    found = {}
    for sigma in (16, 32):
        train, probed, test = images.of(find(f"mae@noise{sigma}"))
        assert train == probed
        parts = open_labelled(train), open_labelled(test)
        assert [part.labels["class"].tolist() for part in parts] == [[0] * 8 + [1] * 8, [0, 0, 1, 1]]
        found[sigma] = [pixels(part, i) - 128 for part in parts for i in range(4)]
    for weak, strong in zip(found[16], found[32]):
        assert weak.std() == pytest.approx(16, rel=0.05)
        np.testing.assert_allclose(strong, (2 * weak).clip(-128, 127), atol=1.01)  # of whole levels
    flat = [image.ravel() for image in found[16]]
    assert abs(np.corrcoef(flat) - np.eye(8)).max() < 0.2  # no image has another's
    before = (tmp_path / "noise16" / "train.tar").stat().st_mtime_ns
    images.of(find("ijepa@noise16"))
    assert (tmp_path / "noise16" / "train.tar").stat().st_mtime_ns == before


def test_the_nuisance_is_coarse_but_ends_within_a_patch():
    """Neighbours are alike, so that a patch's mean keeps most of it; four pixels away nothing is."""
    drawn = np.stack([texture((32, 32, 3), np.random.default_rng(i)) for i in range(100)])

    def alike(distance):
        return np.corrcoef(drawn[:, :, distance:].ravel(), drawn[:, :, : 32 - distance].ravel())[0, 1]

    assert alike(1) > 0.6
    assert abs(alike(4)) < 0.05
    assert texture((48, 80, 1), np.random.default_rng(0)).shape == (48, 80, 1)


def test_a_share_is_of_every_class_and_probes_have_all(grey, tmp_path):
    images = Images(grey / "train", grey / "test", tmp_path)
    run = find("ijepa@share4")
    assert images.count(run) == 4
    source, train, test = images.of(run)
    assert (train, test) == (grey / "train", grey / "test")
    names = source.read_text().splitlines()
    assert [name.split("/")[-2] for name in names] == ["a", "a", "b", "b"]
    assert images.of(run)[0].read_text() == source.read_text()
    assert images.count(find("ijepa@share64")) == 2  # one of each at least


def test_a_nuisance_wants_classes_by_folder(tmp_path):
    for part in ("train", "test"):
        (tmp_path / part).mkdir()
        Image.new("RGB", (32, 32)).save(tmp_path / part / "0.png")
    with pytest.raises(ValueError, match="@noise: expected images of 8 bits in a folder per class"):
        Images(tmp_path / "train", tmp_path / "test", tmp_path).count(find("ijepa@noise16"))


def test_halves_share_no_image(grey):
    one, other = halves(open_labelled(grey / "train"), 5)
    assert len(one.source) == len(other.source) == 5
    assert not set(one.source.rows) & set(other.source.rows)


# The search.


@pytest.fixture
def trained(monkeypatch):
    """Trials that are not run: their accuracy by the learning rate, and None fails. Gives the rates that were tried."""
    tried = []

    def use(accuracy):
        def done(job):
            rate = float(job.extra[-1].removeprefix("optim.lr="))
            check_rates(load_config(configs.find(job.images.config(job.run)), job.extra))
            tried.append(rate)
            assert (job.seed, job.ends, job.held) == (1000, (), True)
            if accuracy(rate) is None:
                raise RuntimeError("the loss is not finite")
            return record("ijepa", [(0, 0.1), (1, accuracy(rate))])

        monkeypatch.setattr("bench.compare.search.do", done)
        return tried

    return use


def job(tmp_path, **rates):
    preset = Preset(1, 1, 1, 20, (0,), rates=rates)
    return Job("ijepa", 1000, preset, Images(tmp_path, tmp_path, tmp_path), tmp_path)


@pytest.mark.parametrize("power", [-2, -1, 0, 1, 3])
def test_the_best_rate_has_worse_ones_on_both_sides(tmp_path, trained, power):
    best = 1e-3 * 2.0**power
    tried = trained(lambda rate: 0.5 - 0.01 * abs(math.log2(rate / best)))
    found = search(job(tmp_path, ijepa=1e-3), {})
    assert found["rate"] == pytest.approx(best)
    assert found["inside"]
    rates = [trial["lr"] for trial in found["trials"]]
    assert sorted(tried) == rates
    assert rates[0] < best < rates[-1]
    assert len(rates) == 3 + max(0, abs(power))
    assert found["trials"][0]["figures"].keys() == {"class, linear", "class, 20-NN"}


def test_a_search_that_finds_no_end_says_so(tmp_path, trained):
    trained(lambda rate: min(1.0, rate))
    found = search(job(tmp_path, ijepa=1e-6), {})
    assert (len(found["trials"]), found["inside"]) == (MOST, False)


def test_a_rate_that_diverges_is_the_worst_but_the_first_must_train(tmp_path, trained):
    trained(lambda rate: None if rate > 1e-3 else 0.5)
    found = search(job(tmp_path, ijepa=1e-3), {})
    assert found["trials"][-1] == {"lr": 2e-3, "failed": True}
    assert found["rate"] <= 1e-3
    assert "0.002: failed" in tables.trials({"ijepa": found})
    trained(lambda rate: None)
    with pytest.raises(RuntimeError, match="not finite"):
        search(job(tmp_path, ijepa=1e-3), {})


# Tables and plots.


def record(run, curve, seed=0, teacher=None, tasks=("class",), n=100, **more):
    """A record whose linear accuracies are those of `curve`, (step, accuracy), and whose 20-NN are half of them."""
    first = curve[0][1]

    def figures(value):
        for task in tasks:
            for probe, factor in (("linear", 1.0), ("20-NN", 0.5)):
                values = factor * value, None, (factor * value,), 0.1, factor * first
                yield Figure(task, probe, "accuracy", *values, n, error=0.03, untrained_error=0.04).to_json()

    points = [
        {"step": step, "petaflop": step / 10, "seconds": 2.0 * step, "figures": list(figures(value))}
        for step, value in curve
    ]
    return {"run": run, "seed": seed, "lr": 1e-3, "settings": [], "teacher": teacher, "points": points} | more


MAE = [record("mae", [(0, 0.1), (100, 0.3), (200, 0.5)])]


def rows(text):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()[2:]]


def test_how_soon_a_run_is_where_mae_ends_with_and_without_its_teacher():
    teacher = {"run": "mae", "step": 200, "petaflop": 20.0, "seconds": 400.0}
    runs = [
        record("ijepa", [(0, 0.2), (100, 0.4), (200, 0.49)]),
        record("salt", [(0, 0.1), (100, 0.3), (150, 0.7)], teacher=teacher),
    ]
    found = {row[0]: row[2:] for row in rows(tables.soon([*MAE, *runs])) if row[1] == "linear probe"}
    assert found == {
        "mae": ["50.0%", "200", "1.00", "20", "1.00", "400", "1.00"],
        "ijepa": ["50.0%", *["not reached", "-"] * 3],
        "salt": ["50.0%", "125", "0.62", "12.5", "0.62", "250", "0.62"],
        "salt, with its teacher's": ["50.0%", "325", "1.62", "32.5", "1.62", "650", "1.62"],
    }
    assert tables.soon(runs) == ""
    noisy = [record("mae@noise16", [(0, 0.1), (100, 0.2)]), record("ijepa@noise16", [(0, 0.1), (100, 0.3)])]
    assert [row[:4] for row in rows(tables.soon([*MAE, *noisy]))][:3] == [
        ["mae", "linear probe", "50.0%", "200"],
        ["mae@noise16", "linear probe", "20.0%", "100"],  # of the same images
        ["ijepa@noise16", "linear probe", "20.0%", "50"],
    ]


def test_the_first_time_counts_and_seeds_are_averaged():
    curves = [[(0, 0.1), (100, 0.8), (200, 0.2)], [(0, 0.1), (100, 0.4), (200, 0.2)]]
    runs = [record("ijepa", curve, seed) for seed, curve in enumerate(curves)]
    assert rows(tables.soon([*MAE, *runs]))[1][3:5] == ["80", "0.40"]
    assert tables.reach([((0.0,), 0.6), ((10.0,), 0.7)], 0.5) == (0.0,)


def test_the_gain_has_the_error_of_the_images_and_of_the_seeds():
    one = [Figure("class", "linear", "accuracy", 0.5, None, (0.5,), 0.1, 0.3, 100, error=0.03, untrained_error=0.04)]
    better, error = tables.gain(one)
    assert (better, error) == (pytest.approx(0.2), pytest.approx(0.05))
    two = [*one, Figure("class", "linear", "accuracy", 0.7, None, (), 0.1, 0.3, 100, error=0.03, untrained_error=0.04)]
    better, error = tables.gain(two)
    between = np.std([0.2, 0.4], ddof=1) / 2**0.5
    assert (better, error) == (pytest.approx(0.3), pytest.approx(math.hypot(0.05, between)))
    unknown = [Figure("class", "linear", "accuracy", 0.5, None, (0.5,), 0.1, 0.2, 100)]  # of an earlier version
    assert tables.gain(unknown)[1] == pytest.approx(math.sqrt(0.5 * 0.5 / 100 + 0.2 * 0.8 / 100))
    assert tables.gain([Figure("m", "linear", "r2", 0.5, None, (0.5,), 0.0, 0.2, 100)]) == (pytest.approx(0.3), None)


def test_ends_have_the_gain_and_the_best_block():
    run = record("mae", [(0, 0.1), (200, 0.5)])
    best = Figure(
        "class", "linear, best", "accuracy", 0.6, None, (0.6,), 0.1, 0.2, 100, ({"features": "block 2"},), 0.03
    )
    run["points"][-1]["figures"].append(best.to_json() | {"untrained_error": 0.04})
    text = tables.ends([run])
    assert text.splitlines()[0] == "| run | learning rate | linear | best block | 20-NN |"
    assert rows(text) == [
        ["mae", "0.001", "50.0% (+40.0 ± 5.0)", "60.0% (+40.0 ± 5.0; block 2)", "25.0% (+20.0 ± 5.0)"]
    ]


def test_labels_stand_side_by_side():
    runs = [
        record(name, [(0, 0.1), (200, end)], tasks=("kind", "count")) for name, end in (("ijepa", 0.5), ("mae", 0.3))
    ]
    assert rows(tables.tasks(runs)) == [
        ["ijepa", "50.0% (+40.0 ± 5.0)", "50.0% (+40.0 ± 5.0)"],
        ["mae", "30.0% (+20.0 ± 5.0)", "30.0% (+20.0 ± 5.0)"],
    ]
    assert (
        tables.table(runs).splitlines()[0] == "| run | seeds | step | PFLOP | seconds | kind, linear | count, linear |"
    )
    assert [row[1] for row in rows(tables.ends(runs))] == ["kind", "count"] * 2
    assert tables.tasks(MAE) == ""
    words = tables.tables({"records": runs})
    assert "Labels side by side" in words
    assert "search" not in words


def test_a_run_is_worth_what_it_ends_above_another_of_its_seed():
    ends_of = {"ijepa": (0.5, 0.4), "xavier": (0.6, 0.48), "crop": (0.4,)}
    runs = [record(run, [(0, 0.1), (200, end)], seed) for run, ends in ends_of.items() for seed, end in enumerate(ends)]
    found = {row[0]: row[1:5] for row in rows(tables.worth(runs, "ijepa"))}
    assert found["ijepa"][2:] == ["45.0%", ""]
    assert found["xavier"][2:] == ["54.0%", "+9.0 ± 1.0"]
    assert found["crop"][2:] == ["40.0%", "-10.0"]


def test_a_plot_is_drawn_of_a_group_that_is_whole(tmp_path):
    for name, sweep in SWEEPS.items():
        runs = [record(run, [(0, 0.1), (200, 0.5)], seed) for run in sweep.runs for seed in (0, 1)]
        assert plots.ends(runs, sweep, tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert not plots.ends(runs[2:], sweep, tmp_path / "part.png")
    plots.curves(runs, tmp_path / "curves.png")
    assert not (tmp_path / "part.png").exists()


def test_what_the_page_says_of_the_leads_over_mae_is_measured():
    """The table of docs/learning.md: mean of the differences by seed, and its standard error over the seeds."""
    page = (ROOT / "docs" / "learning.md").read_text()
    fair, long = (
        tables.by_run(json.loads((ROOT / "bench" / "results" / f"{name}.json").read_text())["records"])
        for name in ("learning-fair", "compared-mae12000")
    )
    for words, run, others in (
        ("the student", STUDENT, fair),
        ("no teacher", AVERAGE, fair),
        ("the student, over MAE of 12,000 steps", STUDENT, long),
    ):
        cells = []
        for probe in ("linear", "20-NN", "attentive", "1 % low-shot"):
            mean, error = tables.lead(fair[run], others["mae"], "class", probe)
            cells.append(f"{100 * mean:+.1f} ± {100 * error:.1f}")
        assert f"| {words} | {' | '.join(cells)} |" in page
    for probe in ("linear", "20-NN", "attentive", "1 % low-shot"):
        for record in fair[STUDENT]:
            assert tables.lead([record], fair["mae"], "class", probe)[0] > 0


def test_the_documents_name_runs_that_there_are():
    commands = [line for page in PAGES for line in lines(page) if line.startswith("python bench/learning.py")]
    tables_ = re.findall(r"`--(?:data scenes --)?runs ([\w-]+)`", (ROOT / "docs" / "learning.md").read_text())
    found = [re.search(r"--runs (\S+)", command) for command in commands]
    named = {run for match in found if match for run in names_of(match[1])} | {*tables_}
    assert set(SWEEPS) <= {*tables_, "noise"}
    assert {"salt", "mae@noise64", "ijepa", "lejepa"} <= named
    assert set(tables_) <= set(GROUPS)
