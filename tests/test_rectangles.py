"""Crops that are no squares: every method is trained, counted, probed, reported and exported on them."""

import numpy as np
import pytest
import torch

pytest.importorskip("deepspeed")
pytest.importorskip("nvidia.dali")
pytest.importorskip("yaml")

import yaml

import ijepa_fast
from ijepa_fast import probe, report
from ijepa_fast.config import load_config
from ijepa_fast.data.crops import View
from ijepa_fast.data.sources import open_source
from ijepa_fast.data.views import ViewLoader
from ijepa_fast.interop import export
from ijepa_fast.masks.crops import draw_masks
from ijepa_fast.run.build import build_method
from ijepa_fast.run.counted import saved_values
from tests.data_images import write_photos
from tests.launch import TINY
from tests.test_methods import BY_CLASS, options_of

SMALL = [item for item in TINY if not item.startswith("data.")]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for label in ("left", "right"):
        write_photos(folder / label, 8, size=64)
    return folder


@pytest.mark.parametrize("name", ["mae", "simmim", "data2vec", "beit", "cae", "msn", "ibot", "dino"])
def test_a_method_on_rectangles(name, photos, tmp_path):
    """Trained, counted for `plan`, loaded, probed, reported and exported; I-JEPA's are in test_any_images.py."""
    config, options = options_of(name, "data.crop=[32,48]", "optim.steps=2", "batch_size=4", f"runs={tmp_path}")
    pairs = (item.partition("=") for item in [*SMALL, *options])
    given = {key: yaml.safe_load(value) for key, _, value in pairs}
    run = ijepa_fast.train(str(photos), config, **given)
    assert len(run.log) == 2
    encoder, images = run.encoder(), torch.rand(2, 3, 32, 48)
    assert encoder(images).shape[:2] == (2, 1 if name in BY_CLASS else 96)
    out = tmp_path / "out"
    assert export.main(["--checkpoint", str(run.folder), "--format", "hf", "--out", str(out)]) == 0
    torch.testing.assert_close(ijepa_fast.load(out)(images), encoder(images))
    options = [*SMALL, *options, f"data.source={photos}"]
    figures = tmp_path / "figures.json"
    labelled = ["--data", str(photos), "--test", str(photos)]
    assert probe.main(["--checkpoint", str(run.folder), *labelled, "--out", str(figures)]) == 0
    assert (
        report.main([str(run.folder), "--images", str(photos), "--sample", "8", "--out", str(tmp_path / "r.html")]) == 0
    )
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
def test_small_crops_have_the_shape_of_large_ones(name):
    """Each side is 3/7 of a large crop's, in whole patches; masks and positions are of those grids."""
    whole = ["objective.options.small_crop=null"] if name == "msn" else []  # of a side where it is set
    config, options = options_of(name, "model.patch=8", "data.crop=[56,112]", *whole)
    method = build_method(load_config(config, options))
    large, small = method.views()[0], method.views()[-1]
    assert (large.crop, small.crop) == ((56, 112), (24, 48))
    draw = method.draw(3, 0, 0)
    assert (draw.grid, draw.small_grid) == ((7, 14), (3, 6))
    images = [torch.randint(256, (3, *view.crop, 3), dtype=torch.uint8) for view in method.views()]
    loss, _ = method(images, draw)
    loss.backward()
    assert method.encoder.get_parameter("pos_embed").grad.abs().sum() > 0
    tall = np.linspace(0, 1, 7)[:, None].repeat(14, 1)
    with torch.no_grad():
        method.encoder.pos_embed[:, 1:] = torch.from_numpy(tall).float().view(1, -1, 1)
        table = method.encoder._positions((3, 6))[0, 1:, 0].view(3, 6)
    assert (table.diff(dim=0) > 0.1).all()
    assert (table.diff(dim=1).abs() < 1e-5).all()


def test_blocks_of_a_rectangle_reach_all_of_it():
    masks = draw_masks(np.random.default_rng(0), 400, (4, 12)).reshape(-1, 4, 12)
    shares = masks.mean((1, 2))
    assert 0.1 < shares[shares > 0].mean() < 0.5
    assert masks.any(0).all()
