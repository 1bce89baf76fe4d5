"""Labelled images: what each layout's labels are, and what does not match."""

import json

import numpy as np
import pytest

pytest.importorskip("nvidia.dali")

from PIL import Image

from ijepa_fast.data.central import eval_batches
from ijepa_fast.eval.features import pooled_features
from ijepa_fast.eval.labels import CLEVR_DISTANCES, Samples, match, open_labelled


def write_image(path, value=0, side=32):
    """A JPEG file of one grey."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (side, side), (value,) * 3).save(path, quality=95)


def folders(root, classes, each=2):
    """A folder per class."""
    for name in classes:
        for i in range(each):
            write_image(root / name / f"{i}.jpg")
    return root


def table(root, rows):
    """Flat images with a labels.csv; rows: the values of count and metres."""
    for i in range(len(rows)):
        write_image(root / f"{i}.jpg")
    lines = [f"{i}.jpg,{count},{metres}" for i, (count, metres) in enumerate(rows)]
    (root / "labels.csv").write_text("\n".join(["file,count,metres", *lines]) + "\n")
    return root


def clevr(root, split, scenes):
    """Clevr's own layout; scenes: the depths of each image's objects."""
    entries = []
    for i, depths in enumerate(scenes):
        name = f"CLEVR_{split}_{i:06d}.png"
        path = root / "images" / split / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (48, 32)).save(path)
        entries.append({"image_filename": name, "objects": [{"pixel_coords": [5, 6, depth]} for depth in depths]})
    (root / "scenes").mkdir(exist_ok=True)
    # The order of the scenes is not that of the files.
    (root / "scenes" / f"CLEVR_{split}_scenes.json").write_text(json.dumps({"info": {}, "scenes": entries[::-1]}))
    return root / "images" / split


def test_class_folders(tmp_path):
    part = open_labelled(folders(tmp_path, ["cat", "ant"]))
    assert part.tasks == {"class": "classification"}
    assert [part.classes["class"][i] for i in part.labels["class"]] == ["ant", "ant", "cat", "cat"]


def test_lists_with_labels(tmp_path):
    """iNat18: a list of its paths with their categories, since its folders are super-categories."""
    folders(tmp_path / "train_val2018" / "Aves", ["10", "7"], each=1)
    path = tmp_path / "train.txt"
    path.write_text("train_val2018/Aves/10/0.jpg 10\ntrain_val2018/Aves/7/0.jpg 7\n")
    part = open_labelled(path)
    assert [part.classes["class"][i] for i in part.labels["class"]] == ["10", "7"]


def test_tables_of_counts_and_numbers(tmp_path):
    part = open_labelled(table(tmp_path, [(3, 1.5), (10, 2.0), (5, 2.25)]))
    assert part.tasks == {"count": "counting", "metres": "regression"}
    assert part.labels["count"].tolist() == [3, 10, 5]
    assert part.labels["metres"].tolist() == [1.5, 2.0, 2.25]
    part = open_labelled(tmp_path, tasks={"count": "regression"})
    assert part.tasks["count"] == "regression"
    assert part.labels["count"].tolist() == [3.0, 10.0, 5.0]


def test_clevrs_own_layout(tmp_path):
    scenes = [[7.0, 9.2, 12.0], [8.0, 8.3, 11.0, 9.0], [8.2, 8.4, 10.0], [9.1] * 5, [9.7] * 3, [10.5] * 10]
    train = open_labelled(clevr(tmp_path, "train", scenes))
    assert train.tasks == {"count": "counting", "distance": "classification", "depth": "regression"}
    assert train.labels["count"].tolist() == [3, 4, 3, 5, 3, 10]
    assert train.labels["depth"].tolist() == [7.0, 8.0, 8.2, 9.1, 9.7, 10.5]
    # VTAB: the last threshold of 0, 8, 8.5, 9, 9.5, 10, 100 that is below the nearest depth
    edges = np.array([0.0, *CLEVR_DISTANCES, 100.0])
    assert train.labels["distance"].tolist() == [int(np.flatnonzero(edges < min(d)).max()) for d in scenes]
    test = match(train, open_labelled(clevr(tmp_path, "val", [[8.7] * 4, [20.0] * 3])))
    assert test.labels["distance"].tolist() == [2, 5]
    assert test.labels["count"].tolist() == [4, 3]


def test_test_labels_take_the_ids_of_training(tmp_path):
    train = open_labelled(folders(tmp_path / "train", ["ant", "bee", "cat"]))
    test = match(train, open_labelled(folders(tmp_path / "test", ["bee", "cat"], each=1)))
    assert test.labels["class"].tolist() == [1, 2]


def test_features_and_labels_stay_together(tmp_path):
    """Samples drawn out of order, one of them not an image."""
    for i in range(6):
        write_image(tmp_path / "dark" / f"{i}.jpg", 10 * i)
        write_image(tmp_path / "light" / f"{i}.jpg", 130 + 10 * i)
    (tmp_path / "dark" / "3.jpg").write_bytes(b"not an image")
    part = open_labelled(tmp_path)
    wanted = np.array([11, 3, 5, 0, 7])
    mean = lambda images: images.flatten(1, 2).float()  # noqa: E731
    batches = eval_batches(Samples(part.source, wanted), batch_size=2, crop=16, resize=16, max_bad_share=0.5)
    features, rows = pooled_features(mean, batches)
    assert rows.tolist() == [11, 5, 0, 7]
    assert features[:, 0].tolist() == pytest.approx([180, 50, 0, 140], abs=2)
    assert part.at(rows)["class"].tolist() == [1, 0, 0, 1]
    drawn = part.rows(5, seed=1)
    assert len(set(drawn)) == 5
    assert drawn.tolist() == sorted(drawn)
    assert Samples(part.source, drawn).name(2) == part.source.name(int(drawn[2]))


@pytest.mark.parametrize(
    ("train", "test", "words"),
    [
        (lambda p: folders(p, ["a", "b"]), lambda p: folders(p, ["b", "c", "d"]), ["'class'", "3 classes", "2", "'c'"]),
        (
            lambda p: folders(p, ["a"]),
            lambda p: table(p, [(1, 0.5)]),
            ["'class'", "classification", "count (counting)"],
        ),
        (lambda p: folders(p, ["."]), lambda p: folders(p, ["a"]), ["no labels", "labels.csv"]),
    ],
    ids=["unknown class", "another label", "no labels"],
)
def test_labels_that_do_not_match(tmp_path, train, test, words):
    train, test = train(tmp_path / "train"), test(tmp_path / "test")
    with pytest.raises(ValueError) as error:
        match(open_labelled(train), open_labelled(test))
    for word in words:
        assert word in str(error.value)


def test_clevr_without_a_scene_or_with_other_json(tmp_path):
    path = clevr(tmp_path, "train", [[9.0] * 3])
    write_image(path / "extra.jpg")
    with pytest.raises(ValueError, match=r"1 of 2 images have no scene, the first 'extra.jpg'"):
        open_labelled(path)
    (tmp_path / "scenes" / "CLEVR_train_scenes.json").write_text('{"questions": []}')
    with pytest.raises(ValueError, match="expected Clevr's scenes"):
        open_labelled(path)


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ({"colour": "counting"}, ["colour", "count, metres"]),
        ({"count": "ranking"}, ["count=ranking", "classification"]),
        ({"metres": "counting"}, ["metres", "no integers"]),
    ],
    ids=["no such label", "no such task", "numbers that are no counts"],
)
def test_tasks_that_labels_cannot_be(tmp_path, task, words):
    table(tmp_path, [(3, 1.5), (4, 2.5)])
    with pytest.raises(ValueError) as error:
        open_labelled(tmp_path, tasks=task)
    for word in words:
        assert word in str(error.value)
