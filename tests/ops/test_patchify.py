"""patchify: kernel against reference and against the convolution it feeds, registration, compilation, bad input."""

import pytest
import torch
import torch.nn.functional as F

from ijepa_fast.kernels.patchify import patchify, reference
from tests import oracle

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def make(batch, rows, columns, patch, device="cpu"):
    return torch.randint(0, 256, (batch, rows * patch, columns * patch, 3), dtype=torch.uint8).to(device)


def check(images, patch, width, dtype, mean=MEAN, std=STD):
    arguments, channels = (images, patch, mean, std), images.shape[3]
    width = width or (channels * patch * patch + 7) // 8 * 8
    actual = patchify(*arguments, dtype=dtype, width=width)
    oracle.assert_within_budget(
        actual, reference.patchify(*arguments, dtype, width), reference.patchify(*arguments, torch.float64, width)
    )
    assert not actual[:, channels * patch * patch :].any()


@pytest.mark.gpu
@pytest.mark.parametrize("patch", [14, 16])
def test_large_on_gpu(triton_everywhere, patch):
    check(make(128, 224 // patch, 224 // patch, patch, triton_everywhere), patch, None, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("batch", "rows", "columns", "patch", "width"),
    [
        (1, 1, 1, 14, None),
        (2, 3, 2, 16, None),
        (3, 2, 5, 14, 608),
        (2, 3, 3, 5, 75),
        (5, 4, 4, 4, None),
        (0, 2, 2, 4, 48),
    ],
)
def test_matches_reference(triton_everywhere, poisoned, batch, rows, columns, patch, width, dtype):
    check(make(batch, rows, columns, patch, triton_everywhere), patch, width, dtype)


PIXELS = {
    torch.uint8: lambda shape: torch.randint(256, shape, dtype=torch.uint8),
    torch.uint16: lambda shape: torch.randint(1 << 16, shape, dtype=torch.int32).to(torch.uint16),
    torch.float32: lambda shape: 40 * torch.randn(shape) - 3,
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pixels", PIXELS, ids=str)
@pytest.mark.parametrize(("channels", "patch", "width"), [(1, 8, None), (2, 5, 56), (3, 4, None), (13, 4, 240)])
def test_any_channels_and_depths(triton_everywhere, poisoned, channels, patch, width, pixels, dtype):
    images = PIXELS[pixels]((3, 2 * patch, 3 * patch, channels)).to(triton_everywhere)
    unit = 40.0 if pixels == torch.float32 else 1.0
    mean, std = torch.rand(channels).mul(unit).tolist(), (torch.rand(channels) + 0.1).mul(unit).tolist()
    check(images, patch, width, dtype, mean, std)


@pytest.mark.parametrize("patch", [14, 16])
def test_is_the_input_of_the_convolution(triton_everywhere, patch):
    images = make(2, 2, 3, patch, triton_everywhere)
    weight = torch.randn(8, 3, patch, patch, device=images.device)
    mean, std = (torch.tensor(values, device=images.device) for values in (MEAN, STD))
    pixels = ((images.double() / 255 - mean) / std).permute(0, 3, 1, 2)
    expected = F.conv2d(pixels, weight.double(), stride=patch).flatten(2).mT.flatten(0, 1)
    patches = patchify(images, patch, MEAN, STD)
    assert patches.shape[1] == {14: 592, 16: 768}[patch]
    actual = patches[:, : 3 * patch * patch].double() @ weight.double().flatten(1).mT
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-4)


def test_every_byte_is_exact(triton_everywhere):
    """All 256 values in fp32, against exact arithmetic."""
    images = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(1, 16, 16, 3).contiguous()
    check(images.to(triton_everywhere), 4, None, torch.float32)


def test_opcheck(triton_everywhere):
    images = make(2, 2, 3, 4, triton_everywhere)
    oracle.opcheck(torch.ops.ijepa_fast.patchify, images, 4, list(MEAN), list(STD), torch.float32, 56)
    many = PIXELS[torch.float32]((2, 8, 12, 5)).to(triton_everywhere)
    oracle.opcheck(torch.ops.ijepa_fast.patchify, many, 4, [0.0] * 5, [1.0] * 5, torch.float32, 80)


def test_compiles_once(triton_everywhere):
    calls = [(make(batch, 2, 3, 4, triton_everywhere),) for batch in (2, 3, 5)]
    assert oracle.count_compiles(lambda images: patchify(images, 4, MEAN, STD), calls) == 1


@pytest.mark.parametrize(
    ("argument", "change", "message"),
    [
        ("images", lambda x: x.double(), "images: expected dtype torch.uint8 or torch.uint16 or torch.float32"),
        ("images", lambda x: x[0], "images: expected shape"),
        ("images", lambda x: x.permute(0, 3, 1, 2).contiguous(), "multiples of patch=14, got 3 x 28"),
        (
            "images",
            lambda x: x[..., :2].contiguous(),
            "expected 2 values each, one per channel, got 3 and 3",
        ),
        ("images", lambda x: x.mT.contiguous().mT, "images: expected a contiguous"),
        ("patch", lambda x: 16, "multiples of patch=16, got 28 x 28"),
        ("patch", lambda x: 0, "multiples of patch=0"),
        ("mean", lambda x: (0.5,), "mean, std: expected 3 values each, one per channel, got 1 and 3"),
        ("dtype", lambda x: torch.int8, "dtype: expected a floating-point dtype"),
        ("dtype", lambda x: torch.float64, "dtype: the Triton kernel computes in fp32"),
        ("width", lambda x: 587, "width: expected at least"),
    ],
)
def test_bad_input_is_named(triton_everywhere, argument, change, message):
    images = make(1, 2, 2, 14, triton_everywhere)
    good = dict(images=images, patch=14, mean=MEAN, std=STD, dtype=torch.float32, width=None)
    good[argument] = change(good[argument])
    with pytest.raises(ValueError, match=message):
        patchify(**good)
