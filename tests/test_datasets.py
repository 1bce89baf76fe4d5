"""A user's own data sets as sources: what items may be, labels, order, what is refused; and sets kept in memory."""

import numpy as np
import pytest
import torch

pytest.importorskip("nvidia.dali")
pytest.importorskip("sklearn")

from ijepa_fast.config import ConfigError, load_config
from ijepa_fast.data.central import eval_batches
from ijepa_fast.data.dali import TrainLoader
from ijepa_fast.data.reading import Reading
from ijepa_fast.data.sources import open_source
from ijepa_fast.eval.labels import open_labelled
from ijepa_fast.front import check_early
from tests import image_sets, my_data
from tests.data_images import write_photos


def batches(source, steps, start=0, **options):
    loader = TrainLoader(source, batch_size=4, crop=32, start_step=start, threads=1, seed=3, **options)
    try:
        return [next(loader) for _ in range(steps)]
    finally:
        loader.close()


def same(left, right):
    return all(torch.equal(a.images, b.images) and torch.equal(a.indices, b.indices) for a, b in zip(left, right))


KINDS = ["pictures", "arrays", "files", "HuggingFace", "stream"]


@pytest.mark.parametrize("name", KINDS)
def test_items_are_decoded_as_files_are(name):
    source = open_source(f"tests.my_data:{name}")
    assert source.reading == Reading(depth="uint8")
    assert len(source) == my_data.COUNT
    ((images, _),) = eval_batches(source, batch_size=16, crop=50, resize=50)
    expected = np.stack([np.asarray(my_data.picture(i))[:, 5:55] for i in range(my_data.COUNT)])
    assert np.abs(images.numpy().astype(int) - expected).mean() < (3 if name in ("files", "stream") else 1e-9)


@pytest.mark.parametrize("name", [*KINDS, "deep"])
def test_order_and_crops_go_on_where_they_were(name):
    reading = Reading(channels=5) if name == "deep" else Reading()
    source = open_source(f"tests.my_data:{name}", reading=reading)
    whole, tail = batches(source, 5), batches(source, 2, start=3)
    assert same(whole[3:], tail)
    assert whole[0].images.dtype == (torch.uint16 if name == "deep" else torch.uint8)
    assert whole[0].images.shape == (4, 32, 32, 5 if name == "deep" else 3)


@pytest.mark.parametrize("name", ["pictures", "HuggingFace"])
def test_labels_are_those_of_the_data_set(name):
    part = open_labelled(f"tests.my_data:{name}")
    assert part.classes == {"class": ["china", "flower"]}
    assert part.labels["class"].tolist() == [0, 1] * 6


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nothing", "tests.my_data:nothing: expected the import path of a module and a function.*AttributeError"),
        ("empty", "data.source=tests.my_data:empty: expected images, the data set is empty"),
        ("number", "expected a data set with a length and items, or one to iterate over, got a int"),
        ("words", "expected an image under one of image, .*, found text"),
        ("deep", r"tests.my_data:deep\[0\]: expected 3 channels, found 5; set data.channels=5"),
    ],
)
def test_what_is_no_data_set_is_named(name, words):
    with pytest.raises((ValueError, TypeError), match=words):
        open_source(f"tests.my_data:{name}")


def test_a_function_is_no_missing_path(tmp_path):
    """To the command, which looks before torch is imported."""
    check_early(load_config("quickstart", ["data.source=tests.my_data:pictures"]))
    with pytest.raises(ConfigError, match="does not exist; expected a folder of images, archives, arrays or a list"):
        check_early(load_config("quickstart", [f"data.source={tmp_path}/none"]))


def test_a_set_in_memory_gives_the_same_batches(tmp_path):
    write_photos(tmp_path / "photos", 12)
    source = open_source(tmp_path / "photos")
    kept, read = batches(source, 4, memory=True), batches(source, 4)
    assert same(kept, read)
    deep = open_source(image_sets.write_png(tmp_path / "deep"), reading=Reading(channels=1))
    assert same(batches(deep, 4, memory=True), batches(deep, 4))


def test_a_set_in_memory_is_read_once(tmp_path, monkeypatch):
    write_photos(tmp_path, 12)
    source, reads = open_source(tmp_path), []
    stored = source.stored
    monkeypatch.setattr(source, "stored", lambda index: reads.append(index) or stored(index))
    batches(source, 7, memory=True)
    assert sorted(reads) == list(range(12))
