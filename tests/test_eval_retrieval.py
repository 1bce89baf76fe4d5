"""Retrieval and few-shot episodes: against scikit-learn, and what guessing gives."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ijepa_fast.eval import retrieval
from ijepa_fast.eval.episodes import episode_accuracies
from ijepa_fast.eval.retrieval import average_precisions, expected_at_random


@pytest.fixture(scope="module")
def blobs():
    """Overlapping classes of uneven size: features (200, 8), labels; 60 more."""
    g = torch.Generator().manual_seed(0)
    labels = torch.tensor([0] * 120 + [1] * 60 + [2] * 20 + [0] * 25 + [1] * 20 + [2] * 15)
    features = torch.randn(3, 8, generator=g)[labels] + 1.5 * torch.randn(260, 8, generator=g)
    return features[:200], labels[:200], features[200:], labels[200:]


def test_average_precision_is_scikit_learns(blobs, monkeypatch):
    from sklearn.metrics import average_precision_score

    x, y, queries, labels = blobs
    similarity = F.normalize(queries, dim=1) @ F.normalize(x, dim=1).T
    expected = [average_precision_score((y == c).numpy(), row.numpy()) for row, c in zip(similarity, labels)]
    found = average_precisions(x, y, queries, labels)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)
    monkeypatch.setattr(retrieval, "_ELEMENTS", 1)  # a query at a time
    torch.testing.assert_close(average_precisions(x, y, queries, labels), found)


def test_a_query_without_an_image_of_its_class_has_none(blobs):
    x, y, queries, _ = blobs
    assert average_precisions(x, y, queries[:2], torch.tensor([1, 9])).isnan().tolist() == [False, True]


def test_guessing_ranks_as_expected(blobs):
    _, y, _, labels = blobs
    torch.manual_seed(0)
    found = [average_precisions(torch.randn(200, 8), y, torch.randn(60, 8), labels).mean() for _ in range(30)]
    assert expected_at_random(y, labels) == pytest.approx(float(torch.stack(found).mean()), rel=0.02)
    assert expected_at_random(torch.zeros(5), torch.zeros(2)) == pytest.approx(1.0)


@pytest.mark.parametrize("shots", [1, 5])
def test_an_episode_is_scikit_learns_nearest_centroid(blobs, shots):
    from sklearn.neighbors import NearestCentroid

    x, y, queries, labels = blobs
    ways, found = episode_accuracies(x, y, queries, labels, 3, shots, episodes=20, queries=4, seed=1)
    assert ways == 3
    mean = x.mean(0)
    unit, unit_queries = (F.normalize(part - mean, dim=1).numpy() for part in (x, queries))
    rng = np.random.default_rng([1, shots])
    for accuracy in found:
        chosen = rng.permutation(3)
        support = [rng.permutation(np.flatnonzero(y == c))[:shots] for c in chosen]
        asked = np.concatenate([rng.permutation(np.flatnonzero(labels == c))[:4] for c in chosen])
        head = NearestCentroid().fit(unit[np.concatenate(support)], np.repeat(chosen, shots))
        assert accuracy == pytest.approx((head.predict(unit_queries[asked]) == labels[asked].numpy()).mean())


def test_more_shots_are_better_and_noise_is_chance(blobs):
    x, y, queries, labels = blobs
    one, five = (episode_accuracies(x, y, queries, labels, 2, shots)[1] for shots in (1, 5))
    assert five.mean() > one.mean() > 0.5
    noise = episode_accuracies(torch.randn_like(x), y, torch.randn_like(queries), labels, 2, 1)[1]
    assert noise.mean() == pytest.approx(0.5, abs=0.05)


def test_fewer_classes_than_ways(blobs):
    x, y, queries, labels = blobs
    assert episode_accuracies(x, y, queries, labels, 5, 1, episodes=3)[0] == 3
    with pytest.raises(ValueError, match="two classes or more with 100 training images and a test image, found 1"):
        episode_accuracies(x, y, queries, labels, 5, 100)
