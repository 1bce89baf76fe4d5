"""Several probes of the same frozen features at once: a linear head and k-NN for each task."""

import torch

from ijepa_fast.eval.features import Standardiser
from ijepa_fast.eval.knn import KS, knn_scores
from ijepa_fast.eval.linear import fit_linear
from ijepa_fast.eval.sweep import FAST, PAPER, fit_sweep

PROTOCOLS = ("fast", "exact", "paper")
TASKS = ("classification", "counting", "regression")


def measure(predictions, targets, task):
    """Figures of predictions (n,) against targets (n,): accuracy of classes and counts, R^2 of a regression,
    and the mean absolute error of counts and regressions.
    """
    predictions, targets = predictions.double(), targets.double()
    figures = {}
    if task == "regression":
        spread = (targets - targets.mean()).square().sum()
        figures["r2"] = float(1 - (predictions - targets).square().sum() / spread.clamp_min(1e-12))
    else:
        figures["accuracy"] = float((predictions == targets).double().mean())
    if task != "classification":
        figures["mean_absolute_error"] = float((predictions - targets).abs().mean())
    return figures


def check_labels(name, task, train_features, train_labels, test_features, test_labels):
    """ValueError, naming the task, where labels are missing, not as many as images, or not in the training set."""
    if task not in TASKS:
        raise ValueError(f"tasks[{name!r}]: expected one of {TASKS}, got {task!r}")
    for split, features, labels in (("train", train_features, train_labels), ("test", test_features, test_labels)):
        if labels.shape != (len(features),):
            raise ValueError(
                f"{split}_labels[{name!r}]: expected one label for each of the {len(features)} images, "
                f"shape ({len(features)},), got {tuple(labels.shape)}"
            )
    if (
        task != "regression"
        and train_labels.is_floating_point()
        and not torch.equal(train_labels, train_labels.round())
    ):
        raise ValueError(
            f"train_labels[{name!r}]: expected whole numbers for {task}, got {train_labels[:3].tolist()}..."
        )
    if task == "regression":
        return
    if train_labels.is_floating_point() and not torch.equal(train_labels, train_labels.round()):
        raise ValueError(f"train_labels[{name!r}]: expected whole numbers for {task}, got {train_labels[:3].tolist()}")
    if strange := sorted(set(test_labels.tolist()) - set(train_labels.tolist())):
        raise ValueError(f"test_labels[{name!r}]: expected labels of the training set, got also {strange[:5]}")


def fit_head(features, targets, task="classification", protocol="fast", heads=("bn_linear",), seed=0):
    """The best linear head by a protocol of probe_suite: features (n, D), targets (n,) -> linear.LinearHead."""
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol: expected one of {PROTOCOLS}, got {protocol!r}")
    if protocol == "exact" or (protocol == "fast" and task == "regression"):
        return fit_linear(features, targets, task, heads, seed=seed)
    return fit_sweep(features, targets, task, heads, PAPER if protocol == "paper" else FAST, seed=seed)


def probe_suite(
    train_features,
    train_labels,
    test_features,
    test_labels,
    tasks,
    *,
    ks=KS,
    protocol="fast",
    heads=("bn_linear",),
    seed=0,
):
    """Linear and k-NN probes of frozen features, each feature standardised by the training set for k-NN.

    train_features (n, D), test_features (m, D) fp32. train_labels, test_labels: {name: (n,) or (m,)}.
    tasks: {name: "classification" | "counting" | "regression"}; counting classifies, and its classes are numbers.
    protocol: how linear heads are fitted: "fast" (sweep.FAST; regressions in closed form), "exact" (linear.fit_linear:
        to convergence, several times slower, and kinder to features of low rank) or "paper" (sweep.PAPER).
    ks: neighbours of k-NN; those above n are left out. heads: see fit_linear.
    seed: of the held-out split and the heads.
    Returns, ready for JSON, {name: {"task", "chance": figures of always predicting the commonest class (the mean),
    "linear": figures with the "head", "decay" and "rate" chosen, "knn": {"<k>": figures}}}; figures: see measure.
    """
    for name, task in tasks.items():
        for split, labels in (("train", train_labels), ("test", test_labels)):
            if name not in labels:
                raise ValueError(f"{split}_labels: expected labels for {name!r}, got only {sorted(labels)}")
        check_labels(name, task, train_features, train_labels[name], test_features, test_labels[name])
    standardise = Standardiser(train_features)
    train, test = standardise(train_features), standardise(test_features)
    ks = [k for k in ks if k <= len(train)]
    results = {}
    for name, task in tasks.items():
        y, y_test = train_labels[name], test_labels[name]
        if task == "regression":
            votes, decode, chance = y.float()[:, None], lambda s: s[:, 0], y.float().mean()
        else:
            classes, y = y.unique(return_inverse=True)
            votes = torch.nn.functional.one_hot(y, len(classes)).float()
            decode = lambda s, classes=classes: classes[s.argmax(1)]  # noqa: E731
            chance = classes[y.bincount().argmax()]
        head = fit_head(train_features, y, task, protocol, heads, seed)
        scores = knn_scores(train, votes, test, ks) if ks else {}
        results[name] = {
            "task": task,
            "chance": measure(chance.expand(len(y_test)), y_test, task),
            "linear": {
                **measure(decode(head(test_features)), y_test, task),
                "head": head.head,
                "decay": head.decay,
                "rate": head.rate,
            },
            "knn": {str(k): measure(decode(s), y_test, task) for k, s in scores.items()},
        }
    return results
