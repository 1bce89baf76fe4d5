"""Sets that lie decoded on the device and are cropped there; the CPU stands in for a GPU."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("PIL")
pytest.importorskip("nvidia.dali")

from ijepa_fast.config import ConfigError, load_config
from ijepa_fast.data.dali import TrainLoader
from ijepa_fast.data.reading import Reading
from ijepa_fast.data.resident import Room, crops, weights
from ijepa_fast.data.sources import open_source
from tests import image_sets
from tests.data_images import bad_kinds, write_photos


def drawn(seed: int, sizes: list[tuple[int, int]], least: int = 1):
    """Windows within images of these sizes: x and y, width and height."""
    rng, start, shape = np.random.default_rng(seed), [], []
    for height, width in sizes:
        h, w = rng.integers(least, height + 1), rng.integers(least, width + 1)
        start.append([rng.integers(width - w + 1), rng.integers(height - h + 1)])
        shape.append([w, h])
    return np.array(start, np.int32), np.array(shape, np.int32)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("depth", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("sizes", [[(40, 56)] * 6, [(40, 56), (7, 90), (33, 9), (1, 1)]], ids=["alike", "ragged"])
def test_a_crop_is_an_antialiased_resize_of_its_window(interpolation, depth, sizes):
    """Larger and smaller than the crop; as PyTorch does it one by one, to rounding."""
    start, shape = drawn(0, sizes)
    flip = np.arange(len(sizes), dtype=np.int32) % 2
    top = {"uint8": 255, "uint16": 65535, "float32": 1}[depth]
    rng = np.random.default_rng(1)
    images = [torch.from_numpy((rng.random((*size, 5)) * top).astype(depth)) for size in sizes]
    out = crops(images, start, shape, (16, 24), interpolation, flip)
    assert out.dtype == getattr(torch, depth)
    assert out.is_contiguous()
    for image, (x, y), (w, h), mirrored, found in zip(images, start, shape, flip, out):
        window = image.numpy()[y : y + h, x : x + w].astype(np.float64)
        one = torch.from_numpy(window).permute(2, 0, 1)[None]
        wanted = F.interpolate(one, (16, 24), mode=interpolation, antialias=True, align_corners=False)[0]
        wanted = wanted.permute(1, 2, 0).flip(1) if mirrored else wanted.permute(1, 2, 0)
        wanted = wanted if depth == "float32" else wanted.clamp(0, top)
        error = np.abs(found.numpy().astype(np.float64) - wanted.numpy()).max()
        assert error < {"uint8": 0.51, "uint16": 0.6, "float32": 1e-5}[depth]


def test_weights_of_a_window_sum_to_one_and_stay_inside():
    found = weights(np.array([3, 0]), np.array([5, 20]), 20, 8, "bicubic", torch.device("cpu"))
    torch.testing.assert_close(found.sum(2), torch.ones(2, 8))
    assert found[0, :, :3].abs().sum() == found[0, :, 8:].abs().sum() == 0


def batches(source, steps=3, **options):
    loader = TrainLoader(source, batch_size=4, crop=72, flip=True, **options)
    try:
        return [next(loader) for _ in range(steps)]
    finally:
        loader.close()


@pytest.mark.parametrize("kind", ["photographs", "sixteen bits"])
def test_a_run_sees_the_crops_of_one_that_reads_files(tmp_path, kind):
    """The same samples, windows and mirroring; pixels as the other resize rounds them. Resumed, the same bits."""
    if kind == "photographs":
        write_photos(tmp_path, 12)
        source = open_source(tmp_path)
    else:
        source = open_source(image_sets.write_png(tmp_path), reading=Reading(channels=1))
    kept, read = batches(source, memory="device"), batches(source)
    for a, b in zip(kept, read):
        assert torch.equal(a.indices, b.indices)
        assert a.images.dtype == b.images.dtype
        assert (a.images.int() - b.images.int()).abs().max() <= 1
    (resumed,) = batches(source, 1, memory="device", start_step=2)
    assert torch.equal(resumed.images, kept[2].images)


def test_what_cannot_be_decoded_is_replaced(tmp_path):
    write_photos(tmp_path, 40, size=40)
    for name in ("empty.jpg", "broken_inside.png"):
        (tmp_path / "class0" / name).write_bytes(bad_kinds()[name])
    source = open_source(tmp_path)
    kept, read = (batches(source, 12, max_bad_share=0.1, memory=memory) for memory in ("device", True))
    assert [batch.indices.tolist() for batch in kept] == [batch.indices.tolist() for batch in read]


def test_a_set_that_does_not_fit_is_one_sentence(tmp_path, monkeypatch):
    write_photos(tmp_path, 12)
    source = open_source(tmp_path)
    monkeypatch.setattr("ijepa_fast.data.resident.free_bytes", lambda device: 30_000)
    for memory in ("device", True):
        with pytest.raises(ValueError, match=r"data\.memory: 12 decoded images take"):
            batches(source, memory=memory)


def test_room_is_judged_by_the_first_images():
    room = Room("cpu", 1000, free=100_000)
    for _ in range(31):
        room.take(100)
    with pytest.raises(ValueError, match=r"1000 decoded images take some 0\.1 MB, and 0\.1 MB .* data\.memory=false"):
        room.take(100)
    room = Room("cpu", 1000, free=300_000)
    for _ in range(1000):
        room.take(100)


def test_other_values_are_refused():
    for value in ("gpu", "3", "[device]"):
        with pytest.raises(ConfigError, match=r"data\.memory: expected true, false or device"):
            load_config("quickstart", [f"data.memory={value}"])
    for value in ("true", "false", "device"):
        load_config("quickstart", [f"data.memory={value}"])
