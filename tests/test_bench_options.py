"""bench/options.py: a step with an option beside one without."""

import json

import pytest
import torch

pytest.importorskip("omegaconf")


from bench import options, report

SMALL = ["--model", "vit_tiny", "--crop", "64", "--patch", "8", "--batch", "4", "--device", "cpu", "--rounds", "2"]
KEYS = ["mask.min_keep=4", "model.predictor_dim=48", "model.predictor_depth=1", "model.depth=2"]


def test_what_is_measured_has_its_work_and_the_table_says_so(tmp_path, capsys):
    runs = "salt,sets2,sets4,vicreg0.001,position"
    assert options.main([*SMALL, "--runs", runs, "--json", str(tmp_path / "options-cpu.json"), *KEYS]) == 0
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "options-cpu.json").read_text())
    rows = {row["option"]: row for row in result["rows"]}
    assert list(rows) == ["none", "position", "sets2", "sets4", "salt", "vicreg0.001"]
    for row in rows.values():
        low, high = row["quartiles"]
        assert 0 < low <= row["ratio"] <= high
        assert row["ms"] > 0
    assert rows["none"]["work"] == rows["position"]["work"] == rows["salt"]["work"] == 1
    assert rows["sets4"]["work"] > rows["sets2"]["work"] > 1.1
    assert "vit_tiny/8, crop 64, batch 4, fp32; 2 rounds" in printed
    assert f"| sets2 | {rows['sets2']['ms']:.1f} |" in printed
    (tmp_path / "options-cpu.json").write_text(json.dumps(result | {"commit": "abc"}))
    assert report.options(tmp_path / "options-cpu.json") == printed.splitlines()


def test_every_measured_option_can_be_measured():
    assert set(options.SAME) < set(options.OPTIONS)
    assert {"salt", "batch", "xavier"} <= set(options.MEASURED)
    small = ["model.depth=3", "model.dim=48", "model.heads=2", "model.predictor_dim=48"]
    for name in options.MEASURED:
        options.method_of(name, small, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("runs", ["flip", "salted", "salt,none"])
def test_a_name_that_is_none_is_said(runs, capsys):
    with pytest.raises(SystemExit):
        options.main([*SMALL, "--runs", runs])
    assert "--runs: expected of xavier, position" in capsys.readouterr().err
