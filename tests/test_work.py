"""The work that each method counts is what torch's own counter sees of its step, to 1 %."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("deepspeed")

from ijepa_fast.config import load_config
from ijepa_fast.methods.method import METHODS
from ijepa_fast.run.build import build_method
from tests.launch import ROOT
from tests.steps import counted_work
from tests.test_methods import TRIED

SIZES = ["data.crop=64", "model.dim=64", "model.depth=3", "model.heads=2", "model.patch=8"]
SIZES += ["model.predictor_dim=32", "model.predictor_depth=2"]


def random_images(method, images, cells=None):
    """Images, or a list of views, of noise; cells: on so many random colours along a side."""
    views = method.views()
    sides = [view.crop for view in views] or [method.setup.data.crop]
    drawn = []
    for side in sides:
        pixels = torch.randint(256, (images, 3, side, side)).float()
        if cells:
            pixels = (3 * F.interpolate(torch.randint(256, (images, 3, cells, cells)).float(), size=side) + pixels) / 4
        drawn.append(pixels.permute(0, 2, 3, 1).to(torch.uint8).contiguous())
    return drawn if views else drawn[0]


@pytest.mark.parametrize("name", METHODS)
def test_work_agrees_with_the_flop_counter(name):
    config, options = TRIED[name]
    method = build_method(load_config(ROOT / "configs" / f"{config}.yaml", [*options, *SIZES]))
    draw, images = method.draw(3, 0, 0), random_images(method, 3)
    assert counted_work(method, images, draw) == pytest.approx(method.work(draw).total, rel=0.01)
