"""Figures: there and back as JSON, over seeds, against the untrained encoder, and the table that people read."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from ijepa_fast.eval.figures import (
    Figure,
    against,
    cells,
    change,
    figures_of,
    headline,
    interval,
    over_seeds,
    table,
    verdict,
)
from ijepa_fast.eval.outputs import measure, of_terms, standard_errors, terms

LINEAR = Figure("class", "linear", "accuracy", 0.75, None, (0.75,), 0.5, None, 40, (), 0.0685)
SEVERAL = Figure(
    "count",
    "linear, best",
    "mean_absolute_error",
    1.5,
    6.3531,
    (1.0, 2.0),
    2.25,
    1.75,
    1000,
    ({"rate": 1e-2, "head": "bn_linear", "held_out": 0.3}, {"rate": None, "head": "linear", "held_out": 0.25}),
)


def of(probe, metric="accuracy", value=0.5, untrained=None, task="class", error=0.03):
    """A figure of one seed."""
    return Figure(task, probe, metric, value, None, (value,), 0.5, untrained, 40, (), error, error)


@pytest.mark.parametrize("figure", [LINEAR, SEVERAL], ids=["one seed", "several seeds"])
def test_a_figure_comes_back_from_json(figure):
    (found,) = figures_of(json.loads(json.dumps({"figures": [figure.to_json()]})))
    assert found == figure


@pytest.mark.parametrize("change", [{"chance": ...}, {"colour": 3}], ids=["missing", "unknown"])
def test_json_of_another_schema_is_an_error(change):
    values = {k: v for k, v in (LINEAR.to_json() | change).items() if v is not ...}
    with pytest.raises(TypeError, match=next(iter(change))):
        Figure.from_json(values)


@pytest.mark.parametrize("seeds", [2, 3, 10])
def test_interval_is_students(seeds):
    from scipy import stats

    values = np.random.default_rng(seeds).random(seeds).tolist()
    low, high = stats.t.interval(0.95, seeds - 1, np.mean(values), stats.sem(values))
    mean, half = interval(values)
    assert (mean - half, mean + half) == pytest.approx((low, high), rel=1e-3)


def test_one_seed_has_no_interval():
    assert interval([0.5]) == (0.5, None)


def test_a_figure_per_metric_over_seeds():
    errors, larger = {"accuracy": 0.1, "mean_absolute_error": 0.2}, {"accuracy": 0.3, "mean_absolute_error": 0.6}
    runs = [
        {"accuracy": 0.25, "mean_absolute_error": 1.0, "rate": 1.0, "errors": errors},
        {
            "accuracy": 0.75,
            "mean_absolute_error": 3.0,
            "rate": 2.0,
            "errors": larger,
        },
    ]
    chance = {"accuracy": 0.125, "mean_absolute_error": 4.0}
    accuracy, error = over_seeds("count", "linear", runs, chance, 60)
    assert (accuracy.metric, accuracy.value, accuracy.seeds, accuracy.chance) == ("accuracy", 0.5, (0.25, 0.75), 0.125)
    assert (error.metric, error.value, error.seeds, error.chance) == ("mean_absolute_error", 2.0, (1.0, 3.0), 4.0)
    assert (accuracy.error, error.error) == pytest.approx((0.2, 0.4))
    for figure in (accuracy, error):
        assert (figure.task, figure.probe, figure.n) == ("count", "linear", 60)
        assert figure.chosen == ({"rate": 1.0}, {"rate": 2.0})
    assert over_seeds("count", "20-NN", [{"accuracy": 1.0, "errors": errors}], chance, 60)[0].chosen == ()


def test_untrained_values_are_those_of_the_same_probe():
    before = [of("linear", value=0.1), of("linear", value=0.2, task="kind"), of("20-NN", value=0.3)]
    after = [of("linear", value=0.9), of("attentive", value=0.8), of("20-NN", value=0.2)]
    found = against(after, before)
    assert [f.untrained for f in found] == [0.1, None, 0.3]
    assert [f.improved for f in found] == [True, False, False]
    assert [f.untrained_error for f in found] == [0.03, None, 0.03]
    assert [f.value for f in found] == [0.9, 0.8, 0.2]


@pytest.mark.parametrize(("metric", "less", "more"), [("r2", False, True), ("mean_absolute_error", True, False)])
def test_errors_improve_downwards(metric, less, more):
    assert of("linear", metric, 0.4, untrained=0.5).improved is less
    assert of("linear", metric, 0.6, untrained=0.5).improved is more


def test_a_difference_within_two_standard_errors_is_none():
    assert of("linear", value=0.56, untrained=0.5).gain == pytest.approx((0.06, 0.06 / math.hypot(0.03, 0.03)))
    assert not of("linear", value=0.58, untrained=0.5).improved
    assert of("linear", value=0.59, untrained=0.5).improved
    assert of("linear", value=0.59, untrained=0.5, error=None).gain is None
    assert not of("linear", value=0.59, untrained=0.5, error=None).improved
    assert of("linear", value=0.5, untrained=0.5, error=0.0).gain == (0.0, 0.0)


def test_the_verdict_is_one_sentence():
    figures = [
        of("linear", value=0.7, untrained=0.5, task="distance"),
        of("20-NN", value=0.5, untrained=0.5, task="distance"),
        of("linear", "r2", 0.45, untrained=0.25, task="metres"),
        of("linear", value=0.52, untrained=0.5, task="kind"),
        of("20-NN", value=0.9, untrained=0.5, task="kind"),
        of("linear", value=0.3, untrained=0.5, task="count"),
        of("linear", value=0.9, task="unknown"),
    ]
    assert verdict(figures) == (
        "learned: distance +20.0 points (4.7 s.e.), metres R^2 +0.20 (4.7 s.e.); lost: count -20.0 points (4.7 s.e.); "
        "no change beyond 2 standard errors: kind"
    )
    assert verdict(figures[3:4]) == "no change beyond 2 standard errors: kind"
    assert verdict(figures[-1:]) == ""


@pytest.mark.parametrize(("ks", "shown"), [((10, 20, 100), "20-NN"), ((10,), "10-NN")], ids=["with 20", "few images"])
def test_headline_has_one_k_and_one_metric(ks, shown):
    figures = [of("linear"), of("linear", "mean_absolute_error"), *(of(f"{k}-NN") for k in ks), of("attentive")]
    assert [(f.probe, f.metric) for f in headline(figures)] == [
        ("linear", "accuracy"),
        (shown, "accuracy"),
        ("attentive", "accuracy"),
    ]


def test_table():
    assert table([SEVERAL, LINEAR]).splitlines() == [
        "task   probe         metric           chance  untrained           trained    s.e.  images",
        "count  linear, best  mean abs. error  2.2500     1.7500  1.5000 +- 6.3531           1,000",
        "class  linear        accuracy         0.5000                       0.7500  0.0685      40",
    ]


def test_table_without_untrained_values_has_no_column_of_them():
    head, rows = cells([LINEAR])
    assert head == ["task", "probe", "metric", "chance", "value", "s.e.", "images"]
    assert rows == [["class", "linear", "accuracy", "0.5000", "0.7500", "0.0685", "40"]]


@pytest.mark.parametrize("wrong", [{"n": 1}, {"value": math.nan}, {"untrained": math.nan}, {"error": math.nan}])
def test_nothing_is_learned_by_one_image_or_by_what_is_not_known(wrong):
    found = replace(of("linear", value=1.0, untrained=0.0), **wrong)
    assert not found.improved
    assert found.gain is None
    assert verdict([found]) == ""


def test_a_value_that_is_no_number_is_not_known():
    found = replace(of("linear", value=math.nan, untrained=0.5, error=math.nan), interval=math.nan)
    assert cells([found])[1] == [
        ["class", "linear", "accuracy", "0.5000", "0.5000", "not known +- not known", "not known", "40"]
    ]
    assert change(found) == "not known"
    assert replace(found, seeds=(1.0, 2.0)).half is None


def test_no_verdict_counts_infinite_errors():
    assert verdict([of("linear", value=0.75, untrained=0.5, error=0.0)]) == "learned: class +25.0 points"


@pytest.mark.parametrize("task", ["classification", "counting", "regression"])
def test_no_image_gives_no_number(task):
    none = torch.zeros(0)
    for found in (measure(none, none, task), standard_errors(none, none, task)):
        assert found
        assert all(map(math.isnan, found.values()))
    assert math.isnan(of_terms({"accuracy": np.zeros(0)})["accuracy"])


def test_r2_of_equal_labels_is_not_known():
    equal = torch.full((3,), 0.1)
    assert math.isnan(measure(torch.tensor([1.0, 2.0, 3.0]), equal, "regression")["r2"])
    assert np.isnan(terms(torch.tensor([1.0, 2.0, 3.0]), equal, "regression")["r2"]).all()
