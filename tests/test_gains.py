"""What a configuration's runs gained by training: a table and a picture of their summaries."""

import json
from pathlib import Path

import pytest

pytest.importorskip("omegaconf")
pytest.importorskip("matplotlib")

from bench import gains
from bench.record import load
from ijepa_fast.config import load_config, save_config
from ijepa_fast.eval.figures import Figure

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "quickstart.yaml"


def a_run(folder, seed, value, *more, probe="linear"):
    """A folder with what of a finished run is read."""
    folder.mkdir()
    save_config(load_config(CONFIG, [f"seed={seed}", f"name={folder.name}", *more]), folder / "config.yaml")
    figure = Figure("count", probe, "accuracy", value, None, (value,), 0.2, 0.3, 1000, (), 0.015, 0.02)
    facts = dict.fromkeys(gains.FACTS, 1) | {"date": "2026-11-29", "commit": "a" * 40, "device": "a CPU"}
    (folder / "summary.json").write_text(json.dumps(facts | {"figures": [figure.to_json()]}))
    return folder


def test_gains_are_in_standard_errors_and_averaged_over_seeds(tmp_path, capsys):
    runs = [a_run(tmp_path / "b", 1, 0.4), a_run(tmp_path / "a", 0, 0.35)]
    out = tmp_path / "gains.json"
    assert gains.main([*map(str, runs), "--json", str(out)]) == 0
    result = json.loads(out.read_text())
    assert [found["seed"] for found in result["records"]] == [0, 1]
    assert result["commit"] == "a" * 12
    expected = (
        "| count | linear | accuracy | 0.200 | 0.300 to 0.350 (+2.0 s.e.) | 0.300 to 0.400 (+4.0 s.e.) | +0.075 |"
    )
    assert expected in capsys.readouterr().out
    gains.plot(result, tmp_path / "gains.png", "of this")
    assert b"of this" in (tmp_path / "gains.png").read_bytes()


def test_runs_that_do_not_belong_together_are_one_sentence(tmp_path, capsys):
    a, b = a_run(tmp_path / "a", 0, 0.4), a_run(tmp_path / "b", 1, 0.4, "optim.lr=0.002")
    (tmp_path / "none").mkdir()
    short = a_run(tmp_path / "short", 2, 0.4, probe="attentive")
    for runs, words in (([a, b], "others of optim.lr"), ([tmp_path / "none"], "no summary.json"), ([short], "linear")):
        assert gains.main([*map(str, runs)]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        assert words in line


def test_a_run_of_a_changed_tree_is_marked_as_such(tmp_path):
    run = a_run(tmp_path / "a", 0, 0.4)
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(summary | {"commit": "a" * 40 + "-dirty"}))
    (tmp_path / "g.json").write_text(json.dumps(gains.gather([run])))
    with pytest.raises(ValueError, match="tree with changes"):
        load(tmp_path / "g.json")
