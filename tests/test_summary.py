"""What a finished run leaves in summary.json: one schema, which the probe command and the report have too."""

import datetime
import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("deepspeed")
pytest.importorskip("nvidia.dali")

from ijepa_fast.__main__ import main
from ijepa_fast.config import ConfigError, load_config
from ijepa_fast.engine.precision import Precision
from ijepa_fast.eval.evaluate import evaluate
from ijepa_fast.eval.figures import figures_of, headline, table, verdict
from ijepa_fast.report.plots import read_log
from ijepa_fast.report.summary import describe, finish, read_summary, train_seconds
from ijepa_fast.run.provenance import provenance
from ijepa_fast.run.sources import READ, TESTED, evaluated, training_source


@pytest.fixture(scope="module")
def summary(finished_run):
    return read_summary(finished_run)


def test_it_says_where_it_comes_from(summary):
    """All that provenance says, of the machine of this test, and how long the run took."""
    here = provenance("cpu")
    assert {key: summary[key] for key in ("version", "host", "versions", "commit")} == {
        key: here[key] for key in ("version", "host", "versions", "commit")
    }
    assert "thread" in summary["device"]
    age = datetime.datetime.now(datetime.UTC) - datetime.datetime.fromisoformat(summary["date"])
    assert datetime.timedelta(0) <= age < datetime.timedelta(hours=2)
    assert summary["wall_seconds"] > summary["train_seconds"] > 0


def test_it_says_what_the_log_says(summary, finished_run):
    records = read_log(finished_run / "log.jsonl")
    assert summary["steps"] == len(records) == 24
    assert (summary["loss_first"], summary["loss_last"]) == (records[0]["loss"], records[-1]["loss"])
    assert summary["bad_files"] == 0


def test_seconds_are_the_logs():
    log = [{"step": 10, "loss": 1, "images_per_second": 64}, {"step": 12}]
    log += [{"step": 15, "loss": 1, "images_per_second": 32}]
    assert train_seconds(log, 10, 64) == 10
    assert train_seconds(log, 15, 64) == 20
    log = [record | {"images": 64 * record["step"]} for record in log]
    log.append({"step": 17, "images": 15 * 64 + 2 * 32, "loss": 1, "images_per_second": 32})  # goes on with 32 a step
    assert train_seconds(log, 17, 32) == 22


def test_every_figure_has_its_untrained_value(summary):
    figures = figures_of(summary)
    assert [(f.task, f.probe, f.metric) for f in figures] == [
        ("class", probe, "accuracy") for probe in ("linear", "10-NN", "20-NN")
    ]
    for figure in figures:
        assert (figure.chance, figure.n) == (0.5, 24)
        assert 0 <= figure.untrained <= 1


def probed(folder, tmp_path, capsys, *options):
    """What `probe` writes of a run, and what it says on stdout and stderr."""
    out = tmp_path / "probe.json"
    assert main(["probe", str(folder), *options, "--device", "cpu", "--out", str(out)]) == 0
    return json.loads(out.read_text()), capsys.readouterr()


def test_the_command_measures_what_the_end_of_the_run_measured(summary, finished_run, tmp_path, capsys):
    """From the checkpoint and on the images that the run's configuration names, with the run's untrained values."""
    found, said = probed(finished_run, tmp_path, capsys, "--heads", "bn_linear")
    assert found["figures"] == summary["figures"]
    assert found.keys() & summary.keys() >= provenance("cpu").keys()
    assert said.out.splitlines() == [*table(figures_of(found)).splitlines(), verdict(figures_of(found))]
    assert "--untrained" not in said.err


def test_the_command_shows_no_untrained_value_of_another_measurement(summary, finished_run, tmp_path, capsys):
    """Heads that the run did not try: neighbours need none, the linear probe's is not known until it is asked for."""
    known = {figure["probe"]: figure["untrained"] for figure in summary["figures"]}
    found, said = probed(finished_run, tmp_path, capsys, "--heads", "linear,bn_linear")
    first = {figure["probe"]: figure["untrained"] for figure in found["figures"]}
    assert first == known | {"linear": None}
    assert said.err.endswith("untrained values that are not shown: --untrained measures them\n")


def test_the_command_measures_the_untrained_encoder(summary, finished_run, tmp_path, capsys):
    asked = "--heads", "bn_linear", "--resize", "32", "--untrained"
    found, said = probed(finished_run, tmp_path, capsys, *asked)
    assert found["figures"] == summary["figures"]  # 32 is the crop
    assert "untrained" in said.out.splitlines()[0]


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (("--image-size", "33", "--untrained"), "image_size: expected a multiple of the patch"),
        (("--checkpoint", "x"), "name one RUN, or --checkpoint PATH"),
    ],
)
def test_what_the_command_cannot_do(finished_run, capsys, words, error):
    try:
        status = main(["probe", str(finished_run), *words])
    except SystemExit as ended:
        status = ended.code
    assert status
    assert error in capsys.readouterr().err


def test_the_untrained_encoder_is_the_one_before_training(summary, finished_run):
    """Built from the run's configuration and evaluated by the same function."""
    import torch

    from ijepa_fast.eval.evaluate import evaluate
    from ijepa_fast.run.sources import evaluation, probe_folders, untrained

    config = load_config(finished_run / "config.yaml")
    cpu = torch.device("cpu")
    before = evaluate(untrained(config, cpu), *evaluation(config, probe_folders(config), cpu))
    assert [f.value for f in before] == [f.untrained for f in figures_of(summary)]


def test_a_person_reads_the_headline(summary):
    text = describe(summary)
    assert text.startswith("24 steps, loss 0.")
    figures = headline(figures_of(summary))
    assert text.endswith(table(figures) + "\n" + verdict(figures))
    assert "untrained" in text


def test_a_run_without_labels_has_no_table(summary):
    assert describe(summary | {"figures": []}).count("\n") == 0


def test_bad_files_are_counted(summary):
    assert "3 files could not be decoded" in describe(summary | {"bad_files": 3})


def test_there_is_no_summary_before_the_end(tmp_path):
    assert read_summary(tmp_path) is None


def test_a_summary_before_versions_is_named(tmp_path):
    (tmp_path / "summary.json").write_text(json.dumps({"steps": 3, "probe": {"before": {}, "after": {}}}))
    with pytest.raises(
        ValueError, match=r"summary.json has version 1 .* reads version 2; evaluate the run again: python"
    ):
        read_summary(tmp_path)


def labelled_folder(folder, classes, each, side=16):
    """Small images of one colour each in a folder per class."""
    from PIL import Image

    for kind in range(classes):
        (folder / f"kind{kind}").mkdir(parents=True)
        for i in range(each):
            Image.new("RGB", (side, side), (kind * 60, i, 128)).save(folder / f"kind{kind}" / f"{i:03}.png")
    return folder


def config_of(source, tmp_path, *overrides):
    return load_config("quickstart", [f"data.source={source}", f"runs={tmp_path}/runs", "data.crop=16", *overrides])


def test_a_labelled_folder_is_tested_on_a_tenth_of_itself(tmp_path):
    config = config_of(labelled_folder(tmp_path / "images", 2, 60), tmp_path)
    train, test, options = evaluated(config, training_source(config), torch.device("cpu"))
    assert options.probes == ("knn",)
    names = [{part.source.name(i) for i in range(len(part.source))} for part in (train, test)]
    assert [len(found) for found in names] == [108, 12]
    assert not names[0] & names[1]
    for part in (train, test):
        kinds = [part.classes["class"][int(k)] for k in part.labels["class"]]
        assert [f"/{kind}/" in part.source.name(i) for i, kind in enumerate(kinds)] == [True] * len(kinds)
    figures = evaluate(lambda images: images[:, :1, :1].flatten(1, 2).float(), train, test, options)
    assert [(f.probe, f.value, f.n) for f in figures] == [(f"{k}-NN", 1.0, 12) for k in (10, 20, 100)]


@pytest.mark.parametrize(
    ("classes", "each", "given", "why"),
    [
        (1, 120, (), "all images have the same class"),
        (2, 40, (), "a tenth of 80 labelled images is too few"),
        (2, 60, ("probe.enabled=false",), ""),
    ],
    ids=["one class", "few images", "no probes"],
)
def test_nothing_is_tested_where_it_would_say_nothing_and_rank_0_says_why(tmp_path, capsys, classes, each, given, why):
    config = config_of(labelled_folder(tmp_path / "images", classes, each), tmp_path, *given)
    assert begun(config) is None
    said = capsys.readouterr().err
    assert why in said
    assert said.startswith("the encoder will not be evaluated: ") == bool(why)


def test_windows_of_an_image_are_on_one_side(tmp_path):
    config = config_of(labelled_folder(tmp_path / "images", 2, 30, side=32), tmp_path, "data.window=16")
    train, test, _ = begun(config)
    files = [{part.source.name(i).split(" at ")[0] for i in range(len(part.source))} for part in (train, test)]
    assert (len(train.source), len(test.source), len(files[1])) == (216, 24, 6)
    assert not files[0] & files[1]


def test_a_tenth_is_two_thousand_at_most(tmp_path, monkeypatch):
    monkeypatch.setattr("ijepa_fast.run.sources.READ", 110)
    train, test, _ = begun(config_of(labelled_folder(tmp_path / "images", 2, 60), tmp_path))
    assert (len(train.source), len(test.source)) == (99, 11)
    monkeypatch.undo()
    assert READ // TESTED == 2000


def test_a_summary_is_written_where_the_evaluation_fails(tmp_path, monkeypatch):
    """With all that training found, and why there are no figures."""
    from tests.launch import run

    folder = run(tmp_path, "name=a", "optim.steps=1", "probe.enabled=false")
    assert read_summary(folder)["not_evaluated"] == "probe.enabled is false"
    config, method = load_config(folder / "config.yaml"), SimpleNamespace(reads_mask=False)
    monkeypatch.setattr("ijepa_fast.report.summary._plot_masks", lambda *given: None)
    monkeypatch.setattr("ijepa_fast.report.summary._evaluate", lambda *given: 1 / 0)
    (folder / "summary.json").unlink()
    with pytest.raises(ZeroDivisionError):
        finish(config, method, None, (), torch.device("cpu"), 0.0, Precision("fp32", ""))
    found = read_summary(folder)
    assert (found["steps"], found["figures"]) == (1, [])
    assert found["not_evaluated"] == "the evaluation did not finish"


@pytest.mark.parametrize(
    ("classes", "each", "words"),
    [(1, 12, "all images have the same class"), (2, 4, "k-NN takes at least 10 training images, got 8")],
    ids=["one class", "fewer images than neighbours"],
)
def test_images_that_tell_nothing_end_a_run_before_its_first_step(tmp_path, classes, each, words):
    images = labelled_folder(tmp_path / "images", classes, each)
    test = labelled_folder(tmp_path / "test", classes, each + 1)
    config = config_of(images, tmp_path, f"probe.test={test}")
    with pytest.raises(ConfigError, match=f"^probe.train, probe.test: {images}: {words}.*; or set probe.enabled=false"):
        evaluated(config, training_source(config), torch.device("cpu"))


@pytest.mark.parametrize("wrong", ["no labels", "another class", "not there"])
def test_images_to_test_on_are_matched_before_the_first_step(tmp_path, wrong):
    images, test = labelled_folder(tmp_path / "images", 2, 3), tmp_path / "test"
    if wrong == "no labels":
        (labelled_folder(test, 1, 3) / "kind0").rename(tmp_path / "test2")
        test = tmp_path / "test2"
    elif wrong == "another class":
        (labelled_folder(test, 1, 3) / "kind0").rename(test / "kind7")
    config = config_of(images, tmp_path, f"probe.test={test}")
    said = "kind7" if wrong == "another class" else str(test)
    with pytest.raises(ConfigError, match=f"^probe.train, probe.test: .*{said}"):
        evaluated(config, training_source(config), torch.device("cpu"))


def begun(config):
    return evaluated(config, training_source(config), torch.device("cpu"))


def test_training_images_without_test_images_end_a_run_before_its_first_step(tmp_path):
    images = labelled_folder(tmp_path / "images", 2, 60)
    config = config_of(images, tmp_path, f"probe.train={images}")
    with pytest.raises(ConfigError, match=f"^probe.train={images}: it goes with probe.test, which is not set"):
        begun(config)
    assert begun(replace(config, probe=replace(config.probe, enabled=False))) is None


@pytest.mark.parametrize("same", ["path", "link", "copy"])
def test_images_are_not_tested_on_themselves(tmp_path, same):
    """The same folder by another name, and a copy; not a folder with the same names and other images."""
    images, test = labelled_folder(tmp_path / "images", 2, 8), tmp_path / "test"
    if same == "path":
        test = images
    elif same == "link":
        test.symlink_to(images)
    else:
        shutil.copytree(images, test)
    for given in ((), (f"probe.train={images}",)):
        config = config_of(images, tmp_path, f"probe.test={test}", *given)
        with pytest.raises(ConfigError, match=f"^probe.train, probe.test: {test}: the 16 images to test on are those"):
            begun(config)
    other = labelled_folder(tmp_path / "other", 2, 8)
    for path in other.rglob("*.png"):
        path.write_bytes(path.read_bytes() + b"\0")
    assert begun(config_of(images, tmp_path, f"probe.test={other}")) is not None


@pytest.mark.parametrize("tested", [False, True])
def test_a_resize_below_the_crop_ends_a_run_before_its_first_step(tmp_path, tested):
    images = labelled_folder(tmp_path / "images", 2, 60)
    given = [f"probe.test={labelled_folder(tmp_path / 'test', 2, 6)}"] if tested else []
    with pytest.raises(ConfigError, match=r"^probe.resize=8: expected at least the crop, 16 pixels"):
        begun(config_of(images, tmp_path, "probe.resize=8", *given))
