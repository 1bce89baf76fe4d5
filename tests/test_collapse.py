"""The collapse doctor: its figures on features whose answer is known, its sentences, and where they are shown."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("omegaconf")

from ijepa_fast.eval import collapse
from ijepa_fast.eval.online import RANK_IMAGES, OnlineProbe
from ijepa_fast.report import report
from ijepa_fast.run.log import newest

WIDTH, PLACES = 32, 16


def features_of(by_place, by_image, images=200):
    """Features of `images` images at all places: so much of each is its place's, so much its own."""
    place = torch.arange(PLACES).repeat(images)
    values = by_place * torch.randn(PLACES, WIDTH)[place] + by_image * torch.randn(images * PLACES, WIDTH)
    return values, place


def pooled_of(features):
    return features.view(-1, PLACES, WIDTH).mean(1)


@pytest.mark.parametrize(("by_place", "by_image"), [(0.0, 1.0), (1.0, 1.0), (3.0, 1.0), (1.0, 0.0)])
def test_the_share_of_position_is_what_it_was_made_of(by_place, by_image):
    features, place = features_of(by_place, by_image)
    found = collapse.examine(pooled_of(features), features, place)
    share = by_place**2 / (by_place**2 + by_image**2)
    assert found["position_share"] == pytest.approx(share, abs=0.05)
    assert found["feature_norm"] == pytest.approx((by_place**2 + by_image**2) ** 0.5, rel=0.15)


def test_norms_grow_with_the_features():
    features, place = features_of(1.0, 1.0)
    norms = [collapse.examine(pooled_of(f), f, place)["feature_norm"] for f in (features, 3 * features)]
    assert norms[1] == pytest.approx(3 * norms[0])


@pytest.mark.parametrize("classes", [2, 5, 9])
def test_lidar_counts_the_directions_of_the_classes(classes):
    """Classes far apart in as many directions less one, whatever scale and noise a direction has."""
    labels = torch.arange(1800) % classes
    corners = 50 * torch.eye(classes, WIDTH)
    features = (corners[labels] + torch.randn(1800, WIDTH)) * torch.linspace(0.1, 10, WIDTH)
    assert collapse.lidar(features, labels) == pytest.approx(classes - 1, rel=0.05)


def test_lidar_of_one_direction_is_one():
    labels = torch.arange(900) % 9
    features = torch.randn(900, WIDTH)
    features[:, 0] += 100.0 * labels
    assert collapse.lidar(features, labels) == pytest.approx(1, abs=0.1)


HEALTHY = {"rankme": 20.0, "target_variance": 0.3, "position_share": 0.6, "feature_norm": 1.0}


@pytest.mark.parametrize(
    ("now", "words"),
    [
        ({}, None),
        ({"rankme": 1.2}, "have collapsed"),
        ({"target_variance": 0.005}, "have collapsed"),
        ({"rankme": 8.0}, "fallen to 40% of the untrained encoder's"),
        ({"rankme": 9.5}, None),
        ({"target_variance": 0.05, "position_share": 0.9}, "their place explains 90% of their variance"),
        ({"position_share": 0.95}, "their place explains 95% of their variance"),
        ({"position_share": 0.86}, None),
        ({"feature_norm": 1.27}, "have grown to 1.27 times the untrained encoder's"),
        ({"feature_norm": 1.05}, None),
    ],
)
def test_each_sentence_says_what_to_do(now, words):
    told = collapse.advise(HEALTHY | now, HEALTHY, 192)
    if words is None:
        assert told is None
    else:
        assert words in told.words
        assert any(key in told.words for key in ("optim.lr", "model.patch_std"))


def test_without_a_first_value_no_rank_is_compared():
    assert collapse.advise(HEALTHY | {"rankme": 8.0}, None, 192) is None


def watch(probe, method, features, place, images, step):
    lengths = torch.full((images,), PLACES)
    method.watch(features, SimpleNamespace(images=images, union_places=place.int(), union_lengths=lengths))
    probe.add(torch.arange(images))
    return probe.read(step).get("probe")


def test_the_first_images_are_kept_beside_every_reading():
    """Of the first RANK_IMAGES the rank, of the first batch the rest; and an unhealthy fall is said once."""
    method, said = SimpleNamespace(watch=None), []
    probe = OnlineProbe(method, 10, {}, {}, say=said.append)
    firsts = []
    for step in range(1, 31):
        features, place = features_of(0.3, 1.0, images=64)
        if step > 8:
            features = features * (torch.arange(WIDTH) < 3)
        elif step * 64 <= RANK_IMAGES:
            firsts.append((features, place))
        found = watch(probe, method, features, place, 64, step)
        if step % 10 == 0:
            pooled = torch.cat([pooled_of(f) for f, _ in firsts])
            assert found["untrained"]["rankme"] == pytest.approx(collapse.rankme(pooled), rel=1e-5)
            expected = collapse.examine(pooled_of(firsts[0][0]), *firsts[0])["position_share"]
            assert found["untrained"]["position_share"] == pytest.approx(expected, rel=1e-5)
    assert found["rankme"] < 4
    assert "fallen to" in found["advice"]
    assert len(said) == 1


def test_a_resumed_run_has_the_first_values_of_its_log(tmp_path):
    path = tmp_path / "log.jsonl"
    assert newest(path, "probe", "untrained") is None
    lines = [{"step": 1, "probe": {"untrained": {"rankme": 9.0}}}, {"step": 2, "loss": 1.0}]
    path.write_text("\n".join(json.dumps(line) for line in lines) + '\n{"step": 3, "pro')
    assert newest(path, "probe", "untrained") == {"rankme": 9.0}
    method = SimpleNamespace(watch=None)
    probe = OnlineProbe(method, 1, {}, {}, step=2, untrained={"rankme": 9.0, "target_variance": 0.5})
    found = watch(probe, method, *features_of(0.3, 1.0, images=32), 32, 3)
    assert found["untrained"] == {"rankme": 9.0, "target_variance": 0.5}


def test_a_run_that_goes_on_without_them_compares_with_nothing():
    method = SimpleNamespace(watch=None)
    probe = OnlineProbe(method, 1, {}, {}, step=2)
    assert "untrained" not in watch(probe, method, *features_of(0.3, 1.0, images=32), 32, 3)


def test_classes_have_a_lidar():
    method, labels = SimpleNamespace(watch=None), np.arange(64) % 4
    probe = OnlineProbe(method, 1, {"kind": labels}, {"kind": ["a", "b", "c", "d"]})
    found = watch(probe, method, *features_of(0.3, 1.0, images=64), 64, 1)
    assert 1 <= found["kind"]["lidar"] <= 3.01


def test_log_and_report_of_a_run_show_it(finished_run):
    records = [json.loads(line) for line in (finished_run / "log.jsonl").read_text().splitlines()]
    probes = [record["probe"] for record in records if "probe" in record]
    assert {"rankme", "position_share", "feature_norm", "untrained"} <= probes[-1].keys()
    assert probes[0]["untrained"] == probes[-1]["untrained"]
    page = report(finished_run, count=8)
    for title in ("RankMe", "Share explained by place", "Size of a feature", "LiDAR", "untrained"):
        assert title in page, title
