"""LeJEPA's small views: their sizes and parts of an image, the packed batch, the loss, the work, bad input."""

import pytest
import torch

from ijepa_fast.config import ConfigError
from ijepa_fast.data.crops import View
from ijepa_fast.kernels.sigreg import sigreg
from ijepa_fast.methods.lejepa import LeJEPA, Options
from tests.small import setup_of
from tests.steps import counted_work

BATCH = 9


def model_of(crop=32, **options):
    chosen = Options(views=2, slices=16, bottleneck=16, hidden=24, embedding=8, **options)
    torch.manual_seed(0)
    return LeJEPA(setup_of(crop, 4, options=chosen))


def images_of(model):
    return [torch.randint(256, (BATCH, *_size(view), 3), dtype=torch.uint8) for view in model.views()]


def _size(view):
    return (view.crop, view.crop) if isinstance(view.crop, int) else view.crop


def test_small_views_have_what_is_below_the_scale():
    """Beside 224 pixels of 14 to a patch they have 98, as published; colours and blur are those of the others."""
    torch.manual_seed(0)
    model = LeJEPA(setup_of(224, 14, options=Options(views=2, small_views=6, scale=0.3)))
    *large, small = model.views()[:3]
    assert len(model.views()) == 8
    assert [view.crop for view in (*large, small)] == [224, 224, 98]
    assert large[0].scale == (0.3, 1.0)
    assert small.scale == (0.05, 0.3)
    assert (small.sigma, small.strengths, small.blur) == (large[0].sigma, large[0].strengths, large[0].blur)


def test_without_small_views_they_are_what_they_were():
    sigma = (0.1 * 32 / 128, 2.0 * 32 / 128)
    view = View(32, (0.08, 1.0), blur=0.5, solarise=0.2, sigma=sigma, strengths=(0.8, 0.8, 0.8, 0.2))
    assert model_of().views() == [view, view]


def test_the_loss_is_that_of_the_views_one_by_one():
    """Each view's class token by itself; embeddings are drawn to the mean of the large ones, gradients and all."""
    model = model_of(small_views=3, drop_path=0.0)
    images, draw = images_of(model), model.draw(BATCH, 0, 0)
    tokens = []
    for number, view in enumerate(images):
        grid = draw.grid if number < 2 else draw.small_grid
        x = model.encoder.embed(model.patchify(view), grid)
        length = 1 + grid[0] * grid[1]
        ends = torch.arange(0, len(x) + 1, length, dtype=torch.int32)
        tokens.append(model.encoder.class_tokens(x, ends, length))
    embeddings = model.head(torch.cat(tokens)).view(5, BATCH, -1)
    centre = (embeddings[0] + embeddings[1]) / 2
    agreement = sum((view - centre).square().mean() for view in embeddings) / 5
    gaussian = sum(sigreg(view, draw.directions) for view in embeddings) / 5
    expected = 0.02 * gaussian + 0.98 * agreement
    loss, terms = model(images, draw)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(terms["agreement"], agreement.detach(), rtol=1e-5, atol=1e-6)
    found, plain = (torch.autograd.grad(x, [*model.parameters()]) for x in (loss, expected))
    for (name, _), a, b in zip(model.named_parameters(), found, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5, msg=name)


def test_work_is_what_torch_counts():
    model = model_of(small_views=3)
    images, draw = images_of(model), model.draw(BATCH, 0, 0)
    assert draw.tokens == BATCH * (2 * 65 + 3 * 10)
    assert counted_work(model, images, draw) == pytest.approx(model.work(draw).total, rel=0.01)


def test_a_view_of_one_patch_has_no_smaller_one():
    with pytest.raises(ConfigError, match=r"objective\.options\.small_views=3: a view is one patch"):
        model_of(crop=4, small_views=3)
