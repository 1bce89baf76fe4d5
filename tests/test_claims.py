"""The claims' table: hours follow from rates, factors from published figures and counted work, nothing is typed."""

import json
import math

import pytest

from bench import claims

MEASURED = {
    "device": "a device",
    "torch": "0",
    "batch": 8,
    "tokens_per_image": 100.0,
    "share_of_ceiling": 0.5,
    "share_of_peak": None,
}
RATES = {"I-JEPA H/14": 1000.0, "MAE H/14": 2000.0, "iBOT S/16": 4000.0}


@pytest.fixture(scope="module")
def rows():
    measured = {name: MEASURED | {"images_per_second": rate} for name, rate in RATES.items()}
    return {row["name"]: row for row in claims.figures(measured, small=False)}


def test_hours_are_images_over_the_rate(rows):
    assert rows["I-JEPA H/14"]["hours"] == pytest.approx(1_281_167 * 300 / 1000 / 3600)
    assert rows["MAE H/14"]["hours_ratio"] == pytest.approx(1600 / 300 / 2)
    assert rows["iBOT S/16"]["hours_ratio"] == pytest.approx(800 / 300 / 4)
    assert rows["iBOT L/16"]["hours"] is None


def test_the_work_of_whole_runs(rows):
    assert rows["I-JEPA H/14"]["exaflop"] == pytest.approx(655e9 * 1_281_167 * 300 / 1e18, rel=0.03)
    assert rows["MAE H/14"]["work_ratio"] == pytest.approx(2.4, abs=0.1)
    assert rows["iBOT S/16"]["work_ratio"] == pytest.approx(0.65, abs=0.06)


def test_published_shares_of_the_peak(rows):
    """19 % of an A100's peak for I-JEPA; the factor is the product of what it is made of."""
    ours, other = rows["I-JEPA H/14"], rows["iBOT S/16"]
    assert ours["published_share_of_peak"] == pytest.approx(0.19, abs=0.01)
    utilisation = ours["published_share_of_peak"] / other["published_share_of_peak"]
    factor = other["work_ratio"] * 312 / 125 * utilisation
    assert factor == pytest.approx(other["device_hours"] / ours["device_hours"], rel=1e-6)


def test_the_table_has_what_was_measured_and_says_what_was_not(rows):
    result = {"device": "a device", "torch": "0", "small": False, "rows": list(rows.values())}
    text = claims.table(result)
    line = next(line for line in text.splitlines() if line.startswith("| iBOT L/16"))
    assert "not measured" in line
    line = next(line for line in text.splitlines() if line.startswith("| over 2.5x"))
    assert [cell.strip() for cell in line.split("|")[2:4]] == ["2.7", f"{rows['iBOT S/16']['work_ratio']:.2f}"]
    assert "2.00 times the time" in text
    assert "2.7x fewer optimiser steps" in text


@pytest.mark.slow
def test_the_command_measures_stand_ins_and_makes_table_and_plot(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    options = ["--small", "--device", "cpu", "--runs", "I-JEPA H/14,MAE H/14", "--rounds", "1", "--steps", "1"]
    assert claims.main([*options, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "Stand-ins" in printed
    result = json.loads((tmp_path / "claims.json").read_text())
    found = {row["name"]: row for row in result["rows"]}
    assert found["I-JEPA H/14"]["images_per_second"] > 0
    assert found["iBOT S/16"]["images_per_second"] is None
    assert all(row["hours"] is None for row in found.values())
    assert math.isclose(found["MAE H/14"]["work_ratio"], 2.37, rel_tol=0.03)
    (tmp_path / "claims.md").unlink()
    assert claims.main(["--load", str(tmp_path)]) == 0
    assert (tmp_path / "claims.md").read_text() == printed == capsys.readouterr().out
    assert (tmp_path / "claims.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_that_does_not_exist_is_named(capsys):
    with pytest.raises(SystemExit) as stop:
        claims.main(["--runs", "I-JEPA H/15"])
    assert stop.value.code == 2
    assert "I-JEPA H/15" in capsys.readouterr().err
