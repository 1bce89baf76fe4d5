"""The online probe: what it measures, what it costs, when it warns, and that a run is the same with and without it."""

import json
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("omegaconf")

from ijepa_fast.config import load_config
from ijepa_fast.eval.online import OnlineProbe
from ijepa_fast.run.build import build_method
from tests.launch import ROOT, losses, run
from tests.small import watched
from tests.test_train import state

WIDTH = 24


CLASSES = {"kind": ["a", "b", "c"]}


def make(every=10, images=2000):
    """A probe on a method that is only its `watch`, the labels of its images, and what it says."""
    g = np.random.default_rng(0)
    columns = {"kind": g.integers(0, 3, images), "metres": g.random(images)}
    method, said = watched(), []
    return OnlineProbe(method, every, columns, CLASSES, say=said.append), method, columns, said


def draw_of(images, places, lengths, device="cpu"):
    """What the probe reads of a draw: the place of each target patch, and how many each image has."""
    return SimpleNamespace(images=images, union_places=places.int().to(device), union_lengths=lengths.to(device))


def feed(probe, method, batch, indices, informed=None, seed=0, device="cpu"):
    """One batch, 2 to 5 of 16 places per image; features are noise and, `informed` by labels, kind and metres."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 6, (batch,), generator=g)
    image = torch.arange(batch).repeat_interleave(lengths)
    place = torch.cat([torch.randperm(16, generator=g)[:n].sort().values for n in lengths])
    features = torch.randn(len(image), WIDTH, generator=g)
    if informed is not None:
        features[:, :3] += 3 * torch.eye(3)[torch.from_numpy(informed["kind"][indices])][image]
        features[:, 3] += 20 * torch.from_numpy(informed["metres"][indices])[image]
    method.watch(features.to(device), draw_of(batch, place, lengths, device))
    probe.add(torch.from_numpy(indices))
    return features, lengths


def reading(informed=True, device="cpu"):
    """What a probe of ten batches of 100 images finds; it says nothing, and finds nothing earlier."""
    probe, method, columns, said = make()
    for step in range(1, 11):
        indices = np.arange(100 * (step - 1), 100 * step)
        feed(probe, method, 100, indices, columns if informed else None, step, device)
        found = probe.read(step)
        assert (found == {}) is (step < 10)
    assert not said
    return found["probe"]


def test_it_measures_what_the_features_say():
    found = reading()
    assert found["kind"]["accuracy"] > 0.9
    assert found["metres"]["r2"] > 0.5
    assert found["collapsed"] is False


def test_it_finds_nothing_in_noise():
    found = reading(informed=False)
    assert found["kind"]["accuracy"] < 0.5
    assert found["metres"]["r2"] < 0.1
    assert found["target_variance"] == pytest.approx(1, abs=0.05)
    assert found["rankme"] > 20


@pytest.mark.gpu
def test_on_a_gpu_it_measures_the_same():
    ours, cpus = reading(device="cuda"), reading()
    first, expected = ours.pop("untrained"), cpus.pop("untrained")
    assert first.pop("kind") == pytest.approx(expected.pop("kind"), rel=1e-3)
    assert first == pytest.approx(expected, rel=1e-3)
    kinds = ours.pop("kind"), cpus.pop("kind")
    assert kinds[0]["lidar"] == pytest.approx(kinds[1]["lidar"], rel=1e-3)
    assert kinds[0]["accuracy"] == pytest.approx(kinds[1]["accuracy"], abs=0.02)
    assert ours.pop("metres") == pytest.approx(cpus.pop("metres"), abs=1e-3)
    assert ours == pytest.approx(cpus, rel=1e-4)


def test_images_it_was_fitted_on_do_not_test_it():
    """Features that name the image, and images that come twice: nothing is learned by heart."""
    probe, method, _, _ = make(images=200)
    for batch in range(10):
        indices = torch.arange(40) + 40 * (batch % 5)
        method.watch(torch.eye(200)[indices], draw_of(40, torch.zeros(40), torch.ones(40, dtype=torch.int64)))
        probe.add(indices)
    assert probe.read(10)["probe"]["kind"]["accuracy"] < 0.6


def test_it_pools_over_the_targets_of_each_image():
    probe, method, _, _ = make()
    features, lengths = feed(probe, method, 8, np.arange(8))
    expected = [part.mean(0) for part in features.split(lengths.tolist())]
    torch.testing.assert_close(probe._pooled[0], torch.stack(expected))


@pytest.mark.parametrize("kind", ["point", "places"])
def test_it_warns_of_a_collapse_once(kind):
    """All features alike, or alike at the same place: whatever the images are."""
    probe, method, _, said = make(every=1)
    for step in range(1, 4):
        g = torch.Generator().manual_seed(7)
        by_place = torch.randn(16, WIDTH, generator=g) + (3 if kind == "point" else 0)
        place = torch.arange(16).repeat(40)
        features = by_place[place] if kind == "places" else by_place[:1].expand(640, -1)
        noise = 1e-4 * torch.randn(640, WIDTH, generator=g)
        method.watch(features + noise, draw_of(40, place, torch.full((40,), 16)))
        probe.add(torch.arange(40))
        found = probe.read(step)["probe"]
        assert found["collapsed"] is True
        assert found["target_variance"] < 1e-3
    assert len(said) == 1
    for word in ("step 1", "the targets have collapsed", "RankMe", "optim.lr", "optim.ema"):
        assert word in said[0]


@pytest.mark.parametrize(("every", "rank"), [(5, 1), (0, 0)], ids=["another rank", "every 0 steps"])
def test_what_is_not_probed(every, rank):
    method = watched()
    probe = OnlineProbe(method, every, {}, {}, rank)
    assert method.watch is None
    probe.add(torch.arange(3))
    assert probe.read(5) == {}


@pytest.mark.timing
def test_it_costs_less_than_a_hundredth_of_the_quickstart():
    """`watch` and `add` on every step and `read` on every hundredth, against the method's forward and backward."""
    config = load_config(ROOT / "configs" / "quickstart.yaml")
    assert config.probe.every == 100
    method = build_method(config)
    batch = config.batch_size
    g = np.random.default_rng(0)
    columns = {"kind": g.integers(0, 4, 4000), "count": g.integers(0, 6, 4000), "metres": g.random(4000)}
    classes = {"kind": list("abcd"), "count": list("123456")}
    images = torch.randint(0, 256, (batch, 64, 64, 3), dtype=torch.uint8)
    probe = OnlineProbe(method, config.probe.every, columns, classes)
    watch, method.watch = method.watch, None
    draws = [method.draw(batch, 0, step) for step in range(3)]
    targets = [method.targets(method.patchify(images), draw).detach() for draw in draws]
    step = min(_seconds(lambda draw=draw: method(images, draw)[0].backward()) for draw in draws)

    def window():
        for i in range(100):
            watch(targets[i % 3], draws[i % 3])
            probe.add(torch.from_numpy(g.integers(0, 4000, batch)))
        assert probe.read(100 * (1 + probe._last // 100))

    cost = min(_seconds(window) for _ in range(5))
    assert cost < 0.01 * 100 * step, f"{cost:.3f} s in 100 steps of {step:.3f} s: {cost / step:.2f} %"


def _seconds(function):
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def _probes(folder):
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {record["step"]: record["probe"] for record in records if "probe" in record}


@pytest.mark.slow
def test_a_run_is_the_same_with_and_without_it(tmp_path):
    """A run without it, resumed with it, against one that has it throughout: weights, moments, averages and figures."""
    pytest.importorskip("deepspeed")
    common = ("data.source=scenes", f"data.cache={tmp_path}", "data.scenes=40", "data.scenes_size=32", "optim.epochs=3")
    run(tmp_path, "name=late", "probe.every=0", "optim.steps=4", *common)
    late = run(tmp_path, "name=late", "probe.every=2", "optim.steps=8", *common)
    always = run(tmp_path, "name=always", "probe.every=2", "optim.steps=8", *common)
    assert losses(late) == losses(always)
    expected, found = state(always, 8), state(late, 8)
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    assert list(_probes(always)) == [2, 4, 6, 8]
    early = {step: figures for step, figures in _probes(always).items() if step > 4}
    for figures in early.values():  # what only the first steps could tell
        assert figures.pop("untrained")
    assert _without_advice(_probes(late)) == _without_advice(early)
    assert {"target_variance", "kind", "count", "distance", "metres"} <= _probes(late)[8].keys()


@pytest.mark.slow
def test_a_run_that_collapses_says_so(tmp_path):
    """Weights decayed to nothing leave the positions alone."""
    from tests.launch import finish, start

    ruin = ("optim.lr=1e-2", "optim.start_lr=1e-2", "optim.weight_decay=50", "optim.final_weight_decay=50")
    average = ("optim.ema=0.5", "optim.final_ema=0.5")
    statuses, errors = finish(start(tmp_path, *ruin, *average, "probe.every=10", "optim.steps=40"))
    assert statuses == [0]
    assert "the targets have collapsed" in errors
    last = list(_probes(tmp_path / "quickstart").values())[-1]
    assert last["collapsed"] is True
    assert last["target_variance"] < 0.01


def _without_advice(probes):
    """The figures alone: what is said of them may rest on the first images."""
    return {step: {name: f for name, f in figures.items() if name != "advice"} for step, figures in probes.items()}
