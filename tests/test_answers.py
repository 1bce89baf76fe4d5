"""The one screen of results: answers are what the files say, and what no file says is not measured."""

import json
import shutil

import pytest

from bench import answers, history, record
from bench.answers import QUESTIONS, table
from bench.compare.runs import STUDENT
from ijepa_fast.eval.figures import Figure
from tests.launch import ROOT

RESULTS = ROOT / "bench" / "results"


def steps(folder, name, rates, device="a CPU", arch="vit_small", method="ijepa", precision="fp32", **facts):
    case = {"method": method, "arch": arch, "patch": 16, "batch": 8, "precision": precision}
    case["device"] = "cuda" if "GPU" in device else "cpu"
    rows = [{"impl": impl, "context": "full", "data": False, "images_per_second": rate} for impl, rate in rates.items()]
    facts = {"case": case, "device": device, "torch": "2", "rows": rows} | facts
    (folder / f"steps-{name}.json").write_text(json.dumps(facts))


def answer(folder, words):
    (question,) = (question for question in QUESTIONS if words in question.words)
    return answers.answers(question, folder)


def test_of_an_empty_folder_nothing_is_measured(tmp_path):
    lines = table(tmp_path)
    assert len(lines) == 2 + len(QUESTIONS)
    assert all("not measured" in line.lower() for line in lines[2:])
    assert "whole steps on an H200" in lines[-1]


def test_ratios_are_of_the_newest_measurement_of_a_machine(tmp_path):
    made = {"date": "2027-01-02T00:00:00+00:00", "commit": "0123456789abcdef"}
    steps(tmp_path, "old", {"fast": 9, "strong": 9, "plain": 9}, date="2027-01-01T00:00:00+00:00", commit="00")
    steps(
        tmp_path,
        "a-new",
        {"fast": 8, "strong": 5, "plain": 4, "fast, bf16": 16, "strong, bf16": 4, "plain, bf16": 2},
        **made,
    )
    steps(
        tmp_path, "gpu", {"fast": 1, "fast-graphs": 6, "strong": 4, "plain": 2}, "an H200 GPU", precision="bf16", **made
    )
    (cpu,) = answer(tmp_path, "fastest PyTorch, on a CPU")
    assert cpu.text == "bf16: S/16 8.00 and 4.00; fp32: S/16 2.00 and 1.60 (times plain and times the fastest)"
    assert cpu.where == "a CPU; 2027-01-02, commit 0123456789ab"
    (gpu,) = answer(tmp_path, "compiled PyTorch, on a GPU")
    assert gpu.text == "bf16: S/16 by CUDA graphs 3.00 and 1.50 (times plain and times compiled)"
    assert [found.text for found in answer(tmp_path, "published code, on a GPU")] == ["not measured"]


def test_a_method_learns_where_both_probes_rise_by_more_than_three_standard_errors(tmp_path):
    def of(run, linear, knn):
        figures = [
            Figure("class", probe, "accuracy", value, None, (value,), 0.1, 0.3, 1000, (), 0.01, 0.01).to_json()
            for probe, value in (("linear", linear), ("20-NN", knn))
        ]
        facts = {"device": "a CPU", "date": "2027-01-02", "commit": "abc", "seed": 0}
        return facts | {"run": run, "points": [{"figures": []}, {"figures": figures}]}

    records = [of("dino", 0.34, 0.32), of("mae", 0.4, 0.4)]
    (tmp_path / "compared-all.json").write_text(json.dumps({"records": records}))
    (found,) = answer(tmp_path, "Do all methods")
    assert found.text.startswith("1 of 2 by more than")
    assert found.text.endswith("points: MAE +10.0, DINO +4.0")
    assert found.where == "a CPU; 2027-01-02, commit abc"


def test_what_was_measured_in_a_tree_with_changes_is_no_answer(tmp_path):
    steps(tmp_path, "x", {"fast": 8, "published": 4}, date="2027-01-02", commit="abc-dirty")
    assert [found.text for found in answer(tmp_path, "published code, on a CPU")] == ["not measured"]
    (tmp_path / "data-x.json").write_text(json.dumps({"commit": "abc-dirty", "date": "2027", "device": "x"}))
    (found,) = answer(tmp_path, "data fast enough")
    assert found.text.startswith("not measured: refused: `data-x.json` was measured in a tree with changes")
    with pytest.raises(record.NoResult, match="abc-dirty"):
        record.load(tmp_path / "data-x.json")


def test_a_gain_within_the_error_is_no_gain(tmp_path):
    def learned(first, last, other):
        figure = lambda probe, value: {"task": "class", "probe": probe, "metric": "accuracy", "value": value, "n": 1000}  # noqa: E731
        point = lambda value: {"figures": [figure("linear", value), figure("20-NN", value)]}  # noqa: E731
        records = [{"run": "ijepa", "seed": 0, "points": [point(first), point(last)]}]
        records += [{"run": "mae", "seed": 0, "points": [point(first), point(other)]}]
        preset = {"steps": 10, "batch": 2}
        result = {"device": "a CPU", "preset": preset, "records": records}
        (tmp_path / "learning-x.json").write_text(json.dumps(result))
        return [answer(tmp_path, words)[0].text.partition(":")[0] for words in ("Does I-JEPA learn", "than MAE")]

    assert learned(0.3, 0.5, 0.4) == ["yes", "yes"]
    assert learned(0.3, 0.31, 0.5) == ["not beyond the error", "no"]
    assert learned(0.5, 0.3, 0.3) == ["not beyond the error", "level"]


def test_a_student_has_an_answer_of_its_own(tmp_path):
    figure = {"task": "class", "metric": "accuracy", "n": 1000}
    ends = {"ijepa": (0.4, 0.3), "mae": (0.5, 0.4), STUDENT: (0.6, 0.5)}
    records = []
    for run, (linear, knn) in ends.items():
        figures = [figure | {"probe": "linear", "value": linear}, figure | {"probe": "20-NN", "value": knn}]
        records.append({"run": run, "seed": 0, "points": [{"figures": figures}]})
    result = {"device": "a CPU", "preset": {"steps": 10, "batch": 2}, "records": records}
    (tmp_path / "learning-x.json").write_text(json.dumps(result))
    average, student = (found.text for found in answer(tmp_path, "than MAE"))
    assert average == "no: linear 40.0 against 50.0 %, 20-NN 30.0 against 40.0 %; 10 steps of 2, 1 seed"
    assert student.startswith("yes, with MAE's masks, crop, initialisation and optimiser and a trained MAE")
    assert student.endswith("linear 60.0 against 50.0 %, 20-NN 50.0 against 40.0 %; 10 steps of 2, 1 seed")


def test_three_seeds_are_held_against_each_other_and_fewer_against_their_images():
    def ends(*values):
        return {seed: (value, 1000) for seed, value in enumerate(values)}

    # The images of one seed leave an error of 2.2 points, by whatever number of seeds.
    assert not answers._differ(ends(0.50), ends(0.54))
    assert not answers._differ(ends(0.50, 0.50), ends(0.54, 0.54))
    assert answers._differ(ends(0.50, 0.50), ends(0.55, 0.55))
    # By seed all three differ by a point, or by none in the mean.
    assert answers._differ(ends(0.40, 0.50, 0.60), ends(0.411, 0.510, 0.609))
    assert not answers._differ(ends(0.40, 0.50, 0.60), ends(0.45, 0.50, 0.55))
    assert not answers._differ(ends(0.40, 0.50, 0.60), dict(zip((1, 2, 3), ends(0.41, 0.51, 0.61).values())))


@pytest.mark.parametrize(
    ("block", "told"),
    [(0.35, "yes; linear"), (0.39, "not beyond the error: multiblock is first, then block"), (0.5, "no; linear")],
)
def test_masks_are_the_best_where_the_next_ones_differ(tmp_path, block, told):
    ends = {"multiblock": 0.4, "block": block, "rasterized": 0.3, "random": 0.2}
    figure = {"task": "class", "probe": "linear", "metric": "accuracy", "n": 4000}
    records = [
        {"run": run, "seed": 0, "points": [{"figures": [figure | {"value": value}]}]} for run, value in ends.items()
    ]
    result = {"device": "a CPU", "preset": {"steps": 10, "batch": 2}, "records": records}
    (tmp_path / "learning-x.json").write_text(json.dumps(result))
    (found,) = answer(tmp_path, "multi-block masks the best")
    assert found.text.startswith(told)


def test_the_repositorys_files_answer_most_questions():
    lines = table(RESULTS)
    for words in (
        "| yes: linear",
        "| no: linear",
        "archives: the largest relative error",
        "times Pillow behind a DataLoader",
    ):
        assert any(words in line for line in lines), words
    assert len(lines) < 26
    assert len(table(RESULTS, brief=True)) < 11


def test_files_that_do_not_note_their_commit_say_so_and_since_when():
    found = []
    for path in RESULTS.glob("*.json"):
        result = record.load(path)
        if isinstance(result, dict) and "commit" not in result and "device" in result:
            found.append(record.origin(path, result))
    assert all(text.endswith("commit not noted") for text in found)
    assert sum("; 20" in text for text in found) > 20


def test_the_history_is_drawn_of_figures_that_changed(tmp_path):
    rows = [
        ("a.json", "x: times", 1, "2026-01-01"),
        ("a.json", "x: times", 2, "2026-02-01"),
        ("b.json", "y", 3, "2026-01-01"),
    ]
    lines = ["file,figure,value,date,commit,noted"] + [f"{f},{n},{v},{d},c{v}123456789,yes" for f, n, v, d in rows]
    (tmp_path / "history.csv").write_text("\n".join(lines) + "\n")
    assert history.table(tmp_path / "history.csv")[2:] == [
        "| x: times | 1 (2026-01-01, at c112345), then 2 (2026-02-01, at c212345) |"
    ]
    for _ in range(2):
        history.plot(tmp_path / "history.csv", tmp_path / "one.svg")
        shutil.copy(tmp_path / "one.svg", tmp_path / "two.svg")
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
    assert record.drawn_from(tmp_path / "history.csv") in (tmp_path / "one.svg").read_text()


def test_versions_are_read_from_the_repository():
    if not (ROOT / ".git").exists() or not history.git(
        "log", "--format=%H", "-3", "--", "bench/results/steps-cpu-mae.json"
    ):
        pytest.skip("this checkout has no history")
    found = history.versions("steps-cpu-mae.json")
    assert len(found) >= 2
    assert all(float(row["value"]) > 1 and row["noted"] == "no" for row in found)
    assert [row["date"] for row in found] == sorted(row["date"] for row in found)
