"""The CPU loader's resize: csrc against PyTorch and Pillow, up and down, odd sizes, and without the extension."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("PIL")
from PIL import Image

from ijepa_fast.data import resize
from ijepa_fast.kernels.common import native

PILLOW = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def smooth(rows, columns):
    """A random image without hard edges, uint8 (rows, columns, 3)."""
    small = torch.rand(1, 3, max(2, rows // 8), max(2, columns // 8))
    return (
        (F.interpolate(small, (rows, columns), mode="bicubic").clamp(0, 1)[0] * 255)
        .byte()
        .permute(1, 2, 0)
        .contiguous()
        .numpy()
    )


@pytest.fixture(params=["as built", "without csrc"])
def path(request, monkeypatch):
    if request.param == "without csrc":
        monkeypatch.setattr(resize, "_has_csrc", lambda: False)


@pytest.mark.parametrize("interpolation", list(PILLOW))
@pytest.mark.parametrize("crop", [17, 32, 80, 224])
def test_as_pillow(path, interpolation, crop):
    images = [smooth(*size) for size in ((307, 325), (7, 5), (crop, crop), (50, 600), (33, 16), (1, 1))]
    out = np.empty((len(images), crop, crop, 3), np.uint8)
    resize.resize_(out, images, interpolation)
    for image, found in zip(images, out):
        wanted = Image.fromarray(image).resize((crop, crop), PILLOW[interpolation])
        off = np.abs(np.asarray(wanted).astype(int) - found)
        assert off.mean() < 0.5
        assert off.max() <= (3 if interpolation == "bilinear" else 24)


@pytest.mark.parametrize("interpolation", list(PILLOW))
@pytest.mark.parametrize("value", [0, 1, 127, 254, 255])
def test_a_plain_colour_stays(path, interpolation, value):
    out = np.zeros((1, 48, 48, 3), np.uint8)
    resize.resize_(out, [np.full((91, 30, 3), value, np.uint8)], interpolation)
    assert (out == value).all()


@pytest.mark.skipif(not native.available(), reason="the extension ijepa_fast._C is not built")
def test_csrc_is_what_runs_where_it_is_built():
    if not resize._has_csrc():
        pytest.skip("csrc has no resize for this processor")
    image = smooth(300, 400)
    out = np.empty((1, 64, 64, 3), np.uint8)
    with torch.profiler.profile() as profile:
        resize.resize_(out, [image], "bilinear")
    assert any("resize_cpu_" in event.key for event in profile.key_averages())
