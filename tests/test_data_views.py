"""The several views of an image for the baselines."""

import numpy as np
import pytest
import torch

pytest.importorskip("PIL")
pytest.importorskip("nvidia.dali")

from PIL import Image

from ijepa_fast.data.crops import View
from ijepa_fast.data.dali import TrainLoader
from ijepa_fast.data.sources import open_source
from ijepa_fast.data.views import ViewLoader
from ijepa_fast.methods.ibot import views_of
from ijepa_fast.methods.mae import VIEW
from tests.data_images import bad_kinds, write_photos

PUBLISHED = views_of(224, 16)  # iBOT's


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    write_photos(folder, 24, size=120)
    return open_source(folder)


def take(source, steps, **options):
    loader = ViewLoader(source, **({"batch_size": 8, "views": PUBLISHED} | options))
    try:
        return [next(loader) for _ in range(steps)]
    finally:
        loader.close()


def test_ibot_gets_two_large_and_ten_small_views_and_resumes_exactly(photos):
    batches = take(photos, 3)
    sides = [224, 224] + [96] * 10
    assert [tuple(view.shape) for view in batches[0].images] == [(8, side, side, 3) for side in sides]
    assert all(view.dtype == torch.uint8 for view in batches[0].images)
    (resumed,) = take(photos, 1, start_step=2)
    assert torch.equal(resumed.indices, batches[2].indices)
    assert all(torch.equal(a, b) for a, b in zip(resumed.images, batches[2].images))


def plain(crop=64, **options):
    """A view without jitter and grey, but for the `options`."""
    return View(crop, **({"scale": (0.5, 1.0), "jitter": 0.0, "grey": 0.0} | options))


def test_a_view_without_augmentation_is_its_window_or_the_mirror_of_it(photos):
    (batch,) = take(photos, 1, views=[plain(scale=(1.0, 1.0))], ratio=(1.0, 1.0), interpolation="bilinear")
    mirrored = 0
    for index, image in zip(batch.indices.tolist(), batch.images[0].numpy().astype(int)):
        with Image.open(photos.name(index)) as whole:
            side = min(whole.size)
            x, y = (whole.width - side) // 2, (whole.height - side) // 2
            expected = np.asarray(whole.crop((x, y, x + side, y + side)).resize((64, 64), Image.BILINEAR)).astype(int)
        errors = [np.abs(image - expected).mean(), np.abs(image - expected[:, ::-1]).mean()]
        assert min(errors) < 2
        mirrored += errors[1] < errors[0]
    assert 0 < mirrored < 8


def test_grey_solarisation_and_blur_do_what_they_say(photos):
    base = take(photos, 1, views=[plain()])[0].images[0].int()

    solarised = take(photos, 1, views=[plain(solarise=1.0)])[0].images[0].int()
    assert torch.equal(solarised, torch.where(base >= 128, 255 - base, base))

    blurred = take(photos, 1, views=[plain(blur=1.0)])[0].images[0].int()
    steps = [(images[:, 1:] - images[:, :-1]).abs().float().mean() for images in (base, blurred)]
    assert steps[1] < 0.8 * steps[0]

    grey = take(photos, 1, views=[plain(grey=1.0)])[0].images[0].int()
    assert (grey.amax(-1) - grey.amin(-1)).max() <= 2
    luma = (base.float() @ torch.tensor([0.299, 0.587, 0.114]) - grey[..., 0]).abs()
    assert luma.mean() < 2

    assert (take(photos, 1, views=[plain(jitter=1.0)])[0].images[0].int() - base).abs().float().mean() > 3


def test_a_view_like_another_is_the_same_at_another_size(photos):
    views = [plain(jitter=1.0), plain(crop=32, jitter=1.0, like=0), plain(crop=32, jitter=1.0)]
    large, small, other = take(photos, 1, views=views)[0].images
    halved = large.float().unflatten(1, (32, 2)).unflatten(3, (32, 2)).mean((2, 4))
    assert (halved - small.float()).abs().mean() < 3
    assert (halved - other.float()).abs().mean() > 6


def test_views_of_one_image_differ(photos):
    (batch,) = take(photos, 1)
    large, small = batch.images[:2], batch.images[2:]
    assert not torch.equal(*large)
    assert len({view.numpy().tobytes() for view in small}) == 10


def test_broken_files_are_replaced_here_too(tmp_path):
    write_photos(tmp_path, 40, size=40)
    for name in ("empty.jpg", "broken_inside.png"):
        (tmp_path / "class0" / name).write_bytes(bad_kinds()[name])
    source = open_source(tmp_path)
    batches = take(source, 6, views=[View(32, (0.5, 1.0), blur=0.0)] * 2, max_bad_share=0.1)
    bad = {i for i in range(len(source)) if source.name(i).rsplit("/", 1)[1] in bad_kinds()}
    assert len(bad) == 2
    assert not bad & set(torch.cat([b.indices for b in batches]).tolist())


def test_mae_gets_bicubic_crops_and_flips(photos):
    loader = TrainLoader(photos, batch_size=8, crop=32, **VIEW)
    assert next(loader).images.shape == (8, 32, 32, 3)
    loader.close()


def test_ibots_blur_follows_the_size_of_the_image():
    """As published at 224 pixels; at 32, where it would leave nothing, the same share of the image."""
    assert {view.sigma for view in views_of(224, 16)} == {(0.1, 2.0)}
    for view in views_of(32, 4):
        assert view.sigma == pytest.approx((0.1 / 7, 2 / 7))
