"""Several probes of the same frozen features at once: a linear head and k-NN for each task."""

import torch
import torch.nn.functional as F

from ijepa_fast.eval.features import Standardiser
from ijepa_fast.eval.knn import KS, knn_scores
from ijepa_fast.eval.labels import TASKS
from ijepa_fast.eval.linear import HEADS, fit_linear
from ijepa_fast.eval.sweep import FAST, PAPER, fit_sweep

PROTOCOLS = ("fast", "exact", "paper")


class Outputs:
    """How the labels of a task are what a head is trained on, and its scores are labels again.

    labels (n,): of the training images. targets: int64 (n,) from 0 to `count` - 1, or fp32 (n,) of a regression, whose
    `count` is 1.
    """

    def __init__(self, task, labels):
        self.task, self.labels = task, labels
        if task == "regression":
            self.classes, self.count, self.targets = None, 1, labels.float()
        else:
            self.classes, self.targets = labels.unique(return_inverse=True)
            self.count = len(self.classes)

    @property
    def votes(self):
        """What neighbours vote with, fp32 (n, count)."""
        return self.targets[:, None] if self.classes is None else F.one_hot(self.targets, self.count).float()

    def decode(self, scores):
        """scores (m, count) -> labels (m,)."""
        return scores[:, 0] if self.classes is None else self.classes[scores.argmax(1)]

    def chance(self, count):
        """What is always answered without looking, the commonest class or the mean: (count,)."""
        if self.classes is None:
            return self.targets.mean().expand(count)
        return self.classes[self.targets.bincount().argmax()].expand(count)


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
    if unknown := set(heads) - set(HEADS):
        raise ValueError(f"heads: expected of {HEADS}, got {sorted(unknown)}")
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
    "linear": figures with what was chosen (see LinearHead.chosen), "knn": {"<k>": figures}}}; figures: see measure.
    """
    for name, task in tasks.items():
        for split, labels in (("train", train_labels), ("test", test_labels)):
            if name not in labels:
                raise ValueError(f"{split}_labels: expected labels for {name!r}, got only {sorted(labels)}")
        check_labels(name, task, train_features, train_labels[name], test_features, test_labels[name])
    results = {}
    for name, task in tasks.items():
        outputs, y_test = Outputs(task, train_labels[name]), test_labels[name]
        head = fit_head(train_features, outputs.targets, task, protocol, heads, seed)
        results[name] = {
            "task": task,
            "chance": measure(outputs.chance(len(y_test)), y_test, task),
            "linear": measure(outputs.decode(head(test_features)), y_test, task) | head.chosen,
            "knn": probe_knn(train_features, outputs, test_features, y_test, ks),
        }
    return results


def probe_knn(train_features, outputs, test_features, test_labels, ks=KS):
    """{"<k>": figures} of k-NN on features standardised by the training set, for each k up to n; see probe_suite."""
    standardise = Standardiser(train_features)
    ks = [k for k in ks if k <= len(train_features)]
    if not ks:
        return {}
    scores = knn_scores(standardise(train_features), outputs.votes, standardise(test_features), ks)
    return {str(k): measure(outputs.decode(s), test_labels, outputs.task) for k, s in scores.items()}
