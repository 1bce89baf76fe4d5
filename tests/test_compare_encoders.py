"""Several encoders on the same images: differences with intervals, the command, its page, and bad input."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("nvidia.dali")

from ijepa_fast.__main__ import main
from ijepa_fast.compare import named
from ijepa_fast.eval.differences import difference, differences
from ijepa_fast.eval.figures import Figure
from ijepa_fast.interop.weights import save_weights
from ijepa_fast.report.comparison import comparison_cells
from tests.test_eval_dense import write as write_maps
from tests.test_probe import ARCH, random_weights, write_images


def of(value, terms=None, error=0.03, metric="accuracy", probe="linear"):
    return Figure("kind", probe, metric, value, None, (value,), 0.25, None, 40, (), error, None, terms)


def test_differences_on_the_same_images_are_paired():
    """Two encoders that fail on the same images differ surely, though each is uncertain."""
    rng = np.random.default_rng(0)
    a = rng.random(400) < 0.5
    b = a | (rng.random(400) < 0.1)
    one, other = (of(float(x.mean()), x.astype(float), float(x.std()) / 20) for x in (a, b))
    found = difference("b", other, "a", one)
    assert found.value == pytest.approx(b.mean() - a.mean())
    drawn = rng.integers(0, 400, (3000, 400))
    assert found.error == pytest.approx((b[drawn].mean(1) - a[drawn].mean(1)).std(), rel=0.05)
    assert found.interval == pytest.approx(1.96 * found.error)
    assert found.paired
    assert found.clear
    assert found.better
    apart = difference("b", replace(other, terms=None), "a", one)
    assert (apart.paired, apart.clear) == (False, False)
    assert apart.error == pytest.approx(math.hypot(one.error, other.error))
    assert difference("b", replace(other, terms=None, error=None), "a", one) is None


def test_few_answers_are_not_certain():
    """One image, or some on which both agree, or which one alone answers: never an error of 0."""
    for a, b, error in (([1], [0], 8**0.5), ([1, 1, 0], [1, 1, 0], (2 * 5 / 3) ** 0.5)):
        one, other = (of(float(np.mean(x)), np.array(x, float)) for x in (a, b))
        found = difference("b", one, "a", other)
        assert found.error == pytest.approx(error / (len(a) + 2))
        assert not found.clear
    several = [of(1.0, np.array([1.0]), metric=metric) for metric in ("r2", "mean_absolute_error")]
    assert [difference("b", f, "a", f) for f in several] == [None, None]


def test_a_star_is_beyond_two_standard_errors():
    one, other = of(0.5, error=0.1), of(0.5 - 0.198 * 2**0.5, error=0.1)
    found = difference("b", one, "a", other)
    assert found.value > found.interval
    assert not found.clear


def test_a_smaller_error_is_better():
    worse, better = (of(v, np.full(4, v), 0.0, "mean_absolute_error") for v in (2.0, 1.0))
    assert difference("b", better, "a", worse).better
    assert not difference("b", worse, "a", better).better
    assert not difference("b", better, "a", better).clear


def test_every_encoder_is_compared_with_the_first():
    figures = {"a": [of(0.1), of(0.2, probe="20-NN")], "b": [of(0.4)], "c": [of(0.2, probe="20-NN"), of(0.5)]}
    found = {(d.encoder, d.probe): d.value for d in differences(figures)}
    assert found == pytest.approx({("b", "linear"): 0.3, ("c", "20-NN"): 0.0, ("c", "linear"): 0.4})
    head, rows, better = comparison_cells(figures)
    assert head[4:] == ["a", "b", "c", "b - a", "c - a"]
    assert rows[1][3:] == ["0.2500", "0.2000 ±0.0588", "", "0.2000 ±0.0588", "", "+0.0000 ±0.0832 "]
    assert better == {(0, 7), (0, 8)}


def test_names_are_the_ends_that_tell_paths_apart():
    assert named(["runs/a", "runs/b"], None) == ["a", "b"]
    assert named(["x/run", "y/run"], None) == ["x/run", "y/run"]
    assert named(["x/run", "y/run"], "one,two") == ["one", "two"]
    for names in ("one", "one,one"):
        with pytest.raises(ValueError, match="--names: expected 2 different names"):
            named(["x/run", "y/run"], names)
    with pytest.raises(ValueError, match="one twice"):
        named(["x", "x"], None)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two encoders, one of another resolution, labelled images, and images with maps."""
    root = tmp_path_factory.mktemp("compare")
    for name in ("a", "again"):
        save_weights(root / f"{name}.safetensors", random_weights())
    save_weights(root / "b.safetensors", random_weights(replace(ARCH, image_size=64, depth=5), seed=7))
    save_weights(root / "four.safetensors", random_weights(replace(ARCH, mean=(0.5,) * 4, std=(0.2,) * 4)))
    save_weights(root / "wide.safetensors", random_weights(replace(ARCH, image_size=(32, 64))))
    write_images(root / "train", 40, 0)
    write_images(root / "test", 20, 1)
    write_maps(root, 12, 0, "dense")
    return root


def command(files, *options, encoders=("a", "b")):
    paths = [str(files / f"{name}.safetensors") for name in encoders]
    return [
        "compare",
        *paths,
        "--data",
        str(files / "train"),
        "--test",
        str(files / "test"),
        "--device",
        "cpu",
        *options,
    ]


def test_the_command(files, tmp_path, capsys):
    out, page = tmp_path / "compare.json", tmp_path / "compare.html"
    options = [
        "--probes",
        "linear,knn,retrieval,fewshot,corruption",
        "--features",
        "last,blocks",
        "--heads",
        "bn_linear",
        "--episodes",
        "50",
    ]
    assert main(command(files, *options, "--names", "one,<two>", "--out", str(out), "--page", str(page))) == 0
    results = json.loads(out.read_text())
    one, two = results["encoders"]
    assert [item["name"] for item in results["encoders"]] == ["one", "<two>"]
    assert [item["options"]["crop"] for item in (one, two)] == [32, 64]
    probes = [figure["probe"] for figure in one["figures"]]
    assert {"linear", "10-NN", "retrieval", "2-way 1-shot", "2-way 5-shot", "linear, block 4", "linear, blur 5"} <= set(
        probes
    )
    values = [{(f["probe"], f["metric"]): f["value"] for f in item["figures"]} for item in (one, two)]
    assert len(results["differences"]) == len(one["figures"])  # the second has a block more
    for row in results["differences"]:
        key = row["probe"], row["metric"]
        assert row["value"] == pytest.approx(values[1][key] - values[0][key])
        assert (row["encoder"], row["against"], row["paired"]) == ("<two>", "one", True)
        assert row["interval"] >= 0
    text = page.read_text()
    assert "&lt;two&gt; - one" in text
    assert "<two>" not in text.replace("&lt;two&gt;", "")
    assert text.count("<svg") == 2 * 3 + 1  # accuracy and calibration under three corruptions, and the blocks
    table = capsys.readouterr().out.splitlines()
    assert table[0].split()[:4] == ["task", "probe", "metric", "chance"]
    assert any(line.startswith("class  linear, blur ") for line in table)
    assert not any("blur 5" in line for line in table)
    assert "95 % interval" in table[-1]


def test_an_encoder_is_no_better_than_itself(files, tmp_path):
    out = tmp_path / "compare.json"
    options = ["--probes", "knn,retrieval,fewshot", "--episodes", "20", "--out", str(out)]
    assert main(command(files, *options, encoders=("a", "again"))) == 0
    rows = json.loads(out.read_text())["differences"]
    assert {row["value"] for row in rows} == {0}
    uncertain = [row for row in rows if row["error"]]  # of 0 of n answers that are others, see few answers
    assert {(row["probe"], row["metric"]) for row in uncertain} <= {("10-NN", "accuracy"), ("20-NN", "accuracy")}


def test_folders_of_other_libraries_and_published_files_are_encoders(files, tmp_path):
    """An encoder beside its exports: the same weights, read from four formats."""
    out, made = tmp_path / "compare.json", {"hf": "hf", "timm": "timm", "reference": "published.pth.tar"}
    for form, name in made.items():
        export = [
            "export",
            "--checkpoint",
            str(files / "a.safetensors"),
            "--format",
            form,
            "--out",
            str(tmp_path / name),
        ]
        assert main(export) == 0
    given = command(files, "--probes", "knn", "--attention-heads", "2", "--out", str(out), encoders=("a",))
    given[2:2] = [str(tmp_path / name) for name in made.values()]
    assert main(given) == 0
    results = json.loads(out.read_text())
    assert [item["name"] for item in results["encoders"]] == ["a.safetensors", *made.values()]
    assert {row["encoder"] for row in results["differences"]} == set(made.values())
    assert max(abs(row["value"]) for row in results["differences"]) < 0.03  # features differ by rounding


def test_dense_probes_of_encoders_of_two_resolutions(files, tmp_path):
    out, dense = tmp_path / "compare.json", files / "dense"
    options = ["--data", str(dense / "images"), "--test", str(dense / "images"), "--probes", "segmentation,depth"]
    options += ["--label-map", str(dense / "classes"), "--depth-map", str(dense / "metres"), "--out", str(out)]
    assert main(command(files, *options)) == 0
    found = {(d["task"], d["probe"], d["metric"]): d for d in json.loads(out.read_text())["differences"]}
    assert ("segmentation", "linear", "mean_iou") in found
    assert all(row["paired"] for row in found.values())


BAD = {
    "another number of channels": (("a", "four"), [], "four.safetensors reads images of 4 channels"),
    "another shape": (("a", "wide"), [], "wide.safetensors takes images of 32 x 64 pixels"),
    "resize below a crop": (
        ("a", "b"),
        ["--resize", "32"],
        "b.safetensors: crop: expected at most resize = 32, got 64",
    ),
    "no maps": (("a", "b"), ["--probes", "segmentation"], "a.safetensors: --probes segmentation: expected a map"),
    "one encoder": (("a",), [], "expected two encoders or more"),
    "nothing of a run": (("a", "b"), ["--untrained"], "--untrained: expected a run's folder"),
    "no such label": (("a", "b"), ["--labels", "kind"], "--labels kind"),
    "no folder for the page": (
        ("a", "b"),
        ["--page", "/nowhere/at/all.html"],
        "expected a file in a folder that is there",
    ),
    "an encoder that is missing": (("a", "gone"), [], "gone.safetensors does not exist"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_before_any_encoder_runs(files, capsys, monkeypatch, case):
    encoders, options, words = BAD[case]
    monkeypatch.setattr("ijepa_fast.compare.evaluate", lambda *given: pytest.fail("an encoder was evaluated"))
    assert main(command(files, *options, encoders=encoders)) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert words in line


def test_a_single_class_is_said(files, tmp_path, capsys):
    for name, count in (("train", 40), ("test", 20)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "dots").symlink_to(files / name / "dots")
        (tmp_path / name / "labels.csv").write_text(
            "file,kind\n" + "".join(f"dots/{i}.png,dot\n" for i in range(count))
        )
    options = ["--data", str(tmp_path / "train"), "--test", str(tmp_path / "test")]
    assert main(command(files, *options)) == 1
    assert "all images have the same kind" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_beside_what_it_was(finished_run, tmp_path):
    """The encoder before training is the one that the run itself was compared with at its end."""
    out = tmp_path / "compare.json"
    assert (
        main(["compare", str(finished_run), "--untrained", "--device", "cpu", "--probes", "knn", "--out", str(out)])
        == 0
    )
    trained, before = json.loads(out.read_text())["encoders"]
    assert before["name"] == f"{trained['name']}, untrained"
    summary = json.loads((finished_run / "summary.json").read_text())
    of_run = {(f["task"], f["probe"]): f for f in summary["figures"]}
    for figure, untrained in zip(trained["figures"], before["figures"]):
        there = of_run[figure["task"], figure["probe"]]
        assert figure["value"] == pytest.approx(there["value"])
        assert figure["untrained"] == untrained["value"] == pytest.approx(there["untrained"])
