"""Corruptions against other implementations, and the calibration error against a plain one."""

import io
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("nvidia.dali")

from PIL import Image

from ijepa_fast.eval.corruption import LEVELS, calibration_terms, corrupt, kinds_for
from ijepa_fast.eval.evaluate import Options, evaluate
from tests.test_eval_evaluate import SIDE, colours, write


@pytest.fixture(scope="module")
def images():
    """Smooth random images, uint8 (3, 32, 40, 3)."""
    y, x = np.mgrid[:32, :40] / 10
    waves = np.stack([np.sin(y * a + x * b) for a, b in ((1, 2), (2, 1), (0.5, 0.2))])
    pixels = np.stack([waves * s + 128 for s in (60, 90, 120)]).transpose(0, 2, 3, 1)
    return torch.from_numpy(pixels.astype(np.uint8))


@pytest.mark.parametrize("kind", LEVELS)
def test_images_get_worse_level_by_level(images, kind):
    errors = []
    for level in range(1, 6):
        worse = corrupt(images, kind, level, range(3))
        assert (worse.shape, worse.dtype) == (images.shape, images.dtype)
        errors.append(float((worse.float() - images.float()).square().mean()))
    assert errors == sorted(errors)
    assert errors[4] > 0  # the weakest blur of so small an image changes no byte


def test_blur_is_scipys(images):
    from scipy.ndimage import gaussian_filter

    sigma = 6.0 * 32 / 224
    expected = gaussian_filter(
        images.double().numpy(), (0, sigma, sigma, 0), mode="nearest", truncate=np.ceil(4 * sigma) / sigma
    )
    found = corrupt(images, "blur", 5, range(3))
    assert np.abs(found.numpy() - expected).max() <= 0.51


def test_jpeg_is_pillows(images):
    file = io.BytesIO()
    Image.fromarray(images[1].numpy()).save(file, "JPEG", quality=10)
    assert np.array_equal(corrupt(images, "jpeg", 4, range(3))[1].numpy(), np.array(Image.open(file)))


def test_noise_is_as_strong_as_it_says_and_follows_the_image_number(images):
    grey = torch.full((2, 200, 200, 1), 128, dtype=torch.uint8)
    noisy = corrupt(grey, "noise", 1, [5, 9]).double()
    assert noisy.std() / 255 == pytest.approx(0.08, rel=0.02)
    assert torch.equal(corrupt(grey[:1], "noise", 1, [9])[0].double(), noisy[1])
    assert not torch.equal(noisy[0], noisy[1])


@pytest.mark.parametrize("dtype", [torch.uint16, torch.float32])
def test_other_depths_keep_theirs(dtype):
    images = (torch.rand(2, 16, 16, 5) * 1000).to(dtype)
    for kind in ("noise", "blur"):
        worse = corrupt(images, kind, 3, range(2))
        assert (worse.dtype, worse.shape) == (dtype, images.shape)
    assert kinds_for("uint16", 5) == kinds_for("uint8", 5) == ["noise", "blur"]
    assert kinds_for("uint8", 1) == list(LEVELS)


def test_calibration_error_is_that_of_a_plain_loop():
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.normal(size=(500, 4)) * 2)
    truth = rng.integers(0, 4, 500)
    confidence, answer = logits.softmax(1).max(1)
    confidence, right = confidence.numpy(), answer.numpy() == truth
    expected = 0.0
    for low in np.arange(15) / 15:
        inside = (confidence > low) & (confidence <= low + 1 / 15)
        if inside.any():
            expected += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    assert calibration_terms(logits, torch.from_numpy(right)).mean() == pytest.approx(expected)


def test_who_is_as_sure_as_right_is_calibrated():
    torch.manual_seed(0)
    logits = torch.randn(20_000, 3) * 2
    truth = torch.distributions.Categorical(logits=logits).sample()
    assert calibration_terms(logits, logits.argmax(1) == truth).mean() < 0.02
    assert calibration_terms(logits * 5, logits.argmax(1) == truth).mean() > 0.1


def test_curves_of_every_label(tmp_path):
    """Colours stand blur and die of noise; a regression has no calibration error."""
    data = write(tmp_path / "train", 20, 0), write(tmp_path / "test", 10, 1)
    found = {f.key: f for f in evaluate(colours, *data, Options(crop=SIDE, probes=("linear", "corruption")))}
    names = ["clean", *(f"{kind}{level}" for kind in LEVELS for level in ("", " 1", " 2", " 3", " 4", " 5"))]
    for task, metrics in {"kind": ("accuracy", "calibration_error"), "metres": ("r2", "mean_absolute_error")}.items():
        assert {(p, m) for t, p, m in found if t == task and p != "linear"} == {
            (f"linear, {name}", metric) for name in names for metric in metrics
        }
    assert found["kind", "linear, clean", "accuracy"].value == found["kind", "linear", "accuracy"].value
    levels = [found["metres", f"linear, noise {level}", "r2"].value for level in range(1, 6)]
    assert levels[0] > levels[4]
    mean = found["metres", "linear, noise", "r2"]
    assert mean.value == pytest.approx(np.mean(levels))
    assert mean.error > 0
    assert found["metres", "linear, blur 5", "r2"].value > levels[4]


def test_sixteen_bits_have_no_jpeg(tmp_path):
    train = write(tmp_path / "train", 4, 0)
    deep = replace(train.source.reading, depth="uint16")
    assert "jpeg" not in kinds_for(deep.depth, deep.channels)
