"""Real photographs, where they are at hand: a thousand of ImageNet's in two tar shards beside the checkout."""

import io

import numpy as np
import pytest
import torch

pytest.importorskip("PIL")
pytest.importorskip("nvidia.dali")

from PIL import Image

from ijepa_fast.data.check import find_bad_files
from ijepa_fast.data.crops import TRIES, counter_uniform, random_resized_crop
from ijepa_fast.data.dali import TrainLoader
from ijepa_fast.data.decode import Decoder, Work, decode_all
from ijepa_fast.data.headers import screen
from ijepa_fast.data.sources import TarSource, open_source
from tests.launch import ROOT

FOLDER = ROOT.parent / "shared" / "data"
if not list(FOLDER.glob("imagenet-1000-samples.part*.tar")):
    pytest.skip(f"no imagenet-1000-samples.part*.tar in ../shared/{FOLDER.name}", allow_module_level=True)


@pytest.fixture(scope="module")
def photographs():
    return open_source(FOLDER / "imagenet-1000-samples.part*.tar")


def test_a_photograph_of_each_of_a_thousand_classes(photographs):
    assert isinstance(photographs, TarSource)
    assert len(photographs) == len(photographs.classes) == 1000
    assert photographs.labels.tolist() == list(range(1000))
    assert np.bincount(photographs.groups).tolist() == [500, 500]


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda:0", marks=pytest.mark.gpu)])
def test_crops_agree_with_pillow(photographs, interpolation, device):
    files = [photographs.read(i) for i in range(1000)]
    grey = [data for data in files if Image.open(io.BytesIO(data)).mode == "L"]
    assert len(grey) > 10
    files = grey + files[::16]
    sizes = np.array([screen(data) for data in files])
    windows = random_resized_crop(
        sizes, counter_uniform(1, np.arange(len(files)), 2 * TRIES + 2), (0.3, 1.0), (3 / 4, 4 / 3)
    )
    decoder = Decoder(crop=224, interpolation=interpolation, flip=False, device=device, threads=2)
    ids = np.arange(len(files))
    work = Work(ids, ids, [np.frombuffer(data, np.uint8) for data in files], windows)
    ((_, images),) = decode_all(decoder, [work], lambda work, reasons: pytest.fail(f"bad: {reasons}"), len(files))
    decoder.close()
    resample = {"bilinear": Image.BILINEAR, "bicubic": Image.BICUBIC}[interpolation]
    for data, window, image in zip(files, windows, images.cpu().numpy()):
        x, y, w, h = window.tolist()
        pillow = Image.open(io.BytesIO(data)).convert("RGB").crop((x, y, x + w, y + h)).resize((224, 224), resample)
        assert np.abs(image - np.asarray(pillow).astype(int)).mean() < 2


def test_two_ranks_cover_two_epochs_of_shards(photographs):
    seen = [[], []]
    for rank in range(2):
        loader = TrainLoader(photographs, batch_size=100, crop=32, rank=rank, world_size=2)
        for _ in range(10):
            batch = next(loader)
            seen[batch.epoch].append(batch.indices)
        loader.close()
        assert loader.replaced == 0
    for epoch in seen:
        assert sorted(torch.cat(epoch).tolist()) == list(range(1000))


def test_none_of_them_is_broken(photographs):
    assert list(find_bad_files(photographs, threads=2)) == [None] * 1000
