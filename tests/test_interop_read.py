"""Files as an encoder reads them: by the decoder of training, whatever the file."""

import numpy as np
import pytest
import torch

pytest.importorskip("nvidia.dali")
pytest.importorskip("PIL")
pytest.importorskip("safetensors")

from PIL import Image

import ijepa_fast
from ijepa_fast.data.dali import eval_batches
from ijepa_fast.data.sources import open_source
from ijepa_fast.interop.weights import save_weights
from tests.data_images import bad_kinds, good_kinds, photographs, rotated
from tests.interop_files import golden_weights


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    save_weights(folder / "w.safetensors", golden_weights(folder / "published.pth.tar"))
    return ijepa_fast.load(folder / "w.safetensors")


def test_files_are_read_as_training_decodes_them(encoder, tmp_path):
    kinds = good_kinds() | {f"exif{turn}.png": rotated(photographs()[0], turn, "PNG") for turn in (3, 6)}
    for name, data in kinds.items():
        (tmp_path / name).write_bytes(data)
    source = open_source(tmp_path)
    found = encoder.read(source.name(i) for i in range(len(source)))
    options = {"crop": 64, "resize": 64, "interpolation": encoder.arch.interpolation}
    expected = torch.cat([images for images, _ in eval_batches(source, batch_size=4, **options)])
    assert torch.equal(found, expected)


def test_grey_of_16_bits_keeps_its_greys(encoder, tmp_path):
    ramp = np.linspace(0, 65535, 96 * 80).reshape(80, 96).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / "grey16.png")
    (grey,) = encoder.read([tmp_path / "grey16.png"]).float()
    expected = np.linspace(0, 255, 65)  # the edges of the rows
    assert np.abs(grey.mean((1, 2)).numpy() - (expected[1:] + expected[:-1]) / 2).max() < 2


def test_a_file_that_cannot_be_used_is_named(encoder, tmp_path):
    for name in ("half.jpg", "broken_inside.png"):
        (tmp_path / name).write_bytes(bad_kinds()[name])
        with pytest.raises(ValueError, match=rf"{name}: .{{5}}"):
            encoder.read([tmp_path / name])
    assert encoder.read([]).shape == (0, 64, 64, 3)
