"""The plan of a run: its bytes are those of the parts it names, it needs no data, and it says what it cannot plan."""

import re

import pytest
import torch

pytest.importorskip("omegaconf")

from ijepa_fast import configs
from ijepa_fast.config import ConfigError, load_config
from ijepa_fast.plan import main as command
from ijepa_fast.run import counted, forecast
from ijepa_fast.run.build import build_method
from ijepa_fast.train import main
from tests.launch import LAUNCHER, ROOT, TINY, unlaunched
from tests.small import loss_of, optimizer_of

QUICKSTART = str(ROOT / "configs" / "quickstart.yaml")


def config(*overrides):
    return load_config(QUICKSTART, [*TINY, *overrides])


def saved_bytes(method, images, draw) -> int:
    """Bytes of distinct storages that autograd keeps from one forward pass, weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in method.parameters()}
    kept = {}

    def keep(x):
        if x.is_floating_point() and x.untyped_storage().data_ptr() not in weights:
            kept[x.untyped_storage().data_ptr()] = x  # held, so that no other storage gets its address
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss = loss_of(method, images, draw)
    assert loss.isfinite()
    return sum(x.untyped_storage().nbytes() for x in kept.values())


@pytest.mark.parametrize("recompute", ["false", "true"])
def test_activations_are_what_autograd_keeps(recompute):
    # Truncated, because the CPU pads contexts of unequal length and keeps their scores.
    sizes = (
        "model.dim=64",
        "model.predictor_dim=48",
        "model.depth=4",
        "model.predictor_depth=3",
        "mask.policy=truncate",
    )
    cfg = config(*sizes, f"model.recompute={recompute}")
    method = build_method(cfg)
    draw = method.draw(cfg.batch_size, cfg.seed, 0)
    images = torch.randint(256, (cfg.batch_size, cfg.data.crop, cfg.data.crop, 3), dtype=torch.uint8)
    found, planned = saved_bytes(method, images, draw), 4 * method.saved_values(draw)
    if recompute == "true":  # the plan adds the block that is being recomputed, in each network
        assert found < planned < 4 * build_method(config(*sizes)).saved_values(draw)
    else:
        assert planned == pytest.approx(found, rel=0.1)


def test_the_optimisers_bytes_are_those_it_holds():
    cfg = config("engine.zero=0", "engine.precision=fp32")
    method = build_method(cfg)
    optimizer = optimizer_of(method)
    for p in method.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    found = forecast.memory("fp32", forecast.parameters(method), 0, 1, activations=0)
    moments = [s[key] for s in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
    assert found.moments == sum(x.nbytes for x in moments)
    assert found.weights == found.gradients == sum(p.nbytes for p in method.parameters())
    assert found.averages == sum(p.nbytes for p in method.target_encoder.parameters())
    assert found.masters == found.ema == 0


def test_stages_shard_what_they_say():
    """bf16: 2 + 2 + 4 + 8 bytes a parameter, 4 + 2 a parameter of the encoder; each stage divides one thing more."""
    encoder, predictor = sizes = 8_000, 800
    at = [forecast.memory("bf16", sizes, stage, 8, 1000) for stage in range(4)]
    whole = encoder + predictor
    assert at[0].total == 16 * whole + 6 * encoder + 1000
    assert [m.moments for m in at] == [8 * whole, whole, whole, whole]
    assert [m.gradients for m in at] == [2 * whole, 2 * whole, whole // 4, whole // 4]
    assert [m.weights for m in at] == [2 * whole, 2 * whole, 2 * whole, whole // 4]
    assert [m.averages for m in at] == [2 * encoder] * 3 + [4 * encoder]
    assert all(forecast.memory("bf16", sizes, stage, 1, 0).moments == 8 * whole for stage in range(4))


def test_hours_are_the_work_over_the_peak():
    made = forecast.make(config("optim.epochs=3", "batch_size=8"), images=80, gpu="A100", ranks=(1, 3, 4))
    assert {ranks for _, ranks in made.memory} == {1, 4}
    assert made.steps == 30
    assert made.hours[1.0] == pytest.approx(made.gflop_per_image * 1e9 * 240 / 312e12 / 3600)
    assert made.hours[0.52] == pytest.approx(made.hours[1.0] / 0.52)


def test_the_command_starts_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = ["--config", QUICKSTART, *TINY, "data.source=/nowhere", "--ranks", "1", "2", "--gpu", "H100"]
    assert command(arguments) == 0
    out = capsys.readouterr().out
    assert "nothing was measured" in out
    assert "one H100" in out
    assert "'/nowhere' does not exist" in out
    assert "1281167 images per epoch" in out
    rows = [line.split(" | ") for line in out.splitlines() if line.startswith("| ") and "fits" in line]
    assert [row[0] for row in rows] == ["| 0, 1, 2, 3"] * 2  # too small to differ in what is shown
    assert "fits on 1 x H100" in out
    assert not list(tmp_path.iterdir())
    assert main(["--plan", *arguments]) == 0
    assert capsys.readouterr().out == out


def test_rows_of_equal_bytes_are_one():
    cfg = load_config("vit_base16", ["batch_size=8"])
    rows = forecast.report(cfg, forecast.make(cfg, 80, "H100", (1,)), "H100").splitlines()
    assert [line.split(" | ")[0] for line in rows if "| fits |" in line] == ["| 0, 1, 2", "| 3"]


def test_the_images_of_the_source_are_counted(red_and_blue, capsys):
    assert command(["--config", QUICKSTART, *TINY, f"data.source={red_and_blue}", "--ranks", "1"]) == 0
    out = capsys.readouterr().out
    assert "24 images per epoch, 3 steps" in out
    assert "data.source: 24 images" in out
    assert command(["--config", QUICKSTART, *TINY, f"data.source={red_and_blue}", "--images", "80"]) == 0
    assert "80 images per epoch, 10 steps" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("memory", "words"),
    [
        (141e9, "fits on 8 x X"),
        (40e9, "does not fit as it is: set model.recompute=true engine.zero=1, on 8 x X"),
        (12e9, "does not fit as it is: set engine.accumulation=2 model.recompute=true engine.zero=3, on 8 x X"),
        (3e9, "does not fit on X, whatever is set: name more ranks, or a smaller model"),
    ],
)
def test_what_to_set_so_that_it_fits(memory, words):
    cfg = load_config("in1k_vith14_ep300")
    made = forecast.make(cfg, 100_000, "A100", (8,))
    device = forecast.Device("X", memory)
    assert forecast.cure(cfg, made, device, "A100") == words
    assert ("| fits |" in forecast.report(cfg, made, "A100", device)) is (memory == 141e9)


@pytest.mark.parametrize(
    "name", sorted({load_config(name).objective.method: name for name in configs.names()}.values())
)
def test_every_method_is_planned(name):
    small = ["data.crop=96", "model.patch=8", "model.dim=64", "model.depth=6", "model.heads=2"]
    if "tokenizer" in load_config(name).objective.options:
        tokens = ROOT / "tests" / "data" / "patch_tokens.safetensors"
        small += [f"objective.options.{o}" for o in (f"tokenizer={tokens}", "vocabulary=32", "token_patch=4")]
    cfg = load_config(name, small)
    made = forecast.make(cfg, 10_000, "H100", (1, 2))
    assert 0 < made.memory[1, 2].activations < made.memory[1, 1].activations
    assert made.gflop_per_image > 0


def test_a_forward_pass_counts_what_a_method_says():
    cfg = config("mask.policy=truncate", "model.dim=64", "model.depth=4")
    method = build_method(cfg)
    said = method.saved_values(method.draw(2, cfg.seed, 0, 0, 2)) / 2
    assert counted.saved_values(cfg) == pytest.approx(said, rel=0.1)


def test_five_steps_are_measured(monkeypatch, tmp_path, capsys):
    pytest.importorskip("deepspeed")
    monkeypatch.chdir(tmp_path)
    for name, value in unlaunched(DS_ACCELERATOR="cpu", TRITON_INTERPRET="0").items():
        monkeypatch.setenv(name, value)
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)
    assert command(["--config", QUICKSTART, *TINY, "--measure", "--ranks", "1", "--images", "80"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    found = re.fullmatch(
        r"measured on this machine, one rank: (\S+) s a step of 8 images \(median of 5\), so 10 .*", last
    )
    assert 1e-3 < float(found.group(1)) < 100
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gpu", "B9000"], ["--gpu", "H200", "B9000"]),
        (["--ranks", "3", "5"], ["--ranks", "batch_size=8"]),
        (["--ranks", "0"], ["--ranks", "at least 1"]),
        (["--images", "0"], ["--images", "at least 1"]),
        (["--measur"], ["no option --measur", "did you mean --measure"]),
    ],
    ids=["gpu", "ranks", "no ranks", "no images", "option"],
)
def test_what_cannot_be_planned_is_said(arguments, words, capsys):
    if arguments == ["--measur"]:
        with pytest.raises(SystemExit):
            command(["--config", QUICKSTART, *arguments])
    else:
        assert command(["--config", QUICKSTART, *TINY, *arguments]) == 1
    errors = capsys.readouterr().err
    for word in words:
        assert word in errors


def test_a_gpu_unknown_raises():
    with pytest.raises(ConfigError):
        forecast.make(config(), gpu="none")


def test_the_plan_counts_what_graphs_hold():
    """As the engine's buffers are: a copy of the gradient, one to add up in, and no gradient shared out at stage 2."""
    one, off = (forecast.make(config("engine.accumulation=2", f"engine.cuda_graphs={x}")) for x in ("auto", "off"))
    total = 4 * sum(one.parameters)
    assert {memory.graphs for memory in off.memory.values()} == {0}
    assert [one.memory[stage, 1].graphs for stage in (0, 1, 2, 3)] == [2 * total, 2 * total, 2 * total, 0]
    assert one.memory[2, 2].graphs == 2.5 * total
    assert one.memory[2, 2].gradients + one.memory[2, 2].graphs == 3 * total
    assert one.memory[1, 1].total == off.memory[1, 1].total + 2 * total
    clipped = forecast.make(config("optim.clip=1"))
    assert clipped.memory[1, 1].graphs == 0
