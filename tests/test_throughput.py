"""The throughput benchmark: contenders agree, figures are consistent, and wrong input is refused."""

import json

import pytest
import torch

from bench import throughput
from bench.baselines.contenders import Case, make_contenders

TINY = ["--model", "vit_tiny", "--crop", "64", "--patch", "8", "--batch", "2", "--device", "cpu"]
QUICK = ["--rounds", "1", "--steps", "1", "--warmup", "1", "--predictor-depth", "1"]


@pytest.mark.parametrize("method", ["ijepa", "mae"])
def test_contenders_follow_one_trajectory(method):
    case = Case(method=method, arch="vit_tiny", crop=64, patch=8, batch=2, predictor_depth=1, batches=2)
    contenders = make_contenders(case, ["fast", "strong", "plain"], ["truncate"])
    losses = {c.name: [float(c.run(step)) for step in range(3)] for c in contenders}
    assert len(losses) >= 2
    for name, values in losses.items():
        assert values == pytest.approx(losses["plain"], rel=1e-4), name
    assert losses["plain"][0] != pytest.approx(losses["plain"][2], rel=1e-4)


def test_ibot_contenders_agree_on_the_first_loss():
    head = {"hidden": 32, "bottleneck": 16, "prototypes": 64}
    case = Case(method="ibot", arch="vit_tiny", crop=32, patch=8, batch=2, batches=1, head=head)
    fast, plain = make_contenders(case, ["fast", "plain"], ["truncate"])
    assert fast.fingerprint() == pytest.approx(plain.fingerprint(), rel=1e-4)
    assert fast.executed < plain.executed == fast.work


def test_disagreement_stops_the_benchmark():
    case = Case(arch="vit_tiny", crop=64, patch=8, batch=2, predictor_depth=1, batches=1)
    contenders = make_contenders(case, ["fast", "plain"], ["truncate"])
    throughput.check_agreement(contenders, "fp32")
    with torch.no_grad():
        contenders[0].network.encoder.blocks[3].norm2.weight.mul_(1.1)
    with pytest.raises(ValueError, match="same step"):
        throughput.check_agreement(contenders, "fp32")


def test_figures_are_consistent(tmp_path, capsys):
    path = tmp_path / "throughput.json"
    status = throughput.main([*TINY, *QUICK, "--context", "truncate,full", "--json", str(path)])
    assert status == 0
    result = json.loads(path.read_text())
    rows = {(r["impl"], r["context"]): r for r in result["rows"]}
    assert set(rows) == {("fast", "truncate"), ("fast", "full"), ("strong", "truncate"), ("plain", "truncate")}
    for row in rows.values():
        assert row["images_per_second"] == pytest.approx(2 / row["seconds_per_step"])
        assert row["tokens_per_second"] == pytest.approx(row["images_per_second"] * row["tokens_per_image"])
        assert row["tflops"] == pytest.approx(row["images_per_second"] * row["gflop_per_image"] / 1e3)
        assert row["share_of_ceiling"] == pytest.approx(row["tflops"] / result["ceiling_tflops"])
    assert rows["fast", "full"]["tokens_per_image"] >= rows["fast", "truncate"]["tokens_per_image"]
    # A ratio is given only where the tokens are equal.
    assert rows["fast", "full"]["speedup_over_plain"] is None
    assert rows["plain", "truncate"]["speedup_over_plain"] == 1.0
    assert "| fast | truncate |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--impl", "fast,slow"], "--impl"),
        (["--impl", "published"], "--external"),
        (["--context", "all"], "--context"),
        (["--max-batch", "--device", "cpu"], "--max-batch"),
        (["--method", "mae", "--engine", "1"], "--engine"),
    ],
)
def test_wrong_arguments_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        throughput.parse(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_a_checkout_that_is_none_is_refused(tmp_path, capsys):
    assert throughput.main([*TINY, *QUICK, "--external", str(tmp_path)]) == 1
    assert "src/helper.py" in capsys.readouterr().err
