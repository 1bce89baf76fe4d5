"""bench/controls.py: what labels are read with without an encoder."""

import json

import pytest
import torch

pytest.importorskip("omegaconf")
pytest.importorskip("nvidia.dali")
pytest.importorskip("PIL")

import numpy as np
from PIL import Image

from bench import controls, report


@pytest.fixture
def shades(tmp_path):
    """Dark and bright images of noise, which a mean colour tells apart."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 40), ("test", 20)):
        for name, level in (("dark", 60), ("bright", 180)):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(level, level + 40, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / part / name / f"{i}.png")
    return tmp_path


def test_what_the_mean_colour_tells_is_read_and_the_table_says_so(shades, tmp_path, capsys):
    file = tmp_path / "controls.json"
    options = [f"probe.train={shades / 'train'}", f"probe.test={shades / 'test'}", "data.crop=32", "model.patch=4"]
    assert controls.main(["--json", str(file), f"runs={tmp_path}", f"data.source={shades / 'train'}", *options]) == 0
    result = json.loads(file.read_text())
    rows = {row["control"]: row for row in result["rows"]}
    assert rows.keys() == controls.CONTROLS.keys()
    assert rows["mean colour"]["values"] == 3
    assert rows["mean colour"]["figures"][0]["value"] == 1
    file.write_text(json.dumps(result | {"commit": "abc"}))
    assert report.controls(file) == capsys.readouterr().out.splitlines()


def test_statistics_are_of_each_image():
    images = torch.rand(3, 32, 48, 3)
    for control in controls.CONTROLS.values():
        torch.testing.assert_close(control(images)[1:2], control(images[1:2]))
    flat = torch.full((1, 32, 48, 3), 0.5)
    assert controls.CONTROLS["both by row"](flat).abs().max() == 0


def test_a_configuration_without_labelled_images_is_one_sentence(tmp_path, capsys):
    assert controls.main(["--config", "vit_small16", "data.source=synthetic", f"runs={tmp_path}"]) == 1
    assert "it has no labelled images to probe" in capsys.readouterr().err
