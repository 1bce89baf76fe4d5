"""The collapse doctor: its figures on features whose answer is known, its sentences, and where they are shown."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("omegaconf")

from ijepa_fast.config import load_config
from ijepa_fast.eval import collapse
from ijepa_fast.eval.collapse import RANK_IMAGES
from ijepa_fast.eval.online import OnlineProbe
from ijepa_fast.methods import ijepa, lejepa
from ijepa_fast.report import report
from ijepa_fast.run.build import build_method
from ijepa_fast.run.log import newest
from tests.launch import ROOT
from tests.small import setup_of, small_ijepa, watched

WIDTH, PLACES = 32, 16


def features_of(by_place, by_image, images=200):
    """Features of `images` images at all places: so much of each is its place's, so much its own."""
    place = torch.arange(PLACES).repeat(images)
    values = by_place * torch.randn(PLACES, WIDTH)[place] + by_image * torch.randn(images * PLACES, WIDTH)
    return values, place


def pooled_of(features):
    return features.view(-1, PLACES, WIDTH).mean(1)


def figures_of(features, place, batch=None):
    """The doctor's figures of features, given in batches of so many images, and of a block for every second batch."""
    parts = (
        [slice(None)] if batch is None else [slice(i, i + batch * PLACES) for i in range(0, len(place), batch * PLACES)]
    )
    blocks = []
    for number, part in enumerate(parts):
        if number % 2 == 0:
            blocks.append(collapse.Moments(PLACES, WIDTH))
        blocks[-1].add(features[part], place[part], len(place[part]) // PLACES)
    return collapse.examine(pooled_of(features), blocks)


@pytest.mark.parametrize(("by_place", "by_image"), [(0.0, 1.0), (1.0, 1.0), (3.0, 1.0), (1.0, 0.0)])
def test_the_share_of_position_is_what_it_was_made_of(by_place, by_image):
    found = figures_of(*features_of(by_place, by_image))
    share = by_place**2 / (by_place**2 + by_image**2)
    assert found["position_share"] == pytest.approx(share, abs=0.05)
    assert found["target_variance"] == pytest.approx(1 - share, abs=0.15)


def test_alike_at_all_places_and_images_nothing_varies():
    features, place = features_of(0.0, 1.0)
    assert figures_of(features[:1].expand(len(place), -1), place)["target_variance"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_batches_of_any_size_give_the_figures_of_all(batch):
    """Those of the rows one by one: squares from the mean of their place, over the degrees of freedom."""
    features, place = features_of(1.0, 0.5, images=192)
    rows = torch.nn.functional.layer_norm(features, (WIDTH,)).double()
    means = torch.stack([rows[place == p].mean(0) for p in range(PLACES)])
    between = float((rows - means[place]).square().mean(1).sum() / (len(rows) - PLACES))
    total = float((rows - rows.mean(0)).square().mean(1).sum() / (len(rows) - 1))
    found = figures_of(features, place, batch)
    assert found["target_variance"] == pytest.approx(between, rel=1e-4)
    assert found["position_share"] == pytest.approx(1 - between / total, rel=1e-4)


def test_what_too_few_images_tell_is_left_out():
    one, few, enough = (figures_of(*features_of(1.0, 1.0, images=n)) for n in (1, 2, collapse.LEAST_IMAGES))
    assert one == {}
    assert few.keys() == {"target_variance", "position_share"}
    assert enough.keys() == few.keys() | {"rankme", "images"}
    assert not collapse.has_collapsed(one)
    assert collapse.advise(one, HEALTHY, 192, IJEPA) is None


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


@pytest.mark.parametrize("width", [24, 700])
def test_lidar_is_that_of_the_definition(width):
    """Singular values of whitened class means; also in the span of fewer images than a feature has values."""
    labels = torch.arange(300) % 7
    x = (torch.randn(300, width) + 0.5 * torch.randn(7, width)[labels]).double()
    means = torch.stack([x[labels == c].mean(0) for c in range(7)])
    values, vectors = torch.linalg.eigh((x - means[labels]).T @ (x - means[labels]) / 300)
    floor = collapse.LIDAR_EPS * values.clamp_min(0).mean()
    counts = torch.bincount(labels)[:, None] / 300
    apart = counts.sqrt() * (means - x.mean(0)) @ (vectors * (values.clamp_min(0) + floor).rsqrt())
    p = torch.linalg.svdvals(apart).square()
    p = p / p.sum()
    expected = float(torch.special.entr(p).sum().exp())
    assert collapse.lidar(x.float(), labels) == pytest.approx(expected, rel=1e-4)


HEALTHY = {"images": 512.0, "rankme": 20.0, "target_variance": 0.3, "position_share": 0.6}
IJEPA = collapse.Means(average=True, fixed=False, by_place=False, patch_std=True)


@pytest.mark.parametrize(
    ("now", "words", "key"),
    [
        ({}, None, ""),
        ({"rankme": 1.2}, "have collapsed", "optim.ema"),
        ({"target_variance": 0.005}, "have collapsed", "optim.lr"),
        ({"rankme": 8.0}, "fallen to 40% of the untrained encoder's", "optim.warmup_epochs"),
        ({"rankme": 8.0, "images": 100.0}, None, ""),
        ({"rankme": 9.5}, None, ""),
        ({"target_variance": 0.05, "position_share": 0.9}, "their place explains 90% of", "model.patch_std"),
        ({"position_share": 0.95}, "their place explains 95% of their variance", "objective.options.target_norm"),
        ({"position_share": 0.86}, None, ""),
        ({"target_variance": 0.05, "position_share": 0.1}, "tell images hardly apart", "optim.lr"),
    ],
)
def test_each_sentence_says_what_to_do(now, words, key):
    told = collapse.advise(HEALTHY | now, HEALTHY, 192, IJEPA)
    if words is None:
        assert told is None
    else:
        assert words in told.words
        assert key in told.words


def test_without_a_first_value_no_rank_is_compared():
    assert collapse.advise(HEALTHY | {"rankme": 8.0}, None, 192, IJEPA) is None


@pytest.mark.parametrize(
    "now", [{"rankme": 1.2}, {"rankme": 8.0}, {"position_share": 0.95}, {"target_variance": 0.05}], ids=str
)
def test_no_sentence_advises_what_the_method_has_not(now):
    def words(**has):
        told = collapse.advise(HEALTHY | now, HEALTHY, 192, replace(IJEPA, **has))
        return "" if told is None else told.words

    assert words() != ""
    assert "optim.ema" not in words(average=False)
    assert "target" not in words(average=False, by_place=None)
    assert words(fixed=True) == ""
    assert "patch_std" not in words(patch_std=False)
    assert "target_norm" not in words(by_place=True)
    for has in ({"average": False, "by_place": None, "patch_std": False}, {"patch_std": False}):
        assert "optim." in words(**has) or "target_norm" in words(**has)


def test_what_a_method_has_is_asked_of_it():
    means = {
        name: collapse.means_of(small_ijepa(options=ijepa.Options(**options))) for name, options in OPTIONS.items()
    }
    assert means["published"] == IJEPA
    assert means["xavier"] == replace(IJEPA, patch_std=False)
    assert means["position"] == means["position_token"] == replace(IJEPA, by_place=True)
    assert means["random"] == means["frozen"] == replace(IJEPA, average=False, fixed=True)
    plain = lejepa.LeJEPA(setup_of(32, 4, options=lejepa.Options(views=2, slices=16)))
    assert collapse.means_of(plain) == collapse.Means(average=False, fixed=False, by_place=None, patch_std=False)


OPTIONS = {
    "published": {},
    "xavier": {"init": "xavier"},
    "position": {"target_norm": "position"},
    "position_token": {"target_norm": "position_token"},
    "random": {"teacher": "random"},
    "frozen": {"teacher": "frozen", "teacher_from": "somewhere"},
}


def watch(probe, method, features, place, images, step):
    lengths = torch.full((images,), PLACES)
    method.watch(features, SimpleNamespace(images=images, union_places=place.int(), union_lengths=lengths))
    probe.add(torch.arange(images))
    return probe.read(step).get("probe")


def test_the_first_images_are_kept_beside_every_reading():
    """Of the first RANK_IMAGES images; and an unhealthy fall is said once."""
    method, said = watched(PLACES), []
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
            expected = figures_of(*(torch.cat(part) for part in zip(*firsts)))["position_share"]
            assert found["untrained"]["position_share"] == pytest.approx(expected, rel=1e-4)
    assert found["rankme"] < 4
    assert "fallen to" in found["advice"]
    assert len(said) == 1


def test_a_resumed_run_has_the_first_values_of_its_log(tmp_path):
    path = tmp_path / "log.jsonl"
    assert newest(path, "probe", "untrained") is None
    lines = [{"step": 1, "probe": {"untrained": {"rankme": 9.0}}}, {"step": 2, "loss": 1.0}]
    path.write_text("\n".join(json.dumps(line) for line in lines) + '\n{"step": 3, "pro')
    assert newest(path, "probe", "untrained") == {"rankme": 9.0}
    method = watched(PLACES)
    probe = OnlineProbe(method, 1, {}, {}, step=2, untrained={"rankme": 9.0, "target_variance": 0.5})
    found = watch(probe, method, *features_of(0.3, 1.0, images=32), 32, 3)
    assert found["untrained"] == {"rankme": 9.0, "target_variance": 0.5}


def test_a_run_that_goes_on_without_them_compares_with_nothing():
    method = watched(PLACES)
    probe = OnlineProbe(method, 1, {}, {}, step=2)
    assert "untrained" not in watch(probe, method, *features_of(0.3, 1.0, images=32), 32, 3)


def test_classes_have_a_lidar():
    method, labels = watched(PLACES), np.arange(64) % 4
    probe = OnlineProbe(method, 1, {"kind": labels}, {"kind": ["a", "b", "c", "d"]})
    found = watch(probe, method, *features_of(0.3, 1.0, images=64), 64, 1)
    assert 1 <= found["kind"]["lidar"] <= 3.01


def test_a_healthy_run_of_one_image_a_batch_is_healthy():
    """No place repeats within a batch; over the last images each does."""
    method, said = watched(PLACES), []
    probe = OnlineProbe(method, 40, {}, {}, say=said.append)
    for step in range(1, 41):
        found = watch(probe, method, *features_of(0.3, 1.0, images=1), 1, step)
    assert found["collapsed"] is False
    assert found["target_variance"] > 0.5
    assert found["rankme"] > 10
    assert said == []
    assert "advice" not in found


def test_a_reading_of_one_image_says_nothing():
    method, said = watched(PLACES), []
    probe = OnlineProbe(method, 1, {}, {}, say=said.append)
    found = watch(probe, method, *features_of(0.3, 1.0, images=1), 1, 1)
    assert found == {"untrained": {}, "collapsed": False}
    assert said == []


def test_figures_are_of_the_last_images_alone():
    """Of the last 512 and at most as many before them: what came earlier is forgotten."""
    method = watched(PLACES)
    probe = OnlineProbe(method, 100, {}, {})
    for step in range(1, 101):
        found = watch(probe, method, *features_of(9.0 if step < 60 else 0.0, 1.0, images=32), 32, step)
    assert found["position_share"] < 0.05


@pytest.mark.parametrize("layers", [0, 1, 2])
def test_the_last_block_is_measured_before_the_norm(layers):
    """Whatever the target is made of; it is that of the last block's output at the targets."""
    method = small_ijepa(options=ijepa.Options(target_layers=layers))
    with torch.no_grad():
        method.target_encoder.blocks[-1].mlp.fc2.weight.mul_(300)
    probe = OnlineProbe(method, 1, {}, {})
    images, draw = torch.randint(256, (4, 64, 64, 3), dtype=torch.uint8), method.draw(4, 0, 0)
    method(images, draw)
    probe.add(torch.arange(4))
    output = method.target_encoder.layers(method.patchify(images), 4, 1)[0][draw.union_index.long()]
    found = probe.read(1)["probe"]["residual_norm"]
    assert found == pytest.approx(float(output.square().mean().sqrt()), rel=1e-4)
    assert found > 1.5


@pytest.mark.parametrize("name", ["data2vec", "cae", "lejepa"])
def test_other_methods_are_measured_too(name):
    """Those that are watched: a forward pass leaves a size, and means of the method's own."""
    config = load_config(ROOT / "configs" / f"{name}_cifar10.yaml", ["data.source=synthetic", "batch_size=8"])
    method = build_method(config)
    probe = OnlineProbe(method, 1, {}, {})
    draw = method.draw(8, 0, 0)
    sizes = [view.crop if isinstance(view.crop, tuple) else (view.crop, view.crop) for view in method.views()]
    images = [torch.randint(256, (8, *size, 3), dtype=torch.uint8) for size in sizes]
    if name == "cae":
        patches = method.patchify(images[0])
        method.losses(patches, torch.zeros(len(patches), dtype=torch.int64), draw)
    else:
        method(images, draw)
    probe.add(torch.arange(8))
    assert probe.read(1)["probe"]["residual_norm"] > 0


def test_of_a_frozen_teacher_nothing_is_said():
    """Its features are what they are; the last block of the trained encoder makes none of them."""
    method, said = small_ijepa(options=ijepa.Options(teacher="random")), []
    probe = OnlineProbe(method, 1, {}, {}, say=said.append)
    images = torch.zeros(40, 64, 64, 3, dtype=torch.uint8)  # all alike
    method(images, method.draw(40, 0, 0))
    probe.add(torch.arange(40))
    found = probe.read(1)["probe"]
    assert found["target_variance"] < collapse.LEAST_VARIANCE
    assert (found["collapsed"], found["fixed"]) == (False, True)
    assert "residual_norm" not in found
    assert said == []
    assert all(sign.beyond == "" for sign in collapse.signs(found, found["untrained"]))


def test_lidar_of_classes_that_hardly_repeat_is_left_out():
    method, labels = watched(PLACES), np.arange(64) % 40
    probe = OnlineProbe(method, 1, {"kind": labels}, {"kind": [str(i) for i in range(40)]})
    assert "lidar" not in watch(probe, method, *features_of(0.3, 1.0, images=64), 64, 1)["kind"]


def test_the_table_of_the_report_has_lidar_beside_the_untrained():
    now = HEALTHY | {"kind": {"lidar": 2.5, "accuracy": 0.4}, "untrained": {"kind": {"lidar": 3.0}}}
    told = {sign.name: sign for sign in collapse.signs(now, HEALTHY | {"kind": {"lidar": 3.0}})}
    assert told["LiDAR, kind"] == collapse.Sign("LiDAR, kind", 2.5, 3.0, "no threshold")


def test_log_and_report_of_a_run_show_it(finished_run):
    records = [json.loads(line) for line in (finished_run / "log.jsonl").read_text().splitlines()]
    probes = [record["probe"] for record in records if "probe" in record]
    assert {"rankme", "position_share", "residual_norm", "untrained"} <= probes[-1].keys()
    assert probes[0]["untrained"] == probes[-1]["untrained"]
    page = report(finished_run, count=8)
    for title in ("RankMe", "Share explained by place", "Size of the last block&#x27;s output", "LiDAR", "untrained"):
        assert title in page, title
