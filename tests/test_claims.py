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


def test_rates_of_the_suite_are_taken(tmp_path, capsys):
    """The faster row of the run's own size, device and context, and no measurement."""
    row = {"context": "truncate", "data": False, "tokens_per_image": 1.0, "share_of_ceiling": 0.7, "share_of_peak": 0.5}
    rows = [row | {"impl": impl, "images_per_second": rate} for impl, rate in (("fast", 700.0), ("fast-graphs", 800.0))]
    rows += [row | {"impl": "plain", "images_per_second": 9e9}, rows[0] | {"context": "full", "images_per_second": 9e8}]
    case = {"method": "ijepa", "arch": "vit_huge", "patch": 14, "crop": 224, "batch": 128}
    result = {"case": case, "device": "NVIDIA H200", "torch": "2", "ceiling_tflops": 600.0, "rows": rows}
    for name, change in (("h14", {}), ("other", {"device": "NVIDIA H100", "rows": [rows[2]]})):
        (tmp_path / f"steps-x-{name}.json").write_text(json.dumps(result | change))
    options = ["--rates", str(tmp_path), "--out", str(tmp_path)]
    assert claims.main([*options, "--rates-of", "NVIDIA H200"]) == 0
    assert "I-JEPA H/14: the rate of steps-x-h14.json" in capsys.readouterr().err
    written = json.loads((tmp_path / "claims.json").read_text())
    assert {name: found["images_per_second"] for name, found in written["measured"].items()} == {"I-JEPA H/14": 800.0}
    assert written["measured"]["I-JEPA H/14"]["batch"] == 128
    assert claims.main([*options, "--rates-of", "NVIDIA B200"]) == 1
    assert "no rates of this device" in capsys.readouterr().err
