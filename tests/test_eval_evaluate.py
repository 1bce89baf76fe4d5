"""The evaluation: any function from images to features, on images with any labels, gives figures."""

from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("nvidia.dali")

from PIL import Image

from ijepa_fast.eval.evaluate import Options, evaluate
from ijepa_fast.eval.labels import open_labelled

SIDE = 16
COUNTS = (1, 2, 4, 8)


def colours(images):
    """Features (b, N, 3) of images (b, H, W, 3): the colours of the pixels."""
    return images.flatten(1, 2).float()


def class_token(images):
    """One feature vector per image, (b, 1, 3)."""
    return colours(images).mean(1, keepdim=True)


def noise(images):
    """Features (b, 1, 8) that say nothing, drawn by the images."""
    generator = torch.Generator().manual_seed(int(images.long().sum()))
    return torch.randn(len(images), 1, 8, generator=generator)


def write(root, each, seed):
    """Images of four colours, red, green, blue and grey, which say the kind, the count, and the metres nearly."""
    generator = np.random.default_rng(seed)
    root.mkdir()
    lines = ["file,kind,count,metres"]
    for i in range(4 * each):
        image = generator.integers(0, 60, (SIDE, SIDE, 4))
        image[..., i % 4] += 180
        Image.fromarray(image[..., :3].astype(np.uint8)).save(root / f"{i:03d}.png")
        metres = i % 4 + 0.2 * generator.random() + 0.001
        lines.append(f"{i:03d}.png,{'warm' if i % 4 < 2 else 'cold'},{COUNTS[i % 4]},{metres}")
    (root / "labels.csv").write_text("\n".join(lines) + "\n")
    return open_labelled(root)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """80 training images and 40 test images."""
    root = tmp_path_factory.mktemp("data")
    return write(root / "train", 20, 0), write(root / "test", 10, 1)


@pytest.fixture(scope="module")
def figures(data):
    return evaluate(colours, *data, Options(crop=SIDE))


def test_every_label_probe_and_metric_has_a_figure(figures):
    metrics = {
        "kind": ["accuracy"],
        "count": ["accuracy", "mean_absolute_error"],
        "metres": ["r2", "mean_absolute_error"],
    }
    expected = [(t, p, m) for t, kinds in metrics.items() for p in ("linear", "10-NN", "20-NN") for m in kinds]
    assert [(f.task, f.probe, f.metric) for f in figures] == expected
    assert {f.n for f in figures} == {40}
    assert {len(f.seeds) for f in figures} == {1}
    assert {f.untrained for f in figures} == {None}


@pytest.mark.parametrize(
    ("task", "metric", "chance", "least"),
    [("kind", "accuracy", 0.5, 1.0), ("count", "accuracy", 0.25, 1.0), ("metres", "r2", 0.0, 0.95)],
)
@pytest.mark.parametrize("probe", ["linear", "20-NN"])
def test_they_measure_what_the_features_say(figures, probe, task, metric, chance, least):
    (figure,) = (f for f in figures if (f.task, f.probe, f.metric) == (task, probe, metric))
    assert figure.chance == pytest.approx(chance, abs=0.01)
    assert figure.value >= least


def test_a_class_token_is_read_like_patches(data, figures):
    assert evaluate(class_token, *data, Options(crop=SIDE)) == figures


def test_images_are_drawn_by_a_seed(data):
    def some(seed):
        return evaluate(noise, *data, Options(crop=SIDE, images=20, draw_seed=seed, probes=("knn",)))

    assert {f.n for f in some(0)} == {20}
    assert [f.probe for f in some(0) if f.task == "kind"] == ["10-NN", "20-NN"]
    assert some(0) == some(0)
    assert some(0) != some(1)


def test_a_count_that_was_not_trained_on_is_wrong(data, tmp_path):
    """A head cannot answer it; the evaluation goes on."""
    train, _ = data
    path = tmp_path / "test"
    path.mkdir()
    for i in range(2):
        Image.new("RGB", (SIDE, SIDE), (210, 30, 30)).save(path / f"{i}.png")
    (path / "labels.csv").write_text("file,kind,count,metres\n0.png,warm,1,0.5\n1.png,warm,7,0.5\n")
    found = evaluate(colours, train, open_labelled(path), Options(crop=SIDE, probes=("linear",)))
    assert [f.value for f in found if (f.task, f.metric) == ("count", "accuracy")] == [0.5]


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"features": ("last4",)}, "last4"),
        ({"probes": ("attentive",)}, "attentive"),
        ({"probes": ("finetune",)}, "finetune"),
    ],
    ids=["layers", "attention heads", "weights"],
)
def test_a_function_is_not_enough_for_every_probe(data, options, name):
    with pytest.raises(ValueError, match=f"{name}: expected an encoder as ijepa_fast.load gives, got a function"):
        evaluate(colours, *data, Options(crop=SIDE, **options))


def test_each_seed_has_a_share_and_held_out_images_of_its_own(data):
    train, test = data
    train = replace(train, tasks={"kind": "classification"})
    options = Options(crop=SIDE, probes=("lowshot", "linear"), seeds=3, share=0.3, protocol="exact")
    low, linear = evaluate(noise, train, test, options)
    assert (low.probe, linear.probe) == ("low-shot 0.3 of labels, linear", "linear")
    assert len({run["held_out"] for run in linear.chosen}) > 1
    assert len(set(low.seeds)) > 1
    assert low.interval > 0
    assert low.value == pytest.approx(np.mean(low.seeds))


def labelled(root, rows):
    """Small images with the labels kind and metres."""
    root.mkdir()
    lines = ["file,kind,metres"]
    for i, (kind, metres) in enumerate(rows):
        Image.new("RGB", (SIDE, SIDE), (i, 10, 20)).save(root / f"{i:03d}.png")
        lines.append(f"{i:03d}.png,{kind},{metres}")
    (root / "labels.csv").write_text("\n".join(lines) + "\n")
    return open_labelled(root)


MIXED = [("ab"[i % 2], i + 0.5) for i in range(12)]


@pytest.mark.parametrize("side", ["train", "test"])
def test_a_label_that_is_the_same_for_all_images_of_a_part_is_left_out(tmp_path, capsys, side):
    parts = {"train": MIXED, "test": MIXED} | {side: [(kind, 2.5) for kind, _ in MIXED]}
    given = [labelled(tmp_path / name, rows) for name, rows in parts.items()]
    figures = evaluate(colours, *given, Options(crop=SIDE, probes=("knn",)))
    assert {f.task for f in figures} == {"kind"}
    said = f"{tmp_path}/{side}: all images have the same metres, which is left out\n"
    assert capsys.readouterr().err.count(said) == 1


@pytest.mark.parametrize(
    ("train", "test", "words"),
    [
        (MIXED, [("a", 1.5)] * 4, "/test: all test images have the same kind, metres"),
        (MIXED, MIXED[:1], "/test: expected at least two images to test on, got 1"),
        (
            [(kind, 1.5) for kind, _ in MIXED],
            [("a", m) for _, m in MIXED],
            "a probe needs a label that differs in both",
        ),
    ],
    ids=["test labels", "one test image", "each in one part"],
)
def test_images_that_no_label_can_be_measured_on_are_refused(tmp_path, train, test, words):
    parts = [labelled(tmp_path / name, rows) for name, rows in (("train", train), ("test", test))]
    with pytest.raises(ValueError, match=words):
        evaluate(lambda images: pytest.fail("encoded"), *parts, Options(crop=SIDE))


def test_no_share_is_drawn_of_a_label_that_leaves_one_image(tmp_path):
    """One in a hundred of twelve images of one class is one image, of which no head can be fitted."""
    rows = [("a", metres) for _, metres in MIXED]
    parts = [labelled(tmp_path / name, rows) for name in ("train", "test")]
    options = Options(crop=SIDE, probes=("lowshot",))
    with pytest.raises(ValueError, match=r"^--probes lowshot: no figure, as .* take classes"):
        evaluate(lambda images: pytest.fail("encoded"), *parts, options)
