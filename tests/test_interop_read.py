"""Files as an encoder reads them: by the decoder of training, whatever the file."""

import json
import time

import numpy as np
import pytest
import torch

pytest.importorskip("nvidia.dali")
pytest.importorskip("PIL")
pytest.importorskip("safetensors")

from PIL import Image

import ijepa_fast
from ijepa_fast.data.central import eval_batches
from ijepa_fast.data.sources import open_source
from ijepa_fast.interop.huggingface import save_hf
from ijepa_fast.interop.weights import save_weights
from ijepa_fast.models.vit import Encoder
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


def test_the_exported_processor_crops_files_as_training_does(encoder, tmp_path):
    """Photographs that are wide, high, grey: the features that transformers gives are ours."""
    transformers = pytest.importorskip("transformers")
    weights = golden_weights(tmp_path / "published.pth.tar")
    save_hf(tmp_path / "hf", weights.networks["target_encoder"], weights.arch)
    model = transformers.AutoModel.from_pretrained(tmp_path / "hf").eval()
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "hf")
    wide = photographs()[1]
    kinds = {
        "wide.png": wide.crop((0, 100, 640, 300)),
        "high.png": wide.rotate(90, expand=True),
        "grey.png": wide.convert("L"),
        "odd.png": wide.resize((91, 67)),
    }
    for name, picture in kinds.items():
        picture.save(tmp_path / name)
        mine = encoder.read([tmp_path / name])
        pixels = processor(images=Image.open(tmp_path / name), return_tensors="pt").pixel_values
        seen = 255 * (pixels * torch.tensor(encoder.std)[:, None, None] + torch.tensor(encoder.mean)[:, None, None])
        squashed = torch.from_numpy(np.asarray(picture.convert("RGB").resize((64, 64), Image.Resampling.BILINEAR)))
        difference, other = ((a - mine[0].float()).abs().mean() for a in (seen[0].permute(1, 2, 0), squashed))
        assert difference < other / 4, name  # what is left is a shift by half a pixel
        with torch.no_grad():
            theirs = model(pixels).last_hidden_state.mean(1)
        assert torch.cosine_similarity(theirs, encoder(mine).mean(1)).item() > 0.999, name


def test_a_file_that_cannot_be_used_is_named(encoder, tmp_path):
    for name in ("half.jpg", "broken_inside.png"):
        (tmp_path / name).write_bytes(bad_kinds()[name])
        with pytest.raises(ValueError, match=rf"{name}: .{{5}}"):
            encoder.read([tmp_path / name])
    assert encoder.read([]).shape == (0, 64, 64, 3)


PAGE = b"<!DOCTYPE html><html><title>Sign in</title></html>"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"


@pytest.mark.parametrize("name", ["a.safetensors", "a.pth.tar", "folder/model.safetensors"])
@pytest.mark.parametrize(
    ("data", "words"),
    [
        (PAGE, "an HTML page"),
        (POINTER, "a Git LFS pointer, not the file itself"),
        (b"\x1f\x8b\x08" + bytes(99), "a gzip-compressed file"),
        (b"\xff\xd8\xff\xe0" + bytes(99), "a JPEG image"),
        (b"", "an empty file"),
    ],
    ids=["page", "pointer", "gzip", "jpeg", "empty"],
)
def test_weights_of_another_kind_are_named_for_what_they_are(tmp_path, name, data, words):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    (tmp_path / "folder").mkdir(exist_ok=True)
    (tmp_path / "folder/config.json").write_text('{"model_type": "ijepa"}')
    with pytest.raises(ValueError, match=words) as error:
        ijepa_fast.load(path.parent if "/" in name else path)
    assert name in str(error.value)


def test_a_header_of_very_many_entries_is_refused_at_once(tmp_path):
    entries = (f'"{number:06}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}' for number in range(900_000))
    header = ("{" + ",".join(entries) + "}").encode()
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    begin = time.monotonic()
    with pytest.raises(ValueError, match=rf"a.safetensors: its header has {len(header)} bytes, over the bound of"):
        ijepa_fast.load(tmp_path / "a.safetensors")
    assert time.monotonic() - begin < 1


@pytest.mark.parametrize("part", ["../secret.safetensors", "/etc/passwd", "..", 3])
def test_an_index_that_names_files_outside_its_folder_is_refused(tmp_path, part):
    (tmp_path / "config.json").write_text('{"model_type": "ijepa"}')
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": part}}))
    with pytest.raises(ValueError, match=r"index.json: expected a weight_map to names of files beside it, got"):
        ijepa_fast.load(tmp_path)


WRAPPED = {
    "state_dict": lambda state: {"state_dict": state, "epoch": 3},
    "model, module.": lambda state: {"model": {f"module.{key}": value for key, value in state.items()}},
    "bare encoder": lambda state: state,
    "compiled": lambda state: {"encoder": {f"_orig_mod.{key}": value for key, value in state.items()}},
    "compiled and parallel": lambda state: {f"module._orig_mod.{key}": value for key, value in state.items()},
    "one dict": lambda state: {f"{net}.{key}": v for net in ("encoder", "target_encoder") for key, v in state.items()},
    "numpy scalars": lambda state: {"encoder": state, "loss": np.float64(0.5), "epoch": np.int64(3)},
}


@pytest.mark.parametrize("name", WRAPPED)
def test_checkpoints_in_wrappers_are_read(tmp_path, name):
    encoder = Encoder(32, 8, 32, 2, 2)
    state = encoder.state_dict() | {"pos_embed": encoder.positions[None]}
    torch.save(WRAPPED[name](state), tmp_path / "a.pth")
    found = ijepa_fast.load(tmp_path / "a.pth", heads=2)
    images = torch.randint(256, (2, 32, 32, 3), dtype=torch.uint8)
    expected = encoder(found._patchify(images), 2).view(2, 16, 32)
    torch.testing.assert_close(found(images), expected)
