"""The heads and metrics of the evaluation: against scikit-learn on the same features, and on what they must learn."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("tqdm")

from ijepa_fast.eval.attentive import AttentiveProtocol, DenseFeatures, attentive_scores, fit_attentive
from ijepa_fast.eval.features import Standardiser, pooled_features
from ijepa_fast.eval.knn import knn_scores, nearest
from ijepa_fast.eval.linear import fit_linear, fit_logistic, fit_ridge
from ijepa_fast.eval.outputs import Outputs, measure, standard_errors
from ijepa_fast.eval.rankme import rankme
from ijepa_fast.eval.sweep import _LARS, PAPER, _factor, fit_head, fit_sweep


@pytest.fixture(scope="module")
def blobs():
    """Overlapping classes: features (800, 16) and (400, 16), labels of 4 classes, numbers."""
    g = torch.Generator().manual_seed(0)
    centres = torch.randn(4, 16, generator=g)
    labels = torch.randint(0, 4, (1200,), generator=g)
    features = centres[labels] + 1.2 * torch.randn(1200, 16, generator=g)
    numbers = features @ torch.randn(16, generator=g) + 0.5 * torch.randn(1200, generator=g)
    return features[:800], labels[:800], numbers[:800], features[800:], labels[800:], numbers[800:]


@pytest.mark.parametrize("decay", [1e-1, 1e-3])
def test_logistic_regression_is_scikit_learns(blobs, decay):
    from sklearn.linear_model import LogisticRegression

    x, y, _, x_test, *_ = blobs
    theirs = LogisticRegression(C=1 / (decay * len(x)), max_iter=2000, tol=1e-10).fit(x.double().numpy(), y.numpy())
    weight, bias = fit_logistic(x, y, 4, decay)
    expected = torch.from_numpy(theirs.predict_proba(x_test.double().numpy())).float()
    torch.testing.assert_close((x_test @ weight + bias).softmax(1), expected, atol=1e-3, rtol=0)
    torch.testing.assert_close(weight - weight.mean(1, keepdim=True), _centred(theirs.coef_), atol=5e-3, rtol=0)


def _centred(coefficients):
    weight = torch.from_numpy(coefficients).float().T
    return weight - weight.mean(1, keepdim=True)


@pytest.mark.parametrize("decay", [1.0, 1e-3])
def test_ridge_regression_is_scikit_learns(blobs, decay):
    from sklearn.linear_model import Ridge

    x, _, y, x_test, *_ = blobs
    weight, bias = dict(zip((10.0, decay), fit_ridge(x, y[:, None], (10.0, decay))))[decay]
    theirs = Ridge(alpha=decay * len(x)).fit(x.double().numpy(), y.double().numpy())
    expected = torch.from_numpy(theirs.predict(x_test.double().numpy())).float()
    torch.testing.assert_close((x_test @ weight + bias)[:, 0], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("k", [10, 200])
@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_knn_is_scikit_learns(blobs, k, temperature):
    from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor

    x, y, numbers, x_test, *_ = blobs
    options = {"metric": "cosine", "weights": lambda distance: np.exp(-distance / temperature)}
    votes = KNeighborsClassifier(k, **options).fit(x.numpy(), y.numpy())
    expected = torch.from_numpy(votes.predict_proba(x_test.numpy())).float()
    shares = knn_scores(x, F.one_hot(y).float(), x_test, (10, 200), temperature)[k]
    torch.testing.assert_close(shares, expected, atol=1e-4, rtol=0)
    average = KNeighborsRegressor(k, **options).fit(x.numpy(), numbers.numpy())
    expected = torch.from_numpy(average.predict(x_test.numpy())).float()
    means = knn_scores(x, numbers[:, None], x_test, (10, 200), temperature)[k]
    torch.testing.assert_close(means[:, 0], expected, atol=1e-3, rtol=1e-3)


def test_nearest_leaves_the_image_itself_out(blobs):
    from sklearn.neighbors import NearestNeighbors

    x = blobs[0]
    expected = NearestNeighbors(n_neighbors=6, metric="cosine").fit(x.numpy()).kneighbors(x[:5].numpy())[1][:, 1:]
    assert np.array_equal(nearest(x, torch.arange(5), 5).numpy(), expected)


@pytest.mark.parametrize("protocol", ["fast", "exact", "paper"])
def test_a_sweep_ends_where_scikit_learn_does(blobs, protocol):
    """The sweep's presets and the exact fit: as accurate as converged logistic regression, to 2 points."""
    from sklearn.linear_model import LogisticRegression

    x, y, _, x_test, y_test, _ = blobs
    best = LogisticRegression(max_iter=1000).fit(x.numpy(), y.numpy()).score(x_test.numpy(), y_test.numpy())
    if protocol == "paper":  # its batch is all of these images: with as many steps as it has on a million of them
        many = replace(PAPER, epochs=400, rates=(0.05, 0.001), decays=(0.0,))
        head = fit_sweep(x.repeat(16, 1), y.repeat(16), heads=("bn_linear",), protocol=many)
        assert head.rate == 0.05
    else:
        head = fit_head(x, y, protocol=protocol, heads=("linear", "bn_linear"))
    assert (head(x_test).argmax(1) == y_test).float().mean() > best - 0.02
    assert set(head.chosen) == {"head", "decay", "rate", "held_out"}


def test_the_papers_preset(blobs):
    """LARS, batch 16,384, 50 epochs, rates {.01, .05, .001}, decays {5e-4, 0}, a tenth every 15 epochs; and it runs."""
    assert (PAPER.optimizer, PAPER.batch, PAPER.epochs) == ("lars", 16384, 50)
    assert (set(PAPER.rates), set(PAPER.decays)) == ({0.01, 0.05, 0.001}, {5e-4, 0.0})
    assert [_factor(PAPER, step, 50) for step in (0, 14, 15, 29, 30, 45)] == pytest.approx([1, 1, 0.1, 0.1, 0.01, 1e-3])
    x, y, *_ = blobs
    assert fit_head(x, y, protocol="paper").rate in PAPER.rates


def test_lars_is_its_formula():
    """Two steps with momentum of two heads at once: trust * |w| / (|g| + decay |w|) scales weights, not biases."""
    g = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(2, 5, 3, generator=g), torch.randn(2, 1, 3, generator=g)
    ours, expected = [weight.clone(), bias.clone()], [[weight[i].clone(), bias[i].clone()] for i in range(2)]
    optimizer, velocity = _LARS(ours, PAPER), [[0.0, 0.0], [0.0, 0.0]]
    for _ in range(2):
        slopes = [torch.randn(2, 5, 3, generator=g), torch.randn(2, 1, 3, generator=g)]
        optimizer.step(ours, slopes, torch.tensor([0.5, 2.0]), torch.tensor([0.1, 0.0]))
        for i, (rate, decay) in enumerate(((0.5, 0.1), (2.0, 0.0))):
            w, slope = expected[i][0], slopes[0][i]
            trust = 0.001 * w.norm() / (slope.norm() + decay * w.norm())
            for place, update in enumerate((trust * (slope + decay * w), slopes[1][i])):
                velocity[i][place] = 0.9 * velocity[i][place] + rate * update
                expected[i][place] = expected[i][place] - velocity[i][place]
    for i in range(2):
        torch.testing.assert_close(ours[0][i], expected[i][0])
        torch.testing.assert_close(ours[1][i], expected[i][1])


def test_bn_head_reads_features_of_unequal_scale(blobs):
    x, y, _, x_test, y_test, _ = blobs
    scale = torch.logspace(-3, 2, 16)
    accuracy = {}
    for head in ("linear", "bn_linear"):
        fitted = fit_head(x * scale, y, heads=(head,))
        accuracy[head] = float((fitted(x_test * scale).argmax(1) == y_test).float().mean())
    assert accuracy["bn_linear"] > accuracy["linear"] + 0.1


def test_a_head_is_refitted_on_all_images(blobs):
    x, y, *_ = blobs
    head = fit_linear(x, y, heads=("bn_linear",), decays=(1e-2,))
    weight, bias = fit_logistic(Standardiser(x)(x), y, 4, 1e-2)
    torch.testing.assert_close(head.weight, weight, atol=1e-3, rtol=0)
    torch.testing.assert_close(head.bias, bias, atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("task", "predictions", "truth", "expected"),
    [
        ("classification", [1, 2, 8], [1, 2, 4], {"accuracy": 2 / 3}),
        ("counting", [1, 2, 8], [1, 2, 4], {"accuracy": 2 / 3, "mean_absolute_error": 4 / 3}),
        ("regression", [1.0, 2.0, 4.0], [1.0, 2.0, 3.0], {"r2": 0.5, "mean_absolute_error": 1 / 3}),
    ],
    ids=["classification", "counting", "regression"],
)
def test_metrics(task, predictions, truth, expected):
    assert measure(torch.tensor(predictions), torch.tensor(truth), task) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("task", "labels", "truth", "expected"),
    [
        ("classification", [7, 7, 3], [7, 3, 3, 3], {"accuracy": 0.25}),
        ("counting", [4, 1, 4], [4, 4, 1, 1], {"accuracy": 0.5, "mean_absolute_error": 1.5}),
        ("regression", [1.0, 3.0], [1.0, 3.0], {"r2": 0.0, "mean_absolute_error": 1.0}),
    ],
    ids=["classification", "counting", "regression"],
)
def test_chance_is_the_commonest_class_or_the_mean(task, labels, truth, expected):
    assert Outputs(task, torch.tensor(labels)).chance(torch.tensor(truth)) == pytest.approx(expected)


def test_pooled_features_are_means_of_patches_and_layers():
    images = torch.randint(0, 256, (5, 4, 4, 3), dtype=torch.uint8)
    batches = [(images[:3], torch.tensor([4, 0, 2])), (images[3:], torch.tensor([1, 3]))]
    dense = lambda x: x.view(len(x), 16, 3).float()  # noqa: E731
    features, rows = pooled_features(lambda x: [dense(x), 2 * dense(x)], batches)
    assert torch.equal(rows, torch.tensor([4, 0, 2, 1, 3]))
    torch.testing.assert_close(features, torch.cat([dense(images).mean(1), 2 * dense(images).mean(1)], 1))


def _hidden_mark(count, seed):
    """Patch features (count, 9, 8) of which the one that bears a mark says the class, the others any."""
    g = torch.Generator().manual_seed(seed)
    marked, classes = torch.randint(0, 9, (count,), generator=g), torch.randint(0, 3, (count, 9), generator=g)
    dense = torch.cat([F.one_hot(classes, 3).float(), 0.1 * torch.randn(count, 9, 5, generator=g)], 2)
    dense[torch.arange(count), marked, 7] += 3
    return dense, classes[torch.arange(count), marked]


@pytest.mark.parametrize("room", [1 << 30, 0], ids=["kept", "encoded anew"])
def test_attentive_probe_finds_the_patch_that_says_it(room):
    """Where averaging cannot: and the same whether features are kept in memory or encoded anew."""
    dense, labels = _hidden_mark(1100, 0)
    calls = []

    def batches(rows, batch):
        calls.append(len(rows))
        for first in range(0, len(rows), batch):
            part = torch.from_numpy(rows[first : first + batch])
            yield dense[part], part

    rows, test = np.arange(800), np.arange(800, 1100)
    kept = DenseFeatures(lambda x: x, batches, rows, "cpu", room)
    outputs = Outputs("classification", labels[:800])
    protocol = AttentiveProtocol(rates=(1e-2, 1e-5), epochs=1, least_steps=120)
    head, chosen = fit_attentive(kept, rows, outputs, 2, protocol)
    scores, found = attentive_scores(head, DenseFeatures(lambda x: x, batches, test, "cpu", room), test)
    assert (outputs.decode(scores) == labels[found]).float().mean() > 0.9
    assert chosen["rate"] == 1e-2
    assert (len(calls) > 6) is (room == 0)
    averaged = fit_head(dense[:800].mean(1), labels[:800], protocol="exact")(dense[800:].mean(1))
    assert (averaged.argmax(1) == labels[800:]).float().mean() < 0.7


def test_attentive_probe_regresses_in_the_units_of_the_labels():
    dense, labels = _hidden_mark(600, 1)
    rows = np.arange(600)
    source = lambda rows, batch: [(dense[rows], torch.from_numpy(rows))]  # noqa: E731
    outputs = Outputs("regression", 100.0 + 10 * labels.double())
    kept = DenseFeatures(lambda x: x, source, rows, "cpu")
    head, _ = fit_attentive(kept, rows, outputs, 2, AttentiveProtocol(rates=(1e-2,), epochs=1, least_steps=120))
    scores, _ = attentive_scores(head, kept, rows)
    assert measure(outputs.decode(scores), outputs.labels, "regression")["r2"] > 0.8


@pytest.mark.parametrize("rank", [1, 5, 64])
def test_rankme_counts_directions(rank):
    basis = torch.linalg.qr(torch.randn(64, 64))[0]
    features = torch.linalg.qr(torch.randn(300, rank))[0] @ basis[:rank]
    assert rankme(features) == pytest.approx(rank, rel=1e-3)
    assert rankme(features.T) == pytest.approx(rank, rel=1e-3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"protocol": "slow"}, "protocol: expected one of .*'slow'"),
        ({"heads": ("mlp",)}, r"heads: expected of .*\['mlp'\]"),
        ({"heads": ()}, "heads: expected some of"),
    ],
    ids=["protocol", "head", "no head"],
)
def test_heads_that_do_not_exist_are_named(blobs, options, words):
    x, y, *_ = blobs
    with pytest.raises(ValueError, match=words):
        fit_head(x, y, **options)


@pytest.mark.parametrize("task", ["classification", "counting", "regression"])
def test_standard_errors_are_those_of_drawing_the_test_images_again(task):
    generator = torch.Generator().manual_seed(0)
    truth = torch.randint(5, (400,), generator=generator).double()
    predictions = truth + torch.randn(400, generator=generator).double()
    if task != "regression":
        predictions = predictions.round()
    draws = torch.randint(400, (2000, 400), generator=generator)
    again = [measure(predictions[rows], truth[rows], task) for rows in draws]
    errors = standard_errors(predictions, truth, task)
    assert set(errors) == set(again[0])
    for name, error in errors.items():
        spread = torch.tensor([found[name] for found in again], dtype=torch.float64).std()
        assert error == pytest.approx(float(spread), rel=0.08)
