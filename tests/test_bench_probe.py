"""bench/probe.py: what the probe while training costs beside a step."""

import json

import pytest

pytest.importorskip("omegaconf")

from bench import probe, report

SMALL = ["--device", "cpu", "--rounds", "1", "--widths", "192", "--note", "beside other work"]


@pytest.mark.parametrize("classes", [10, 1000])
def test_it_measures_a_reading_and_its_parts(classes, tmp_path, capsys):
    file = tmp_path / "probe-cpu.json"
    depths = ["model.depth=1", "model.predictor_depth=1"]
    assert probe.main([*SMALL, "--classes", str(classes), "--json", str(file), *depths]) == 0
    printed = capsys.readouterr().out
    result = json.loads(file.read_text())
    (row,) = result["rows"]
    assert all(row[name] > 0 for name in probe.TIMES)
    beside = row["lidar"] if classes > 256 else 0
    spent = result["every"] * row["each"] + row["reading"] + beside
    assert row["share"] == pytest.approx(spent / (spent + result["every"] * row["step"]))
    assert "beside other work; fp32; ms; a reading every 100 steps." in printed
    assert f"| 192 | 32 | {classes:,} |" in printed
    file.write_text(json.dumps(result | {"commit": "abc"}))
    assert report.probe(file) == printed.splitlines()


def test_another_width_is_refused(capsys):
    with pytest.raises(SystemExit):
        probe.main([*SMALL, "--widths", "200"])
    assert "--widths: expected of 192, 768, 1280, got 200" in capsys.readouterr().err
