"""engine.precision: what auto takes, what it says, and that a run keeps its own."""

import json

import pytest
import torch

from ijepa_fast.engine import precision
from ijepa_fast.engine.precision import GAIN, choose_precision
from tests.launch import finish, run, start

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def gain(monkeypatch):
    """Set how many times as fast as fp32 a bf16 product is."""
    return lambda value: monkeypatch.setattr(precision, "bf16_gain", lambda: value)


@pytest.mark.parametrize(
    ("speed", "name"), [(8.0, "bf16"), (GAIN, "bf16"), (1.4, "fp32"), (0.3, "fp32"), (0.0, "fp32")]
)
def test_auto_takes_the_faster_one_on_a_cpu(gain, speed, name):
    gain(speed)
    chosen = choose_precision("auto", CPU)
    assert chosen.name == name
    assert f"{speed:.2f} times as fast" in chosen.reason


@pytest.mark.parametrize(
    ("wanted", "device", "before", "name", "reason"),
    [
        ("auto", GPU, None, "bf16", "on a GPU"),
        ("fp32", GPU, None, "fp32", "as asked for"),
        ("fp32", CPU, "bf16", "fp32", "as asked for"),
        ("bf16", GPU, "fp32", "bf16", "on a GPU"),
        ("auto", CPU, "fp32", "fp32", "as the run began"),
        ("auto", GPU, "fp32", "fp32", "as the run began"),
        ("auto", CPU, "bf16", "bf16", "as the run began"),
    ],
)
def test_no_timing_where_none_is_needed(monkeypatch, wanted, device, before, name, reason):
    monkeypatch.setattr(precision, "bf16_gain", None)
    assert choose_precision(wanted, device, before) == precision.Precision(name, reason)


@pytest.mark.parametrize(
    ("speed", "words"),
    [(2.0, "as asked for"), (0.25, "takes 4.0 times as long"), (0.0, "there are no bf16 products")],
)
def test_an_explicit_bf16_that_is_slower_says_so(gain, speed, words):
    gain(speed)
    chosen = choose_precision("bf16", CPU)
    assert chosen.name == "bf16"
    assert words in chosen.reason


def test_a_missing_product_counts_as_none(monkeypatch):
    def linear(x, weight):
        if x.dtype == torch.bfloat16:
            raise RuntimeError("could not create a primitive descriptor")
        return x @ weight.T

    monkeypatch.setattr(precision.F, "linear", linear)
    assert precision.bf16_gain() == 0.0
    assert choose_precision("auto", CPU).name == "fp32"


def test_the_timing_takes_a_moment():
    assert precision.bf16_gain() >= 0.0


@pytest.mark.slow
def test_a_run_says_and_keeps_its_precision(tmp_path):
    pytest.importorskip("deepspeed")
    pytest.importorskip("nvidia.dali")
    folder = run(tmp_path, "optim.steps=1", "engine.precision=fp32")
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["precision"], summary["precision_reason"]) == ("fp32", "as asked for")
    _, errors = finish(start(tmp_path, "optim.steps=2", "engine.precision=auto"))
    assert errors.count("engine.precision=fp32: as the run began") == 1
