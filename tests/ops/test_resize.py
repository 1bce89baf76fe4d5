"""resize: the reference against Pillow, csrc and PyTorch's interpolation against it, up, down, odd sizes, bad input."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("PIL")
from PIL import Image

from ijepa_fast.data import resize as arrays
from ijepa_fast.kernels.common import dispatch, native
from ijepa_fast.kernels.resize import cpu, reference, resize_

PILLOW = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
SIZES = ((307, 325), (7, 5), (50, 600), (33, 16), (1, 1))


def smooth(rows, columns):
    """A random image without hard edges, uint8 (rows, columns, 3)."""
    small = torch.rand(1, 3, max(2, rows // 8), max(2, columns // 8))
    large = F.interpolate(small, (rows, columns), mode="bicubic").clamp(0, 1)[0] * 255
    return large.byte().permute(1, 2, 0).contiguous()


def by_pillow(image, out, interpolation):
    """One axis after the other: in one call, Pillow 13 takes the cheaper one first."""
    (rows, columns, _), resampling = out.shape, PILLOW[interpolation]
    wide = Image.fromarray(image.numpy()).resize((columns, image.shape[0]), resampling)
    return torch.from_numpy(np.asarray(wide.resize((columns, rows), resampling)).copy())


@pytest.fixture(params=["as built", "without csrc"])
def resize(request, monkeypatch):
    """The op, and what it does where csrc is not built."""
    if request.param == "without csrc":
        return lambda out, images, interpolation: cpu.resize_cpu_(images, interpolation == "bicubic", out)
    return resize_


@pytest.mark.parametrize("interpolation", PILLOW)
@pytest.mark.parametrize(("rows", "columns"), [(17, 17), (32, 48), (224, 224), (1, 5)])
def test_the_reference_is_pillow_bit_for_bit(interpolation, rows, columns):
    images = [*(smooth(*size) for size in SIZES), torch.randint(256, (61, 300, 3), dtype=torch.uint8)]
    out = torch.empty(len(images), rows, columns, 3, dtype=torch.uint8)
    reference.resize_(out, images, interpolation)
    for image, found in zip(images, out, strict=True):
        assert torch.equal(found, by_pillow(image, found, interpolation))


@pytest.mark.parametrize("interpolation", PILLOW)
@pytest.mark.parametrize("crop", [17, 32, 80, 224])
def test_as_the_reference(resize, interpolation, crop):
    images = [smooth(*size) for size in (*SIZES, (crop, crop))]
    out, wanted = (torch.empty(len(images), crop, crop, 3, dtype=torch.uint8) for _ in range(2))
    resize(out, images, interpolation)
    reference.resize_(wanted, images, interpolation)
    off = (wanted.int() - out.int()).abs().flatten(1)
    assert off.float().mean(1).max() < 0.5
    assert off.max() <= (3 if interpolation == "bilinear" else 24)


def noise(dtype, rows, columns, channels):
    """A random image (rows, columns, channels) over the whole range of `dtype`."""
    if dtype == torch.float32:
        return torch.randn(rows, columns, channels) * 1e3
    return torch.randint(torch.iinfo(dtype).max + 1, (rows, columns, channels)).to(dtype)


@pytest.mark.parametrize("interpolation", PILLOW)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.float32], ids=str)
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 8, 13])
def test_any_depth_and_channels_are_as_the_reference(resize, interpolation, dtype, channels):
    if (dtype, channels) == (torch.uint8, 3):
        pytest.skip("RGB of 8 bits has tests of its own")
    images = [noise(dtype, *size, channels) for size in (*SIZES, (24, 40))]
    out, wanted = (torch.empty(len(images), 24, 40, channels, dtype=dtype) for _ in range(2))
    resize(out, images, interpolation)
    reference.resize_(wanted, images, interpolation)
    off = (wanted.double() - out.double()).abs().max()
    assert off <= (1e-6 * wanted.abs().max() if dtype == torch.float32 else 1)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.float32], ids=str)
def test_an_even_image_of_any_depth_stays(resize, dtype):
    value = 40001 if dtype == torch.uint16 else 201
    out = torch.zeros(1, 48, 31, 13, dtype=dtype)
    resize(out, [torch.full((91, 30, 13), value, dtype=dtype)], "bicubic")
    assert ((out.double() - value).abs() <= (1e-4 if dtype == torch.float32 else 0)).all()


@pytest.mark.parametrize("interpolation", PILLOW)
@pytest.mark.parametrize("value", [0, 1, 127, 254, 255])
def test_a_plain_colour_stays(resize, interpolation, value):
    out = torch.zeros(1, 48, 48, 3, dtype=torch.uint8)
    resize(out, [torch.full((91, 30, 3), value, dtype=torch.uint8)], interpolation)
    assert (out == value).all()


@pytest.mark.skipif(not native.available(), reason="the extension ijepa_fast._C is not built")
def test_csrc_is_what_runs_where_it_is_built(monkeypatch):
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("csrc has no resize for this processor")
    image, out = smooth(300, 400), torch.empty(1, 64, 64, 3, dtype=torch.uint8)
    monkeypatch.setattr(F, "interpolate", None)
    resize_(out, [image], "bilinear")
    assert (out[0].int() - by_pillow(image, out[0], "bilinear").int()).abs().max() <= 3


def test_the_reference_is_what_runs_where_it_is_asked_for():
    images, out = [smooth(40, 60)], torch.empty(1, 24, 24, 3, dtype=torch.uint8)
    before = dispatch.choice("resize")
    dispatch.use({"resize": "reference"})
    try:
        resize_(out, images, "bicubic")
    finally:
        dispatch.use({"resize": before})
    assert torch.equal(out[0], by_pillow(images[0], out[0], "bicubic"))


def test_arrays_are_resized_as_tensors_are():
    image, out = smooth(40, 60), torch.empty(1, 24, 24, 3, dtype=torch.uint8)
    resize_(out, [image], "bicubic")
    array = np.empty((1, 24, 24, 3), np.uint8)
    arrays.resize_(array, [image.numpy()], "bicubic")
    assert np.array_equal(array, out.numpy())


def test_opcheck():
    out = torch.empty(1, 8, 8, 3, dtype=torch.uint8)
    torch.library.opcheck(torch.ops.ijepa_fast.resize_cpu_.default, ([smooth(20, 30)], True, out))


@pytest.mark.parametrize(
    ("shape", "image", "interpolation", "message"),
    [
        ((2, 8, 8, 3), torch.zeros(9, 9, 3).byte(), "bilinear", r"out: expected shape \(1, any, any, any\)"),
        ((1, 8, 8, 3), torch.zeros(9, 9, 4).byte(), "bilinear", r"images\[0\]: expected shape \(any, any, 3\)"),
        ((1, 8, 8, 3), torch.zeros(9, 9, 3), "bilinear", r"images\[0\]: expected dtype torch.uint8"),
        ((1, 8, 8, 3), torch.zeros(9, 3, 9).byte().mT, "bilinear", r"images\[0\]: expected a contiguous"),
        ((1, 8, 8, 0), torch.zeros(9, 9, 0).byte(), "bilinear", "expected sizes from 1"),
        ((1, 8, 8, 3), torch.zeros(0, 9, 3).byte(), "bilinear", "expected sizes from 1"),
        ((1, 8, 8, 3), torch.zeros(9, 9, 3).byte(), "lanczos", "interpolation: expected one of bilinear, bicubic"),
    ],
    ids=["images", "channels", "dtype", "layout", "no channels", "empty", "interpolation"],
)
def test_bad_input_is_named(shape, image, interpolation, message):
    with pytest.raises(ValueError, match=message):
        resize_(torch.empty(shape, dtype=torch.uint8), [image], interpolation)
