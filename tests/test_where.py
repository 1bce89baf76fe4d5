"""Target blocks are held to the map of where there is something to see."""

import numpy as np
import pytest
import torch

pytest.importorskip("nvidia.dali")

from PIL import Image

from ijepa_fast.config import ConfigError, load_config
from ijepa_fast.data.sources import open_source
from ijepa_fast.data.where import Area
from ijepa_fast.masks.inside import SHARE, held
from ijepa_fast.masks.samplers import make_sampler
from ijepa_fast.run.build import build_loader, build_method
from tests.launch import TINY

SIDE, WINDOW, PATCH = 400, 100, 4


def blobs(seed=0):
    """A map of some fields, about half of it: bool (SIDE, SIDE)."""
    coarse = np.random.default_rng(seed).integers(0, 256, (8, 8), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((SIDE, SIDE), Image.Resampling.BICUBIC)) > 120


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An image of one channel that shows the map itself, and the map, at the same resolution and at a quarter."""
    folder = tmp_path_factory.mktemp("where")
    np.save(folder / "image.npy", 255 * blobs().astype(np.uint8)[None, None])
    Image.fromarray(blobs()).save(folder / "map.png")
    Image.fromarray(blobs()[2::4, 2::4]).save(folder / "coarse.png")
    return folder


def loader_of(folder, map_="map.png", *more):
    """A loader of crops of windows of the image, in steps of 8, and the method whose masks it draws."""
    options = [f"data.source={folder / 'image.npy'}", f"data.where={folder / map_}", f"data.window={WINDOW}", *more]
    options += ["data.channels=1", "data.flip=true", "batch_size=8", f"runs={folder}", "mask.target_scale=[0.08,0.12]"]
    config = load_config("quickstart", [*TINY, *options])
    source = open_source(folder / "image.npy", reading=config.data.reading)
    method = build_method(config)
    return build_loader(config, method, source, torch.device("cpu"), 0, 1), method


def batches(loader, count):
    try:
        return [next(loader) for _ in range(count)]
    finally:
        loader.close()


def by_patch(images):
    """How much of each patch is white, (B, N)."""
    rows, columns = (side // PATCH for side in images.shape[1:])
    return images.float().reshape(-1, rows, PATCH, columns, PATCH).mean((2, 4)).reshape(-1, rows * columns) / 255


@pytest.mark.parametrize(
    ("map_", "crop", "few", "error"),
    [
        ("map.png", "32", 0, 0.05),
        ("map.png", "32", 2, 0.05),
        ("coarse.png", "32", 0, 0.08),
        ("map.png", "[32,56]", 0, 0.05),
    ],
)
def test_the_shares_are_what_the_crops_show(folder, map_, crop, few, error):
    """The image is its map, so what is white of a patch is what lies inside: windows, crops and mirroring agree."""
    loader, method = loader_of(folder, map_, f"data.crop={crop}", f"data.crops_per_image={few}")
    for step, batch in enumerate(batches(loader, 3)):
        inside = method.inside(np.arange(8 * step, 8 * step + 8))
        seen = by_patch(batch.images[..., 0]).numpy()
        assert np.abs(inside - seen).mean() < error
        assert np.corrcoef(inside.ravel(), seen.ravel())[0, 1] > 0.95
        assert 0.1 < inside.mean() < 0.95


@pytest.mark.parametrize("policy", ["full", "truncate"])
def test_target_blocks_lie_inside(folder, policy):
    """Half of each block at least, but for crops that show too little; without the map it is otherwise. On any rank."""
    loader, method = loader_of(folder, "map.png", f"mask.policy={policy}")
    drawn = [batch.draw for batch in batches(loader, 6)]

    def worst(draw, step):
        inside = method.inside(np.arange(8 * step, 8 * step + 8)).ravel()
        return inside[draw.target_index.numpy()].mean(2).min(0)

    with_map = np.concatenate([worst(draw, step) for step, draw in enumerate(drawn)])
    second = method.draw(4, 0, 3, 4, 8)
    assert torch.equal(second.target_index + 4 * 64, drawn[3].target_index[:, 4:])
    ours, whole = second.context_lengths, drawn[3].context_lengths[4:]
    assert torch.equal(ours, whole)
    inside, method.inside = method.inside, None
    unheld = [method.draw(8, 0, step, 0, 8) for step in range(6)]
    method.inside = inside
    without = np.concatenate([worst(draw, step) for step, draw in enumerate(unheld)])
    assert (without < SHARE).mean() > 0.4
    assert (with_map < SHARE).mean() < 0.5 * (without < SHARE).mean()
    assert np.all(with_map >= np.minimum(without, SHARE))


def test_masks_stay_where_there_is_no_choice():
    """An image that lies inside as a whole, or not at all, keeps its first masks; one that half lies there does not."""
    sampler = make_sampler("multiblock", (14, 14))
    inside = np.zeros((3, 14, 14))
    inside[0] = 1
    inside[2, :, 7:] = 1
    first = sampler(3, 5, 2, 40)
    masks = held(lambda place: sampler(3, 5, 2, place), 40, inside.reshape(3, -1))
    for image, same in ((0, True), (1, True), (2, False)):
        assert torch.equal(masks.target[:, image], first.target[:, image]) is same
        assert torch.equal(masks.context[:, image], first.context[:, image]) is same
    assert not masks.context[0, 2][masks.target[:, 2].flatten().long()].any()  # contexts are those of their targets


def test_shares_are_means_of_the_map():
    inside = blobs(1)[:90, :120]
    area = Area(inside, 180, 360)  # two pixels a place, three pixels a place
    found = area.shares(np.array([0, 20, 180]), np.array([30, 60, 333]))
    expected = [[inside[a:b, c:d].mean() for c, d in ((10, 20), (20, 111))] for a, b in ((0, 10), (10, 90))]
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    fine = Area(np.repeat(np.repeat(inside, 20, 0), 20, 1), 1800, 2400)  # kept more coarsely than it is
    np.testing.assert_allclose(fine.shares(np.array([0, 1800]), np.array([0, 2400])), inside.mean(), rtol=1e-12)


def test_a_map_without_windows_is_refused(folder):
    with pytest.raises(ConfigError, match=r"data\.where=map\.png: expected data\.window with it"):
        load_config("quickstart", [*TINY, "data.where=map.png"])
