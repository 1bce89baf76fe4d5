"""The notebook runs, and does what it says; the examples name what there is."""

import json

import pytest

pytest.importorskip("deepspeed")
pytest.importorskip("nvidia.dali")

from ijepa_fast.config import load_config
from tests.launch import ROOT


def test_the_notebook_runs(tmp_path, monkeypatch):
    cells = json.loads((ROOT / "examples" / "vectors.ipynb").read_text())["cells"]
    monkeypatch.chdir(tmp_path)
    names = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    assert names["vectors"].shape == (64, 32)
    assert names["share"] > 0.7  # chance is a half
    assert (tmp_path / "runs" / "vectors" / "summary.json").is_file()


def test_the_example_of_solar_cells_is_a_configuration():
    config = load_config(ROOT / "examples" / "elpv.yaml")
    assert config.data.source == config.probe.train == "examples.elpv:train"
    text = (ROOT / "examples" / "elpv.py").read_text()
    assert "def train()" in text
    assert "def test()" in text
