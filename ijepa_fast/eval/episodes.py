"""Few-shot episodes: some classes, a few labelled images of each, and the nearest class mean of new images.

The classifier has nothing to tune: features less the mean of all training images, of unit length, and the class whose
mean of support images is the nearest (SimpleShot, Wang et al. 2019).
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F


def classes_with(labels: torch.Tensor, test_labels: torch.Tensor, shots: int) -> list[int]:
    """The labels that at least `shots` training images have, labels (n,), and a test image, test_labels (m,)."""
    asked = _members(test_labels)
    return [label for label, members in _members(labels).items() if len(members) >= shots and label in asked]


def episode_accuracies(
    features: torch.Tensor,
    labels: torch.Tensor,
    test_features: torch.Tensor,
    test_labels: torch.Tensor,
    ways: int,
    shots: int,
    episodes: int = 600,
    queries: int = 15,
    seed: int = 0,
) -> tuple[int, np.ndarray]:
    """How many classes an episode has, and the accuracy of each episode, fp64 (episodes,).

    features (n, D), labels (n,): of training images, of which `shots` of a class support it. test_features (m, D),
    test_labels (m,): of which at most `queries` of a class are asked for. Each episode draws `ways` of `classes_with`
    by `seed`, or all where there are fewer. Raises ValueError where there are fewer than two.
    """
    classes = classes_with(labels, test_labels, shots)
    if len(classes) < 2:
        raise ValueError(
            f"few-shot: expected two classes or more with {shots} training images and a test image, found "
            f"{len(classes)}; give more images, or fewer shots"
        )
    ways, support, asked = min(ways, len(classes)), _members(labels), _members(test_labels)
    mean = features.float().mean(0)
    x, x_test = (F.normalize(part.float() - mean, dim=1) for part in (features, test_features))
    rng, found = np.random.default_rng([seed, shots]), []
    for _ in range(episodes):
        chosen = [classes[number] for number in rng.permutation(len(classes))[:ways]]
        of_support = np.stack([rng.permutation(support[label])[:shots] for label in chosen])
        of_queries = [rng.permutation(asked[label])[:queries] for label in chosen]
        truth = np.repeat(np.arange(ways), [len(members) for members in of_queries])
        distance = torch.cdist(x_test[np.concatenate(of_queries)], x[of_support].mean(1))
        found.append(float((distance.argmin(1).cpu().numpy() == truth).mean()))
    return ways, np.array(found)


def _members(labels: torch.Tensor) -> dict[int, np.ndarray]:
    """{label: the images that have it}."""
    values = labels.cpu().numpy()
    return {int(label): np.flatnonzero(values == label) for label in np.unique(values)}
