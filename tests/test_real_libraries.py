"""The libraries themselves, where they are installed: Hugging Face `datasets`, WebDataset, and Parquet by pyarrow."""

import io
import tarfile

import numpy as np
import pytest
import torch

pytest.importorskip("deepspeed")
pytest.importorskip("nvidia.dali")
pytest.importorskip("sklearn")

import ijepa_fast
from ijepa_fast.__main__ import main
from ijepa_fast.data.central import eval_batches
from ijepa_fast.data.dali import TrainLoader
from ijepa_fast.data.held import hold
from ijepa_fast.data.reading import Reading
from ijepa_fast.data.sources import open_source
from ijepa_fast.eval.labels import open_labelled
from tests import my_data
from tests.data_images import encode, write_photos
from tests.test_api import SMALL, nested

CLASSES = ["china", "flower"]


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """No hub is asked, and caches are the test's own."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))


def pictures():
    return [my_data.picture(index) for index in range(my_data.COUNT)]


def hugging_face(decode=True):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)})
    columns = {"image": pictures(), "label": [index % 2 for index in range(my_data.COUNT)]}
    made = datasets.Dataset.from_dict(columns, features=features)
    return made if decode else made.cast_column("image", datasets.Image(decode=False))


def shards(folder, count=2):
    """Tar shards as WebDataset's writer lays them out."""
    paths = []
    for shard in range(count):
        paths.append(folder / f"part-{shard:03}.tar")
        with tarfile.open(paths[-1], "w") as out:
            for index in range(shard, my_data.COUNT, count):
                for end, data in (
                    ("jpg", encode(my_data.picture(index), quality=95)),
                    ("cls", str(index % 2).encode()),
                ):
                    member = tarfile.TarInfo(f"{index:04}.{end}")
                    member.size = len(data)
                    out.addfile(member, io.BytesIO(data))
    return paths


def decoded(source):
    ((images, _),) = eval_batches(source, batch_size=16, crop=50, resize=50)
    return images.numpy().astype(int)


def wanted():
    return np.stack([np.asarray(picture)[:, 5:55] for picture in pictures()]).astype(int)


def batches(source, start=0, steps=4):
    loader = TrainLoader(source, batch_size=4, crop=32, start_step=start, threads=1, seed=3)
    try:
        return [next(loader) for _ in range(steps)]
    finally:
        loader.close()


@pytest.mark.parametrize("how", ["decoded", "bytes", "torch", "numpy"])
def test_a_data_set_of_hugging_face(how):
    made = hugging_face(decode=how != "bytes")
    if how in ("torch", "numpy"):
        made = made.with_format(how)
    name = hold(made)
    source = open_source(name)
    assert len(source) == my_data.COUNT
    assert np.abs(decoded(source) - wanted()).mean() < 1
    part = open_labelled(name)
    assert part.classes == {"class": CLASSES}
    assert part.labels["class"].tolist() == [0, 1] * 6
    whole, tail = batches(source), batches(source, start=2, steps=2)
    assert all(torch.equal(a.images, b.images) for a, b in zip(whole[2:], tail))


def test_another_column_and_a_part_of_a_data_set():
    """CIFAR-10's column is called img there; a selection and a shuffled set are read in their own order."""
    made = hugging_face().rename_column("image", "img").select([3, 1, 2])
    assert np.abs(decoded(open_source(hold(made))) - wanted()[[3, 1, 2]]).mean() < 1


def test_arrays_in_columns():
    datasets = pytest.importorskip("datasets")
    arrays = np.random.default_rng(0).integers(0, 65535, (6, 5, 24, 20)).astype(np.uint16)
    features = datasets.Features({"image": datasets.Array3D((5, 24, 20), "uint16")})
    made = datasets.Dataset.from_dict({"image": arrays}, features=features)
    for one in (made.with_format("numpy"), made):
        source = open_source(hold(one), reading=Reading(channels=5, depth="uint16"))
        assert np.array_equal(source.raster(4).read(0, 0, 24, 20), arrays[4].transpose(1, 2, 0))


def test_all_splits_at_once_are_no_data_set():
    datasets = pytest.importorskip("datasets")
    made = datasets.DatasetDict({"train": hugging_face(), "test": hugging_face()})
    with pytest.raises(ValueError, match=r"expected one data set, got several by name \(train, test\); choose one"):
        open_source(hold(made))


def test_a_stream_of_hugging_face_is_kept():
    source = open_source(hold(hugging_face().to_iterable_dataset()))
    assert np.abs(decoded(source) - wanted()).mean() < 1


@pytest.mark.parametrize("how", ["raw", "pil", "torch", "tuple"])
def test_a_pipeline_of_webdataset(tmp_path, how):
    webdataset = pytest.importorskip("webdataset")
    urls = [str(path) for path in shards(tmp_path)]
    pipeline = webdataset.WebDataset(urls, shardshuffle=False)
    if how != "raw":
        pipeline = pipeline.decode("torchrgb8" if how == "torch" else "pil")
    if how == "tuple":
        pipeline = pipeline.to_tuple("jpg", "cls")
    name = hold(pipeline)
    source = open_source(name)
    order = [*range(0, 12, 2), *range(1, 12, 2)]
    assert np.abs(decoded(source) - wanted()[order]).mean() < 3
    assert open_labelled(name).labels["class"].tolist() == [index % 2 for index in order]
    whole, tail = batches(source), batches(source, start=2, steps=2)
    assert all(torch.equal(a.images, b.images) for a, b in zip(whole[2:], tail))


def test_shards_that_webdataset_writes_are_read_in_place(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as out:
        for index, picture in enumerate(pictures()):
            out.write({"__key__": f"{index:03}", "jpg": encode(picture, quality=95), "cls": index % 2})
    part = open_labelled(tmp_path / "a.tar")
    assert part.labels["class"].tolist() == [0, 1] * 6
    assert np.abs(decoded(part.source) - wanted()).mean() < 3


def trained(data, runs):
    small = nested(SMALL)
    small["optim"] |= {"epochs": 1, "steps": 2}
    return ijepa_fast.train(data | small.pop("data"), "quickstart", **small | {"runs": str(runs), "batch_size": 4})


@pytest.mark.slow
def test_a_run_on_a_data_set_of_hugging_face(tmp_path):
    run = trained({"source": hugging_face()}, tmp_path)
    assert len(run.log) == 2
    assert ijepa_fast.embed(hugging_face(), run.encoder()).shape == (my_data.COUNT, 32)


@pytest.mark.slow
def test_vectors_as_parquet(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    write_photos(tmp_path / "photos", 6)
    run = trained({"source": str(tmp_path / "photos")}, tmp_path)
    for pool, shape in (("mean", (32,)), ("none", (64, 32))):
        command = ["embed", str(tmp_path / "photos"), "--checkpoint", str(run.folder), "--pool", pool]
        assert main([*command, "--out", str(tmp_path / "x.parquet")]) == 0
        assert main([*command, "--out", str(tmp_path / "x.npy")]) == 0
        table, array = parquet.read_table(tmp_path / "x.parquet"), np.load(tmp_path / "x.npy")
        assert table.column_names == ["name", "features"]
        assert table["name"].to_pylist() == (tmp_path / "x.txt").read_text().splitlines()
        rows = np.array(table["features"].to_pylist(), np.float32).reshape(6, *shape)
        assert np.array_equal(rows, array)
