"""The Python interface and the command `embed`."""

import numpy as np
import pytest
import torch

pytest.importorskip("deepspeed")
pytest.importorskip("nvidia.dali")
pytest.importorskip("sklearn")

import ijepa_fast
from ijepa_fast import api
from ijepa_fast.__main__ import main
from tests import my_data
from tests.data_images import write_photos
from tests.launch import TINY, losses, run

SMALL = {key: value for key, value in (item.split("=") for item in TINY) if key != "data.source"}


def nested(flat):
    """{"optim.epochs": "1"} -> {"optim": {"epochs": 1}}."""
    out = {}
    for key, value in flat.items():
        section, _, name = key.rpartition(".")
        parsed = {"true": True, "false": False}.get(value, value)
        parsed = float(value) if str(value).replace(".", "").isdigit() and "." in value else parsed
        parsed = int(value) if str(value).isdigit() else parsed
        (out.setdefault(section, {}) if section else out)[name] = parsed
    return out


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    write_photos(folder, 16, size=48)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory, photos):
    options = nested(SMALL | {"optim.epochs": "3", "optim.steps": "3"})
    options["data"] |= {"source": photos}
    return ijepa_fast.train(runs=tmp_path_factory.mktemp("runs"), name="api", **options)


def test_train_is_the_command(trained, photos, tmp_path):
    options = (f"data.source={photos}", "optim.epochs=3", "optim.steps=3")
    assert [record["loss"] for record in trained.log] == pytest.approx(losses(run(tmp_path, *options)), rel=1e-5)
    assert trained.summary["steps"] == 3


def test_a_second_run_trains_on_an_array_of_this_program(trained, tmp_path):
    """Of 16 bits and two channels; and it is the same when it is trained again."""
    images = np.random.default_rng(0).integers(0, 9000, (12, 2, 40, 40)).astype(np.uint16)
    options = nested(SMALL | {"optim.steps": "2", "data.channels": "2"})
    options["data"] |= {"source": images, "mean": [0.05, 0.05], "std": [0.02, 0.03]}
    first, again = (ijepa_fast.train(runs=tmp_path, name=name, **options) for name in ("a", "b"))
    assert [r["loss"] for r in first.log] == [r["loss"] for r in again.log]
    vectors = ijepa_fast.embed(images, first.encoder(), batch_size=5)
    assert vectors.shape == (12, 32)
    by_batch = first.encoder()(torch.from_numpy(images[:3, :, 4:36, 4:36] / 65535.0).float())
    assert by_batch.shape == (3, 64, 32)


def test_a_mistake_is_a_sentence(photos):
    with pytest.raises(ValueError, match=r"optim\.epoch: there is no such key; did you mean optim\.epochs"):
        ijepa_fast.train(photos, name="x", optim={"epoch": 1})


def test_embed_takes_folders_lists_arrays_and_data_sets(trained, photos):
    encoder = trained.encoder()
    paths = sorted(photos.rglob("*.jpg"))
    by_folder, by_list = ijepa_fast.embed(photos, encoder), ijepa_fast.embed(paths, trained.folder, batch_size=3)
    assert by_folder.shape == (16, 32)
    np.testing.assert_allclose(by_list, by_folder, rtol=1e-4, atol=1e-5)
    images = encoder.read(paths)
    np.testing.assert_allclose(ijepa_fast.embed(images, encoder), by_folder, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        ijepa_fast.embed(images.permute(0, 3, 1, 2).numpy(), encoder), by_folder, rtol=1e-4, atol=1e-5
    )
    dense = ijepa_fast.embed(my_data.pictures(), encoder, pool="none")
    assert dense.shape == (my_data.COUNT, 64, 32)


def test_transform_gives_what_forward_takes(trained, photos):
    from PIL import Image

    encoder, paths = trained.encoder(), sorted(photos.rglob("*.jpg"))[:4]
    batch = torch.stack([encoder.transform(Image.open(path)) for path in paths])
    assert batch.dtype == torch.float32
    assert 0 <= batch.min() < batch.max() <= 1
    torch.testing.assert_close(encoder(batch), encoder(encoder.read(paths)), rtol=0.05, atol=0.05)


def test_embed_names_what_cannot_be_decoded(trained, tmp_path):
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"bad\.jpg cannot be decoded \(1 of 1\)"):
        ijepa_fast.embed([tmp_path / "bad.jpg"], trained.folder)
    with pytest.raises(ValueError, match="pool: expected one of mean, none"):
        ijepa_fast.embed([tmp_path / "bad.jpg"], trained.folder, pool="max")


def test_the_command_writes_vectors_and_names(trained, photos, tmp_path, capsys):
    out = tmp_path / "x.npy"
    (photos / "class0" / "zz.jpg").write_bytes(b"no image")
    try:
        assert main(["embed", str(photos), "--checkpoint", str(trained.folder), "--out", str(out)]) == 0
    finally:
        (photos / "class0" / "zz.jpg").unlink()
    assert capsys.readouterr().out == f"{out}: 16 x 32; 1 could not be decoded\n"
    names = out.with_suffix(".txt").read_text().splitlines()
    assert names == [str(path) for path in sorted(photos.rglob("*.jpg"))]
    np.testing.assert_allclose(np.load(out), ijepa_fast.embed(photos, trained.folder), rtol=1e-4, atol=1e-5)
    assert main(["embed", str(photos), "--checkpoint", str(trained.folder), "--out", "x.csv"]) == 1
    assert "--out: expected a name that ends in .npy or .parquet" in capsys.readouterr().err


def test_a_missing_package_is_a_sentence(trained, photos, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    command = ["embed", str(photos), "--checkpoint", str(trained.folder), "--out", str(tmp_path / "x.parquet")]
    assert main(command) == 1
    assert (
        "needs the package pyarrow, which is not installed; pip install ijepa_fast[science]" in capsys.readouterr().err
    )


def test_the_module_is_the_function():
    assert ijepa_fast.train.main
    assert callable(ijepa_fast.train)
    assert ijepa_fast.embed is api.embed
