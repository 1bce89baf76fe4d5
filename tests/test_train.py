"""The trainer as a process: stages, ranks, resumption, interruption, and what it says when something is wrong."""

import json
import signal
import time
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from tests.launch import ROOT, command, finish, losses, rank_files, run, start

pytest.importorskip("deepspeed")
pytest.importorskip("nvidia.dali")

from PIL import Image
from safetensors.torch import load_file

from ijepa_fast import kernels
from ijepa_fast.train import main


def state(folder, step):
    """Every parameter, moment and average of a checkpoint, whole, whatever ranks wrote it."""
    pieces = {}
    for path in rank_files(folder, step):
        for entry, tensor in load_file(path).items():
            name, key, start_ = entry.split("|")
            pieces.setdefault((name, key), {})[int(start_)] = tensor
    return {k: torch.cat([parts[i] for i in sorted(parts)]) for k, parts in pieces.items()}


@pytest.fixture(scope="module")
def stage0(tmp_path_factory):
    """Stage 0 on one and on two ranks."""
    options = ("engine.zero=0", "optim.steps=4", "optim.clip=0.1")
    return {n: run(tmp_path_factory.mktemp("stage0"), *options, ranks=n) for n in (1, 2)}


@pytest.mark.multi_rank
def test_two_ranks_give_the_trajectory_of_one(stage0):
    assert losses(stage0[2]) == pytest.approx(losses(stage0[1]), rel=1e-5)
    expected, found = (state(stage0[ranks], 4) for ranks in (1, 2))
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-3, atol=2e-6, msg=str(key))


@pytest.mark.multi_rank
@pytest.mark.parametrize(("stage", "ranks"), [(1, 2), (2, 2), (3, 2), (3, 1)])
def test_every_stage_gives_the_trajectory_of_stage_0(stage0, tmp_path, stage, ranks):
    wanted = stage0[ranks]
    folder = run(tmp_path, f"engine.zero={stage}", "optim.steps=4", "optim.clip=0.1", ranks=ranks)
    assert losses(folder) == pytest.approx(losses(wanted), rel=1e-5)
    expected, found = state(wanted, 4), state(folder, 4)
    assert expected.keys() == found.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-3, atol=2e-6, msg=str(key))
    averages = [key for key in found if key[1] == "ema"]
    assert averages
    weights = load_file(folder / "checkpoints" / "step-00000004" / "weights.safetensors")
    for name, _ in averages:
        assert torch.equal(weights["target_" + name].flatten(), found[name, "ema"])


@pytest.mark.multi_rank
@pytest.mark.parametrize(("stage", "ranks"), [(0, 1), (1, 1), (2, 2), (3, 2)])
def test_bf16_follows_fp32_at_every_stage(stage0, tmp_path, stage, ranks):
    options = ("optim.steps=4", "optim.clip=0.1", "engine.precision=bf16")
    folder = run(tmp_path, f"engine.zero={stage}", *options, ranks=ranks)
    assert losses(folder) == pytest.approx(losses(stage0[ranks]), rel=0.02)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of 60 JPEG files, no two alike."""
    folder = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    for i in range(60):
        coarse = generator.integers(0, 256, (5, 6, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((48, 40), Image.Resampling.BICUBIC).save(folder / f"{i:03}.jpg")
    return folder


@pytest.mark.parametrize(
    "how",
    [
        (),
        ("engine.precision=bf16", "engine.accumulation=2"),
        ("engine.precision=bf16", "engine.zero=0"),
        ("engine.precision=bf16", "engine.zero=3"),
    ],
    ids=["fp32", "bf16, accumulation", "bf16, stage 0", "bf16, stage 3"],
)
def test_resumed_is_bitwise_unbroken(tmp_path, photos, how):
    """10 steps, then 10 more in a new process, against 20: weights, moments, averages and losses to the bit.

    The images are real files and an epoch is 7 steps, so order, crops and masks are part of it.
    """
    options = (f"data.source={photos}", "optim.epochs=5", *how)
    unbroken = run(tmp_path, "name=unbroken", "optim.steps=20", *options)
    run(tmp_path, "name=broken", "optim.steps=10", *options)
    broken = run(tmp_path, "name=broken", "optim.steps=20", *options)
    assert losses(broken) == losses(unbroken)
    expected, found = state(unbroken, 20), state(broken, 20)
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


@pytest.mark.multi_rank
def test_other_ranks_stages_and_micro_batches_are_the_same_run(tmp_path, photos):
    """One rank, then two, then one again, each with its own stage and number of micro-batches, against one rank."""
    # A bias of keys has no gradient but rounding, which Adam would scale up to whole steps: a larger eps does not.
    options = (f"data.source={photos}", "optim.epochs=5", "mask.policy=truncate", "log.keep=9", "optim.eps=1e-6")
    unbroken = run(tmp_path, "name=unbroken", "optim.steps=9", *options)
    run(tmp_path, "name=broken", "optim.steps=3", *options)
    run(tmp_path, "name=broken", "optim.steps=6", "engine.zero=3", *options, ranks=2)
    broken = run(tmp_path, "name=broken", "optim.steps=9", "engine.accumulation=2", "engine.zero=0", *options)
    assert losses(broken) == pytest.approx(losses(unbroken), rel=1e-5)
    expected, found = state(unbroken, 9), state(broken, 9)
    assert expected.keys() == found.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-3, atol=2e-5, msg=str(key))


def test_accumulation_counts_steps(tmp_path):
    """Two half batches a step: every step is logged once. What a step then does is in test_engine.py."""
    folder = run(tmp_path, "engine.accumulation=2", "optim.steps=3")
    assert len(losses(folder)) == 3


def test_a_kill_leaves_the_last_checkpoint_and_the_run_goes_on(tmp_path):
    (process,) = start(tmp_path, "log.checkpoint_every=2", "optim.steps=100000", "optim.epochs=1000")
    checkpoints = tmp_path / "quickstart" / "checkpoints"
    deadline = time.time() + 120
    while time.time() < deadline and len(list(checkpoints.glob("step-*"))) < 2:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    last = max(int(p.name[5:]) for p in checkpoints.glob("step-*"))
    assert last >= 2
    folder = run(tmp_path, "log.checkpoint_every=2", f"optim.steps={last + 2}", "optim.epochs=1000")
    assert rank_files(folder, last + 2)
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "loss" in r] == list(range(1, last + 3))
    assert [r["changed"]["optim.steps"] for r in records if "changed" in r] == [[100000, last + 2]]


def test_interrupt_says_how_to_go_on(tmp_path):
    (process,) = start(tmp_path, "optim.steps=100000", "optim.epochs=1000")
    log = tmp_path / "quickstart" / "log.jsonl"
    deadline = time.time() + 120
    while time.time() < deadline and not (log.exists() and log.read_text()):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    statuses, errors = finish([process], timeout=60)
    assert statuses == [130]
    assert "same command" in errors


def test_a_run_leaves_what_a_person_needs(tmp_path):
    folder = run(tmp_path, "optim.steps=3", "log.tensorboard=true")
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["steps"] == 3
    assert {"loss_first", "loss_last", "images_per_second", "tokens_per_image", "figures"} <= summary.keys()
    for name in ("config.yaml", "loss.png", "masks.png"):
        assert (folder / name).stat().st_size > 100, name
    assert list((folder / "tensorboard").iterdir())
    record = json.loads((folder / "log.jsonl").read_text().splitlines()[-1])
    keys = {"step", "loss", "lr", "weight_decay", "ema", "images_per_second", "tokens_per_image", "data_wait"}
    assert keys <= record.keys()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.source=/nowhere"], ["data.source", "/nowhere", "does not exist"]),
        (["data.source=EMPTY"], ["data.source", "no image"]),
        (["data.source=configs"], ["data.source", "configs", "no image"]),
        (["data.source=PHOTOS", "batch_size=61"], ["batch_size=61", "60 images"]),
        (["data.crop=33"], ["data.crop=33", "model.patch"]),
        (["mask.target_scale=[2,3]"], ["mask.target_scale"]),
        (["mask.min_keep=99"], ["mask.min_keep", "99"]),
        (["log.wandb=project"], ["log.wandb", "not installed"]),
        (["engine.device=cuda"], ["engine.device"]),
        (["kernels=fast"], ["kernels", "fast"]),
        (["optim.nonsense=1"], ["optim.nonsense"]),
    ],
)
def test_bad_input_ends_with_one_sentence(tmp_path, photos, monkeypatch, capsys, overrides, words):
    if "wandb" in overrides[0] and find_spec("wandb"):
        pytest.skip("wandb is installed")
    if "cuda" in overrides[0] and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.chdir(ROOT)
    (tmp_path / "empty").mkdir()
    overrides = [o.replace("EMPTY", str(tmp_path / "empty")).replace("PHOTOS", str(photos)) for o in overrides]
    try:
        assert main(command(tmp_path, *overrides)[2:]) == 1
    finally:
        kernels.use("auto")
    errors = capsys.readouterr().err
    assert errors.count("error: ") == 1
    for word in words:
        assert word in errors
    assert not (tmp_path / "quickstart").exists()


@pytest.mark.multi_rank
def test_batch_not_divisible_by_ranks(tmp_path):
    statuses, errors = finish(start(tmp_path, "batch_size=9", ranks=2))
    assert statuses == [1, 1]
    assert "batch_size=9" in errors
    assert "2 ranks" in errors


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_checkpoint(tmp_path):
    folder = run(tmp_path, "optim.steps=2")
    kept = [path.read_bytes() for path in rank_files(folder, 2)]
    rates = [f"optim.{key}=10" for key in ("lr", "start_lr", "final_lr")]
    decays = [f"optim.{key}=100" for key in ("weight_decay", "final_weight_decay")]  # a step multiplies weights by -999
    overrides = ("optim.steps=20", *rates, *decays, "log.keep=9")
    statuses, errors = finish(start(tmp_path, *overrides))
    assert statuses == [1]
    assert "not finite in steps" in errors
    assert "ranks [0]" in errors
    assert kept == [path.read_bytes() for path in rank_files(folder, 2)]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.dim=64", ["model.dim: 32 -> 64", "another name"]),
        ("seed=1", ["seed: 0 -> 1"]),
        ("resume=false", ["holds a run", "another name"]),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_an_error(tmp_path, override, words):
    folder = run(tmp_path, "optim.steps=1")
    kept = [path.read_bytes() for path in rank_files(folder, 1)]
    statuses, errors = finish(start(tmp_path, "optim.steps=2", override))
    assert statuses == [1]
    for word in words:
        assert word in errors
    assert kept == [path.read_bytes() for path in rank_files(folder, 1)]


def test_a_missing_rank_file_is_an_error(tmp_path):
    folder = run(tmp_path, "optim.steps=1")
    rank_files(folder, 1)[0].unlink()
    statuses, errors = finish(start(tmp_path, "optim.steps=2"))
    assert statuses == [1]
    assert "missing" in errors
