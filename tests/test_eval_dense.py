"""Dense probes: against scikit-learn on the same patches and pixels, where maps lie under a crop, and bad maps."""

import copy
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("nvidia.dali")

from PIL import Image

from ijepa_fast.data.central import eval_batches
from ijepa_fast.data.label_map import LabelMap
from ijepa_fast.eval import dense
from ijepa_fast.eval.dense import Places, Tally, by_place, draw_patches, open_places, probe_places, ratio_terms
from ijepa_fast.eval.evaluate import Options, evaluate
from ijepa_fast.eval.features import Standardiser
from ijepa_fast.eval.labels import open_labelled
from ijepa_fast.eval.sweep import fit_head
from ijepa_fast.interop.load import PretrainedEncoder
from ijepa_fast.interop.weights import Arch
from ijepa_fast.models.initial import init_weights
from ijepa_fast.models.vit import Encoder

ARCH = Arch(image_size=32, patch=8, dim=32, depth=2, heads=2)
COLOURS = np.array([[200, 40, 40], [40, 200, 40], [40, 40, 200]])


def write(root, count, seed, name="train"):
    """Images of three colours in rectangles, with maps of the colours and of numbers that rise down and by colour."""
    rng = np.random.default_rng(seed)
    for part in ("images", "classes", "metres"):
        (root / name / part).mkdir(parents=True)
    for i in range(count):
        classes = np.ones((32, 32), np.uint8)
        for value in (2, 3):
            y, x = rng.integers(0, 20, 2)
            classes[y : y + rng.integers(8, 24), x : x + rng.integers(8, 24)] = value
        pixels = COLOURS[classes - 1] + rng.integers(-30, 30, (32, 32, 3))
        metres = (classes + np.linspace(1, 3, 32)[:, None]).astype(np.float32)
        metres[:3] = 0  # no number there
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / name / "images" / f"{i:02d}.png")
        Image.fromarray(np.where(rng.random((32, 32)) < 0.05, 0, classes).astype(np.uint8)).save(
            root / name / "classes" / f"{i:02d}.png"
        )
        np.save(root / name / "metres" / f"{i:02d}.npy", metres)
    return root / name


def open_part(folder):
    maps = {"segmentation": str(folder / "classes"), "depth": str(folder / "metres")}
    return open_labelled(folder / "images", maps=maps)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    root = tmp_path_factory.mktemp("dense")
    return open_part(write(root, 12, 0)), open_part(write(root, 6, 1, "test"))


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return PretrainedEncoder(Encoder(**ARCH.encoder_options()).apply(init_weights), ARCH)


OPTIONS = Options(crop=32, probes=("segmentation", "depth"), protocol="exact", batch_size=8)


@pytest.fixture(scope="module")
def figures(parts, encoder):
    return {(f.task, f.probe, f.metric): f for f in evaluate(encoder, *parts, OPTIONS)}


def patches_of(parts, encoder, probe):
    """Features and targets of the training patches that have one; features (m, N, D) and pixels of the test images."""
    train, test = parts
    rows = np.arange(len(train.source)), np.arange(len(test.source))
    places = open_places(train.maps[probe], test.maps[probe], rows, (32, 32), (32, 32), ARCH.grid)
    images = [
        torch.from_numpy(np.stack([np.array(Image.open(part.source.name(i))) for i in range(n)]))
        for part, n in ((train, len(rows[0])), (test, len(rows[1])))
    ]
    x, x_test = (encoder.dense(batch) for batch in images)
    known = places.known(places.targets)
    return x[known], places.targets[known], x_test, places.pixels(rows[1].tolist())


def at_pixels(scores, images):
    """Scores (m * N, C) of patches -> (m, H, W, C), by PyTorch's own resampling."""
    grids = torch.as_tensor(scores).float().view(images, 4, 4, -1).permute(0, 3, 1, 2)
    return F.interpolate(grids, (32, 32), mode="bilinear", align_corners=False).permute(0, 2, 3, 1)


def test_segmentation_is_scikit_learns(parts, encoder, figures):
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import accuracy_score, jaccard_score
    from sklearn.neighbors import KNeighborsClassifier

    x, y, x_test, truth = patches_of(parts, encoder, "segmentation")
    linear = figures["segmentation", "linear", "mean_iou"]
    (chosen,) = linear.chosen
    standardise = Standardiser(x, per_feature=chosen["head"] == "bn_linear")
    head = LogisticRegression(C=1 / (chosen["decay"] * len(x)), max_iter=5000, tol=1e-9)
    head.fit(standardise(x).double().numpy(), y.numpy())
    scores = {"linear": head.decision_function(standardise(x_test).flatten(0, 1).double().numpy())}
    standardise = Standardiser(x)
    neighbours = KNeighborsClassifier(20, metric="cosine", weights=lambda d: np.exp(-d / 0.07))
    neighbours.fit(standardise(x).numpy(), y.numpy())
    scores["20-NN"] = neighbours.predict_proba(standardise(x_test).flatten(0, 1).numpy())
    known = truth >= 0
    for probe, of_patches in scores.items():
        answers = at_pixels(of_patches, len(x_test)).argmax(3)[known]
        iou = jaccard_score(truth[known], answers, average="macro")
        assert figures["segmentation", probe, "mean_iou"].value == pytest.approx(iou, abs=4e-3)
        right = accuracy_score(truth[known], answers)
        assert figures["segmentation", probe, "accuracy"].value == pytest.approx(right, abs=4e-3)
    assert linear.value > linear.chance + 0.1
    assert linear.n == 6


def test_depth_is_scikit_learns(parts, encoder, figures):
    from sklearn.linear_model import Ridge
    from sklearn.metrics import mean_absolute_error, r2_score

    x, y, x_test, truth = patches_of(parts, encoder, "depth")
    figure = figures["depth", "linear", "r2"]
    (chosen,) = figure.chosen
    standardise = Standardiser(x, per_feature=chosen["head"] == "bn_linear")
    head = Ridge(alpha=chosen["decay"] * len(x)).fit(standardise(x).double().numpy(), y.double().numpy())
    answers = at_pixels(head.predict(standardise(x_test).flatten(0, 1).double().numpy()), len(x_test))[..., 0]
    known = truth > 0
    assert not known[:, :3].any()
    assert figure.value == pytest.approx(r2_score(truth[known], answers[known]), abs=1e-3)
    error = mean_absolute_error(truth[known], answers[known])
    assert figures["depth", "linear", "mean_absolute_error"].value == pytest.approx(error, abs=1e-3)
    # The place alone tells the rise, not the colour's part.
    assert 0.1 < figure.chance < figure.value


def test_every_figure_has_an_error_and_terms(figures):
    assert {key[:2] for key in figures} == {(t, p) for t in ("segmentation", "depth") for p in ("linear", "20-NN")}
    for figure in figures.values():
        assert figure.error > 0
        assert figure.terms.shape == (6,)
        assert figure.terms.mean() == pytest.approx(figure.value)
        assert figure.error == pytest.approx(figure.terms.std() / 6**0.5)


def test_chance_is_what_the_place_tells(parts):
    """Maps that are the same for all images are known by heart."""
    test = parts[1].maps["segmentation"]
    targets = torch.tensor([[0, 1, 1, 0]] * 3)
    places = Places((np.arange(3), np.arange(3)), test, (2, 2), (4, 4), (4, 4), np.array([1, 2]), targets)
    drawn = draw_patches([(torch.randn(3, 4, 5), torch.arange(3))], places)
    assert torch.equal(by_place(drawn, places).argmax(1), targets[0])
    tally = Tally(places)
    truth = targets.view(3, 2, 2).repeat_interleave(2, 1).repeat_interleave(2, 2)
    tally.add(F.one_hot(targets, 2).float(), truth)
    assert tally.measured()["accuracy"] == tally.measured()["mean_iou"] == 1


def test_few_patches_are_drawn_of_every_image(parts):
    train, test = parts
    rows = np.arange(12), np.arange(6)
    places = open_places(train.maps["depth"], test.maps["depth"], rows, (32, 32), (32, 32), (4, 4))
    features = torch.arange(12.0)[:, None, None].expand(12, 16, 3)
    drawn = draw_patches([(features, torch.arange(12))], places, most=36)
    assert drawn.images.bincount().tolist() == [3] * 12
    assert torch.equal(drawn.features[:, 0].long(), drawn.images)
    assert torch.equal(drawn.targets, places.targets[drawn.images, drawn.cells])
    assert not torch.equal(drawn.cells, draw_patches([(features, torch.arange(12))], places, 1, 36).cells)


def test_held_out_patches_are_of_other_images():
    from ijepa_fast.eval.linear import split

    groups = torch.arange(40).repeat_interleave(5)[torch.randperm(200)]
    kept, held = split(200, 0.1, 0, groups=groups)
    assert len(held) == 20
    assert sorted([*kept.tolist(), *held.tolist()]) == list(range(200))
    assert not set(groups[kept].tolist()) & set(groups[held].tolist())


def test_a_ratio_moves_as_its_terms():
    rng = np.random.default_rng(0)
    wholes = rng.integers(5, 50, 400).astype(float)
    parts = wholes * rng.random(400)
    terms = ratio_terms(torch.from_numpy(parts), torch.from_numpy(wholes)).numpy()
    assert terms.mean() == pytest.approx(parts.sum() / wholes.sum())
    drawn = rng.integers(0, 400, (2000, 400))
    again = parts[drawn].sum(1) / wholes[drawn].sum(1)
    assert terms.std() / 20 == pytest.approx(again.std(), rel=0.06)


@pytest.mark.parametrize(
    ("shape", "crop", "cover"), [((40, 60), 16, 20), ((64, 48), 32, 32), ((50, 50), (16, 24), (16, 24))]
)
@pytest.mark.parametrize("finer", [1, 2])
def test_a_map_lies_under_the_crop_where_the_image_does(tmp_path, shape, crop, cover, finer):
    """An image that shows its own map, cropped as an evaluation crops it; a map may be finer than the image."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(1, 5, (-(-shape[0] // 10), -(-shape[1] // 10)))
    classes = coarse.repeat(10, 0).repeat(10, 1)[: shape[0], : shape[1]]
    (tmp_path / "images").mkdir()
    Image.fromarray((classes * 50).astype(np.uint8)[..., None].repeat(3, 2)).save(tmp_path / "images" / "a.png")
    (tmp_path / "maps").mkdir()
    np.save(tmp_path / "maps" / "a.npy", classes.repeat(finer, 0).repeat(finer, 1))
    source = open_labelled(tmp_path / "images", maps={"segmentation": str(tmp_path / "maps")}).source
    ((image, _),) = eval_batches(source, batch_size=1, crop=crop, resize=cover)
    size = (crop, crop) if isinstance(crop, int) else crop
    found = LabelMap(source, str(tmp_path / "maps")).crop(0, size, (cover, cover) if isinstance(cover, int) else cover)
    assert found.shape == size
    shown = image[0, ..., 0].numpy() / 50
    flat = np.abs(shown - np.rint(shown)) < 0.02  # where resampling has mixed nothing
    assert flat.mean() > 0.4
    inside = np.ones(size, bool)
    for axis in (0, 1):  # not beside an edge, where rounding may take either side
        inside &= (found == np.roll(found, 1, axis)) & (found == np.roll(found, -1, axis))
    assert (flat & inside).mean() > 0.3
    assert (found == np.rint(shown))[flat & inside].all()


def test_windows_have_their_part_of_the_map(tmp_path):
    from ijepa_fast.data.reading import Reading

    np.save(tmp_path / "scene.npy", np.random.default_rng(0).integers(0, 255, (64, 96, 3), dtype=np.uint8))
    classes = np.arange(1, 7).reshape(2, 3).repeat(8, 0).repeat(8, 1)
    np.save(tmp_path / "map.npy", classes)
    part = open_labelled(
        tmp_path / "scene.npy", reading=Reading(window=32), maps={"segmentation": str(tmp_path / "map.npy")}
    )
    crops = [part.maps["segmentation"].crop(row, (4, 4), (4, 4)) for row in range(6)]
    assert [np.unique(crop).tolist() for crop in crops] == [[1], [2], [3], [4], [5], [6]]


def bad(parts, tmp_path, change):
    """`evaluate`'s error where `change` has spoilt the test maps or the training maps."""
    folder = tmp_path / "maps"
    folder.mkdir()
    which, array = change
    part = parts[which]
    for i in range(len(part.source)):
        np.save(folder / f"{i:02d}.npy", array(i))
    maps = part.maps | {"segmentation": LabelMap(part.source, str(folder))}
    given = [replace(p, maps=maps) if p is part else p for p in parts]
    return given


def of(value, shape=(32, 32)):
    return np.full(shape, value, np.uint8)


BAD = {
    "one class": ((0, lambda i: of(2)), ["expected two classes or more over 12 training images", "found 2 alone"]),
    "nothing": ((0, lambda i: of(0)), ["expected two classes or more", "only 0"]),
    "a class that was not trained on": ((1, lambda i: of(9)), ["class 9, over", "not among the 3"]),
    "no test label": ((1, lambda i: of(0)), ["expected labels over 6 test images"]),
    "another shape": ((1, lambda i: of(1, (32, 48))), ["expected a map of the shape of", "32 x 32", "found 32 x 48"]),
    "three channels": ((0, lambda i: of(1, (32, 32, 3))), ["expected one map, found 32 in an array"]),
    "half a class": ((0, lambda i: np.full((32, 32), 0.5, np.float32)), ["whole numbers, 0 for none"]),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_map_is_said_before_an_image_is_encoded(parts, tmp_path, case):
    change, words = BAD[case]
    given = bad(parts, tmp_path, change)

    class Never:
        arch = ARCH

        def layers(self, images, count):
            raise AssertionError

        def __call__(self, images):
            raise AssertionError

    with pytest.raises(ValueError) as error:
        evaluate(Never(), *given, OPTIONS)
    for word in words:
        assert word in str(error.value)


def test_a_missing_map_is_named(parts, encoder, tmp_path):
    train, test = parts
    (tmp_path / "none").mkdir()
    empty = replace(test, maps=test.maps | {"segmentation": LabelMap(test.source, str(tmp_path / "none"))})
    with pytest.raises(ValueError, match="expected a map named 00"):
        evaluate(encoder, train, empty, OPTIONS)
    with pytest.raises(ValueError, match=r"--probes segmentation: expected a map over each image.*--label-map"):
        evaluate(encoder, train, replace(test, maps={}), OPTIONS)


def test_an_encoder_of_another_resolution_is_said(parts, encoder):
    with pytest.raises(ValueError, match="crop: expected 32 x 32 pixels, which the encoder takes, got 64 x 64"):
        evaluate(encoder, *parts, replace(OPTIONS, crop=64))


def test_images_of_other_channels_are_said(parts, encoder):
    train, test = parts
    four = replace(test, source=copy.copy(test.source))
    four.source.reading = replace(test.source.reading, channels=4)
    with pytest.raises(ValueError, match="expected images of 3 channels of uint8, which the encoder takes, found 4"):
        evaluate(encoder, train, four, OPTIONS)


def test_a_class_of_few_pixels_has_scores_too(parts, encoder, tmp_path):
    """A class that no patch has most of: heads lack it, and measuring goes on."""
    folder = tmp_path / "maps"
    folder.mkdir()
    for i in range(12):
        classes = of(1 + i % 2)
        classes[0, 0] = 7
        np.save(folder / f"{i:02d}.npy", classes)
    given = [replace(p, maps={"segmentation": LabelMap(p.source, str(folder))}) for p in parts]
    found = evaluate(encoder, *given, replace(OPTIONS, probes=("segmentation",)))
    assert {f.probe for f in found} == {"linear", "20-NN"}
    assert all(0 <= f.value <= 1 for f in found)


def test_patches_of_an_encoder_that_is_read_by_its_class_token(parts):
    arch = replace(ARCH, class_token=True, readout="class")
    torch.manual_seed(0)
    model = PretrainedEncoder(Encoder(**arch.encoder_options()).apply(init_weights), arch)
    assert model(torch.zeros(1, 32, 32, 3, dtype=torch.uint8)).shape == (1, 1, 32)
    found = evaluate(model, *parts, replace(OPTIONS, probes=("segmentation",)))
    assert found[0].value > found[0].chance


def test_seeds_and_batches_change_little(parts, encoder, figures, monkeypatch):
    monkeypatch.setattr(dense, "_BATCH", 4)
    monkeypatch.setattr(dense, "_ELEMENTS", 1)
    again = {f.key: f for f in evaluate(encoder, *parts, replace(OPTIONS, seeds=2))}
    for key, figure in figures.items():
        assert again[key].seeds[0] == pytest.approx(figure.value, abs=1e-6)
    assert len(again["segmentation", "linear", "mean_iou"].seeds) == 2


def test_probe_places_takes_any_features(parts, encoder):
    """Features that are the answer give all pixels of whole patches."""
    train, test = parts
    rows = np.arange(12), np.arange(6)
    places = open_places(train.maps["segmentation"], test.maps["segmentation"], rows, (32, 32), (32, 32), (4, 4))
    of_test = open_places(
        test.maps["segmentation"], test.maps["segmentation"], (rows[1], rows[1]), (32, 32), (32, 32), (4, 4)
    )

    class Answers:
        def __init__(self, targets):
            self.targets = targets

        def read(self, rows, batch):
            yield F.one_hot(self.targets[rows], 3).float(), torch.from_numpy(rows)

    fit = partial(fit_head, protocol="exact")
    found = probe_places(Answers(places.targets), Answers(of_test.targets), places, fit)
    assert found["linear"][0]["accuracy"] > 0.8
    assert found["20-NN"][0]["accuracy"] > 0.8
