"""Crops that are no squares: every method that takes them is trained, counted and exported on them; others say no."""

import numpy as np
import pytest
import torch

pytest.importorskip("deepspeed")
pytest.importorskip("nvidia.dali")
pytest.importorskip("yaml")

import yaml

import ijepa_fast
from ijepa_fast.config import ConfigError, load_config
from ijepa_fast.data.crops import View
from ijepa_fast.data.sources import open_source
from ijepa_fast.data.views import ViewLoader
from ijepa_fast.interop import export
from ijepa_fast.run.build import build_method
from ijepa_fast.run.counted import saved_values
from tests.data_images import write_photos
from tests.launch import TINY
from tests.test_methods import options_of

SMALL = [item for item in TINY if not item.startswith("data.")]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    write_photos(folder, 8, size=64)
    return folder


@pytest.mark.parametrize("name", ["mae", "simmim", "data2vec", "beit", "cae"])
def test_a_method_on_rectangles(name, photos, tmp_path):
    """Trained, counted for `plan`, loaded and exported; I-JEPA's are in test_any_images.py."""
    config, options = options_of(name, "data.crop=[32,48]", "optim.steps=2", "batch_size=4", f"runs={tmp_path}")
    pairs = (item.partition("=") for item in [*SMALL, *options])
    given = {key: yaml.safe_load(value) for key, _, value in pairs}
    run = ijepa_fast.train(str(photos), config, **given)
    assert len(run.log) == 2
    encoder, images = run.encoder(), torch.rand(2, 3, 32, 48)
    assert encoder(images).shape[:2] == (2, 96)
    out = tmp_path / "out"
    assert export.main(["--checkpoint", str(run.folder), "--format", "hf", "--out", str(out)]) == 0
    torch.testing.assert_close(ijepa_fast.load(out)(images), encoder(images))
    options = [*SMALL, *options, f"data.source={photos}"]
    square = saved_values(load_config(config, [*options, "data.crop=32"]))
    assert square < saved_values(load_config(config, options)) < 2.5 * square


@pytest.mark.parametrize("kind", ["photographs", "arrays"])
def test_a_view_may_be_a_rectangle(kind, tmp_path):
    """Brightness rises with the height of the image alone, and so it does in the view."""
    column = np.linspace(0, 255, 60).astype(np.uint8)[:, None, None]
    if kind == "arrays":
        np.save(tmp_path / "a.npy", np.broadcast_to(column, (4, 60, 60, 3)).transpose(0, 3, 1, 2))
    else:
        from PIL import Image

        for number in range(4):
            Image.fromarray(np.broadcast_to(column, (60, 60, 3)).copy()).save(tmp_path / f"{number}.png")
    view = View((16, 24), (0.9, 1.0), jitter=0.0, grey=0.0)
    loader = ViewLoader(open_source(tmp_path), views=[view], interpolation="bilinear", batch_size=2)
    try:
        (images,) = next(loader).images
    finally:
        loader.close()
    assert images.shape == (2, 16, 24, 3)
    assert (images.float().diff(dim=1) > 0).all()
    assert (images.float().diff(dim=2).abs() <= 1).all()


@pytest.mark.parametrize("name", ["ibot", "dino", "msn"])
def test_a_method_of_squares_says_so(name):
    config, options = options_of(name, "data.crop=[32,48]")
    with pytest.raises(ConfigError, match=rf"data\.crop: expected a square for objective\.method={name}"):
        build_method(load_config(config, options))
