"""The embedded data set: determinism, labels that are true and balanced, and no give-away in the colours."""

import csv
from collections import Counter

import numpy as np
import pytest

pytest.importorskip("PIL")

from PIL import Image

from ijepa_fast.data.scenes import (
    DISTANCES,
    KINDS,
    MAP_CLASSES,
    MAX_OBJECTS,
    NEAREST,
    _cast,
    draw_maps,
    draw_scene,
    ensure_maps,
    ensure_scenes,
    is_scenes,
    render,
    write_scenes,
)
from ijepa_fast.data.sources import open_source


def test_a_scene_depends_on_seed_and_index_only():
    first = render(draw_scene(3, 17)[0], 48)
    assert first.shape == (48, 48, 3)
    assert first.dtype == np.uint8
    assert np.array_equal(first, render(draw_scene(3, 17)[0], 48))
    assert not np.array_equal(first, render(draw_scene(3, 18)[0], 48))
    assert not np.array_equal(first, render(draw_scene(4, 17)[0], 48))


LABELS = {"kind": KINDS, "count": range(1, MAX_OBJECTS + 1), "distance": range(DISTANCES)}


@pytest.fixture(scope="module")
def scenes():
    return [draw_scene(0, index) for index in range(150)]


def test_labels_are_what_the_picture_shows(scenes):
    for scene, labels in scenes:
        _, depth, which = _cast(scene, 64)
        areas = np.bincount(which[which >= 0], minlength=len(scene.solids))
        assert labels["kind"] == scene.solids[areas.argmax()].kind
        assert labels["count"] == len(scene.solids) == (areas > 0).sum()
        metres = min(np.linalg.norm(solid.centre - scene.camera) for solid in scene.solids)
        assert metres == pytest.approx(labels["metres"], abs=2e-3)
        seen = depth[which >= 0].min()  # the nearest surface lies in front of the nearest centre, by its size at most
        assert metres - 2.5 < seen < metres


@pytest.mark.parametrize(("column", "values"), LABELS.items(), ids=LABELS)
def test_labels_are_balanced(scenes, column, values):
    shares = Counter(labels[column] for _, labels in scenes)
    assert set(shares) == set(values)
    assert max(shares.values()) < 2 * len(scenes) / len(values)


def test_distance_and_count_are_independent(scenes):
    metres, counts = (np.array([labels[column] for _, labels in scenes]) for column in ("metres", "count"))
    assert abs(np.corrcoef(metres, counts)[0, 1]) < 0.2
    assert metres.min() >= NEAREST[0]
    assert metres.max() <= NEAREST[1]


@pytest.mark.parametrize("kind", KINDS)
def test_solids_are_closed_and_their_normals_look_at_the_viewer(scenes, kind):
    seen = 0
    for scene, _ in scenes:
        rays, depth, which = _cast(scene, 48)
        for number, solid in enumerate(scene.solids):
            here = np.flatnonzero(which == number)
            if solid.kind == kind and len(here):
                points = scene.camera[:, None] + rays[:, here] * depth[here]
                local = solid.to_local(points - solid.centre[:, None])
                assert np.abs(local).max() < 1.01
                normal = solid.normal(local)
                assert np.allclose(np.linalg.norm(normal, axis=0), 1, atol=1e-3)
                assert ((normal * rays[:, here]).sum(0) < 0.02).mean() > 0.97  # all but grazing edges
                seen += 1
    assert seen > 20


def test_writing_is_the_same_with_any_number_of_processes(tmp_path):
    a = write_scenes(tmp_path / "a", 5, size=32, seed=1, processes=1)
    b = write_scenes(tmp_path / "b", 5, size=32, seed=1, processes=2)
    files = sorted(path.name for path in a.iterdir())
    assert files == [*(f"{i:06d}.jpg" for i in range(5)), "labels.csv"]
    for name in files:
        assert (a / name).read_bytes() == (b / name).read_bytes()
    with Image.open(a / "000003.jpg") as image:
        assert (image.format, image.size) == ("JPEG", (32, 32))
    with open(a / "labels.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["file", "kind", "count", "distance", "metres"]
    for label in LABELS:
        source = open_source(a, label=label)
        assert [source.classes[i] for i in source.labels] == [row[label] for row in rows]


def test_ensured_scenes_are_rendered_once_and_appear_whole(tmp_path, monkeypatch):
    folder = ensure_scenes(tmp_path, 3, size=32)
    assert len(open_source(folder)) == 3
    monkeypatch.setattr("ijepa_fast.data.scenes.write_scenes", lambda *args: pytest.fail("rendered again"))
    assert ensure_scenes(tmp_path, 3, size=32) == folder
    monkeypatch.undo()
    monkeypatch.setattr("ijepa_fast.data.scenes._main", None)
    other = ensure_scenes(tmp_path, 4, size=32)
    assert other != folder
    assert set(tmp_path.iterdir()) == {folder, other}


def test_a_rendering_process_that_fails_is_an_error_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(RuntimeError, match="exit code 1"):
        ensure_scenes(tmp_path, 3, size=32)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    assert len(open_source(ensure_scenes(tmp_path, 3, size=32))) == 3


def test_arguments(tmp_path):
    with pytest.raises(ValueError, match="count >= 1 and size >= 16, got count=0"):
        write_scenes(tmp_path, 0)


@pytest.fixture(scope="module")
def colours():
    """Statistics of the colours of 900 scenes, and their labels."""
    table, features = [], []
    for index in range(900):
        scene, labels = draw_scene(7, index)
        image = render(scene, 32).reshape(-1, 3) / 255
        table.append(labels)
        features.append([*image.mean(0), *image.std(0), *np.quantile(image, [0.1, 0.9], axis=0).ravel()])
    return (np.array(features) - np.mean(features, 0)) / np.std(features, 0), table


@pytest.mark.slow
@pytest.mark.parametrize("column", LABELS)
def test_colour_statistics_do_not_give_the_labels_away(colours, column):
    linear_model = pytest.importorskip("sklearn.linear_model")
    features, table = colours
    values = np.array([labels[column] for labels in table])
    probe = linear_model.LogisticRegression(max_iter=500).fit(features[:600], values[:600])
    # What is near covers more of the picture, and colours show how much is covered.
    limit = 0.2 if column == "distance" else 0.12
    assert probe.score(features[600:], values[600:]) < 1 / len(LABELS[column]) + limit


def test_maps_say_what_the_picture_shows(scenes):
    """The largest solid's class is the label's kind, the sky has no depth, and the nearest solid the least of all."""
    for scene, labels in scenes[:40]:
        classes, depth = draw_maps(scene, 64)
        assert classes.dtype == np.uint8
        assert 1 <= classes.min() <= classes.max() <= len(MAP_CLASSES)
        areas = np.bincount(classes.ravel(), minlength=1 + len(MAP_CLASSES))
        present = {solid.kind for solid in scene.solids}
        assert {MAP_CLASSES[value - 1] for value in np.unique(classes)} - {"sky", "ground"} == present
        if len(present) == labels["count"]:  # of a kind no second solid
            assert MAP_CLASSES[2 + areas[3:].argmax()] == labels["kind"]
        assert (depth[classes == 1] == 0).all()
        solids = depth[classes > 2].astype(float)
        assert labels["metres"] - 2.5 < solids.min() < labels["metres"]
        assert depth.max() <= 20


def test_maps_of_a_folder_of_scenes(tmp_path):
    scenes = ensure_scenes(tmp_path, 3, 32, 5, processes=2)
    assert is_scenes(scenes)
    folders = ensure_maps(scenes, processes=2)
    for i in range(3):
        classes, depth = draw_maps(draw_scene(5, i)[0], 32)
        assert np.array_equal(np.array(Image.open(f"{folders['segmentation']}/{i:06d}.png")), classes)
        assert np.array_equal(np.load(f"{folders['depth']}/{i:06d}.npz")["metres"], depth)
    assert ensure_maps(scenes) == folders
    assert not is_scenes(tmp_path / "photos")
    with pytest.raises(ValueError, match="expected a folder of the embedded scenes"):
        ensure_maps(tmp_path / "photos")
