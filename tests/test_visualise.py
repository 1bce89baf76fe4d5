"""The command visualise: its decoder is told what the predictor predicts, goes on where it stopped, and is checked."""

import json
import math
import os
import signal
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("diffusers")
pytest.importorskip("nvidia.dali")

from PIL import Image

from ijepa_fast.__main__ import main
from ijepa_fast.config import load_config, save_config
from ijepa_fast.engine.precision import Precision
from ijepa_fast.interop.weights import Arch, Weights, position_key, save_weights
from ijepa_fast.report import predicted, report
from ijepa_fast.run.build import build_method
from ijepa_fast.run.sources import training_source
from ijepa_fast.visualise import checks, conditions, decoder, training, visualise
from ijepa_fast.visualise.conditions import KINDS, Conditions
from tests.launch import ROOT, TINY
from tests.small import from_masks

COUNT, CROP, PATCH = 40, 32, 4
QUICK = ["--steps", "6", "--side", "16", "--seeds", "1"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Images of one colour each, with a bright square."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for i in range(COUNT):
        pixels = np.zeros((CROP, CROP, 3), np.uint8) + rng.integers(0, 120, 3, dtype=np.uint8)
        y, x = rng.integers(0, 24, 2)
        pixels[y : y + 8, x : x + 8] = 250
        Image.fromarray(pixels).save(folder / f"{i:02}.png")
    return folder


def leave(folder, source, *overrides, seed=7):
    """The folder of a run with the weights of a checkpoint that are not those it began with."""
    config = load_config(ROOT / "configs" / "quickstart.yaml", [*TINY, f"data.source={source}", *overrides])
    method = build_method(config)
    generator = torch.Generator().manual_seed(seed)
    for network in method.networks.values():
        for weight in network.parameters():
            weight.data += 0.1 * torch.randn(weight.shape, generator=generator)
    networks = {n: m.state_dict() | {position_key(n): m.positions[None]} for n, m in method.networks.items()}
    model, data = config.model, config.data
    sizes = (model.patch, model.dim, model.depth, model.heads, model.mlp_ratio)
    arch = Arch(data.crop, *sizes, model.predictor_dim, model.predictor_depth, tuple(data.mean), tuple(data.std))
    (folder / "checkpoints" / "step-00000003").mkdir(parents=True)
    save_weights(folder / "checkpoints" / "step-00000003" / "weights.safetensors", Weights(arch, networks))
    save_config(config, folder / "config.yaml")
    return folder


@pytest.fixture
def small(monkeypatch):
    """A tiny decoder, few samples."""
    monkeypatch.setattr(decoder, "CHANNELS", (8, 16))
    monkeypatch.setattr("ijepa_fast.visualise.BATCH", 4)
    monkeypatch.setattr("ijepa_fast.visualise.SAMPLING", 3)
    monkeypatch.setattr(training, "WINDOW", 2)
    monkeypatch.setattr(predicted, "WINDOW", 2)
    monkeypatch.setattr(training, "choose_precision", lambda *_: Precision("fp32", ""))


@pytest.fixture
def run(tmp_path, photos, small):
    """A run with a checkpoint, and a tiny decoder."""
    return leave(tmp_path / "run", photos)


def states(run, kind="prediction"):
    """What a decoder's checkpoint holds, flat."""
    state = torch.load(run / "pictures" / f"{kind}.pt", weights_only=True)
    flat, found = [("", state)], {}
    while flat:
        name, value = flat.pop()
        if isinstance(value, dict):
            flat += [(f"{name}/{key}", part) for key, part in value.items()]
        else:
            found[name] = value
    return found


def test_it_draws_and_checks(run, photos, capsys):
    assert main(["visualise", str(run), *QUICK]) == 0
    printed = capsys.readouterr().out
    results = json.loads((run / "pictures" / "prediction.json").read_text())
    assert (results["steps"], len(results["losses"]), results["held_out"]) == (6, 3, COUNT // 8)
    assert results["made"]["checkpoint"] == "step-00000003"
    (check,) = results["checks"]
    controls = ["shuffled", "moved", "untrained", "nothing"]
    assert list(check["denoising"]) == ["right", *controls, *(f"{name} - right" for name in controls)]
    assert list(check["variance"])[:3] == ["other noise", "other image", "moved"]
    values = np.array([*check["denoising"].values(), *check["variance"].values()])
    assert np.isfinite(values).all()
    for name in controls:  # in the mean over images the difference is that of the means; its error is smaller
        of = check["denoising"]
        assert np.allclose(np.subtract(of[name], of["right"])[:, 0], np.array(of[f"{name} - right"])[:, 0], atol=1e-6)
    assert "denoising: shuffled - right" in printed
    assert "Told another image's feature, the loss inside the block changes by" in printed
    with Image.open(run / "pictures" / "prediction.png") as sheet:
        assert sheet.width > sheet.height > 100


def test_the_report_shows_it(run):
    assert main(["visualise", str(run), *QUICK]) == 0
    step = {"step": 3, "loss": 1.0, "images_per_second": 1.0, "tokens_per_image": 1.0, "data_wait": 0.0, "lr": 1.0}
    (run / "log.jsonl").write_text(json.dumps(step) + "\n")
    page = report(run, count=20)
    assert "Pictures of the prediction" in page
    assert "step-00000003, a decoder of 6 steps" in page
    assert "denoising: moved" in page
    (run / "pictures" / "prediction.json").write_text("{}")
    assert "is not what visualise writes" in report(run, count=20)


def test_stopped_and_gone_on_it_is_the_same_to_the_bit(tmp_path, photos, small, monkeypatch, capsys):
    whole, parts = (leave(tmp_path / name, photos) for name in ("whole", "parts"))
    assert main(["visualise", str(whole), *QUICK]) == 0
    advance = training.Trainer.advance

    def interrupted(trainer):
        advance(trainer)
        if trainer.step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(training.Trainer, "advance", interrupted)
    assert main(["visualise", str(parts), *QUICK]) == 128 + signal.SIGINT
    assert "stopped after step 3, saved; the same command goes on" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is before
    assert states(parts)["/step"] == 3
    assert not (parts / "pictures" / "prediction.png").exists()
    torch.manual_seed(99)
    assert main(["visualise", str(parts), *QUICK]) == 0
    assert "from step 3" in capsys.readouterr().err
    one, other = states(whole), states(parts)
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name], name
    for end in ("json", "png"):
        files = [(folder / "pictures" / f"prediction.{end}").read_bytes() for folder in (whole, parts)]
        if end == "json":
            files = [{key: json.loads(file)[key] for key in ("losses", "checks")} for file in files]
        assert files[0] == files[1]


def test_more_steps_go_on(run):
    assert (
        visualise(run, steps=2, side=16, seeds=1)["losses"] == visualise(run, steps=4, side=16, seeds=1)["losses"][:1]
    )


def test_what_the_decoder_is_told(run, photos):
    """Against each image alone: its context, its blocks one by one, a mean over each."""
    config = load_config(run / "config.yaml")
    networks = conditions.networks_of(run, config)
    source = training_source(config)
    found = conditions.conditions_of(config, networks, source, 20, (16, 16), torch.device("cpu"))
    method, patches = networks.method, (CROP // PATCH) ** 2
    rows = np.random.default_rng(config.seed).permutation(COUNT)[:20]
    for row in (0, 3, 19):
        image = torch.from_numpy(np.array(Image.open(sorted(photos.iterdir())[rows[row]])))[None]
        small = F.interpolate(image.permute(0, 3, 1, 2).float(), (16, 16), mode="bilinear", antialias=True)
        assert torch.equal(found.images[row], small[0].round().byte().permute(1, 2, 0))
        context, blocks = found.context[row], found.blocks[row]
        assert not (context & blocks.any(0)).any()
        tokens = method.patchify(image)
        features = method.probed(tokens, 1)
        for block in range(len(blocks)):
            draw = from_masks(context.nonzero().T[None], blocks[block].nonzero().T[None], patches)
            seen = method.encoder.context(tokens, draw)
            expected = {"target": features[blocks[block]].mean(0)}
            expected |= {
                "prediction": method.predictor(seen, draw).mean(0),
                "untrained": networks.untrained(seen, draw).mean(0),
            }
            for kind in KINDS:
                torch.testing.assert_close(found.pooled[kind][row, block], expected[kind], rtol=1e-4, atol=1e-5)
    told = found.told("prediction")[found.held :].flatten(0, 1)
    torch.testing.assert_close(told.mean(0), torch.zeros(32), rtol=0, atol=1e-4)
    torch.testing.assert_close(told.std(0, correction=0), torch.ones(32), rtol=0, atol=1e-3)


def quarters_of(count=6, blocks=2, side=8):
    """Conditions whose blocks are quarters of the image: of block m the quarter m."""
    quarters = torch.arange(16).view(2, 2, 2, 2).permute(0, 2, 1, 3).reshape(4, 4)
    masks = torch.zeros(4, 16, dtype=torch.bool).scatter_(1, quarters, True)[[0, 3][:blocks]]
    images = torch.full((count, side, side, 3), 128, dtype=torch.uint8)
    told = torch.arange(count * blocks, dtype=torch.float32).view(count, blocks, 1)
    pooled = {kind: told.clone() for kind in KINDS}
    pooled["untrained"] = told.flip(0)
    return Conditions(
        images, ~masks.any(0).expand(count, 16), masks.expand(count, blocks, 16), pooled, (4, 4), count // 2
    )


def test_blocks_as_pixels_and_the_other_block():
    conditions = quarters_of()
    masks = conditions.pixels(conditions.blocks[0])
    assert masks[0].nonzero().tolist() == [[y, x] for y in range(4) for x in range(4)]
    assert masks[1].nonzero().tolist() == [[y, x] for y in range(4, 8) for x in range(4, 8)]
    assert conditions.other_block().tolist() == [[1, 0]] * 6
    assert quarters_of(blocks=1).other_block().tolist() == [[0]] * 6


def test_variances_of_samples_that_are_known():
    """Samples = image's number inside the block + noise's number outside of it."""
    conditions = quarters_of()
    rows, inside = torch.arange(3), conditions.pixels(conditions.blocks[0, 0]).float()
    images, noises = torch.tensor([0.0, 0.3, 0.9]), torch.tensor([0.1, 0.2, 0.6, 0.7])
    own = images[:, None, None, None, None] * inside + noises[:, None, None, None] * (1 - inside)
    own = own.expand(3, 4, 3, 8, 8)
    samples = checks.Samples(rows * 0, rows * 0 + 1, own, own + 0.2, None)
    found = checks.variances(conditions, samples)
    assert found.keys() == {"other noise", "other image", "moved"}
    of_noise = float(noises.var())
    assert found["other noise"][1:] == [
        (pytest.approx(0, abs=1e-9), pytest.approx(0, abs=1e-9)),
        (pytest.approx(of_noise), pytest.approx(0, abs=1e-9)),
    ]
    assert found["other noise"][0][0] == pytest.approx(of_noise * 48 / 64)
    shares = (images - images.mean()).square() * 3 / 2
    assert found["other image"][1] == (
        pytest.approx(float(images.var())),
        pytest.approx(float(shares.std() / math.sqrt(3))),
    )
    assert found["other image"][2][0] == pytest.approx(0, abs=1e-9)
    assert found["moved"][0] == (pytest.approx(0.02), pytest.approx(0, abs=1e-8))


def test_denoising_losses_that_are_known():
    """Of a decoder that errs by the square of what it is told inside the first block, and by 5 if told nothing."""
    conditions = quarters_of()
    inside = conditions.pixels(conditions.blocks[0, 0]).float()

    def errors(images, noise, times, told, keep):
        assert ((times >= 300) & (times < 700)).all()
        wrong = torch.where(keep[:, None, None], told.square()[:, :, None] * inside, torch.tensor(5.0))
        return None, wrong[:, None].expand(images.shape)

    told = {kind: conditions.told(kind)[:3] for kind in KINDS}
    fake = SimpleNamespace(alphas=torch.zeros(1), errors=errors)
    found = checks.denoising(fake, conditions, "prediction", seed=3)
    blocks = torch.from_numpy(np.random.default_rng((3, 1)).integers(2, size=3))
    rows, quarter = torch.arange(3), 16 / 64
    right = told["prediction"][rows, blocks, 0].square()
    shuffled = told["prediction"][rows, blocks, 0].roll(1).square()
    assert found["right"][0] == (
        pytest.approx(float(right.mean()) * quarter),
        pytest.approx(float(right.std()) * quarter / math.sqrt(3)),
    )
    difference = (shuffled - right) * quarter
    assert found["shuffled - right"][0] == (
        pytest.approx(float(difference.mean())),
        pytest.approx(float(difference.std()) / math.sqrt(3)),
    )
    moved = told["prediction"][rows, 1 - blocks, 0].square()
    assert found["moved"][0][0] == pytest.approx(float(moved.mean()) * quarter)
    untrained = told["untrained"][rows, blocks, 0].square()
    assert found["untrained"][0][0] == pytest.approx(float(untrained.mean()) * quarter)
    assert found["nothing"][0] == (pytest.approx(5.0), pytest.approx(0.0))


@pytest.mark.parametrize(
    ("crop", "side", "size", "fold"),
    [
        ((64, 64), 32, (32, 32), 2),
        ((224, 224), 64, (64, 64), 4),
        ((16, 16), 32, (16, 16), 1),
        ((28, 28), 32, (28, 28), 2),
        ((64, 128), 32, (32, 64), 2),
        ((96, 32), 8, (24, 8), 1),
    ],
)
def test_the_decoder_draws_in_any_shape(crop, side, size, fold):
    assert conditions.size_of_pictures(crop, side) == (size, fold)
    drawn = decoder.Decoder(5, size, fold, (8, 16)).sample(torch.zeros(2, 5), torch.randn(2, 3, *size), 2)
    assert drawn.shape == (2, 3, *size)
    assert 0 <= drawn.min() < drawn.max() <= 1


def test_errors_of_noise_and_of_v():
    """v is a turn of noise and image; from a true v the image comes back."""
    torch.manual_seed(0)
    model = decoder.Decoder(5, (16, 16), 1, (8, 16))
    images, noise, times = torch.rand(3, 3, 16, 16) * 2 - 1, torch.randn(3, 3, 16, 16), torch.tensor([10, 500, 990])
    told = torch.randn(3, 5)
    kept = model.alphas[times].view(-1, 1, 1, 1).double()
    noisy = (kept.sqrt() * images + (1 - kept).sqrt() * noise).float()
    v = model(noisy, times, told).double()
    predicted_noise = (1 - kept).sqrt() * noisy + kept.sqrt() * v
    of_v, of_noise = model.errors(images, noise, times, told)
    torch.testing.assert_close(of_noise.double(), (predicted_noise - noise).square(), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(
        of_v.double(), (v - (kept.sqrt() * noise - (1 - kept).sqrt() * images)).square(), rtol=1e-3, atol=1e-5
    )
    nothing = torch.zeros(3, dtype=torch.bool)
    with torch.no_grad():
        assert torch.equal(model(noisy, times, told, nothing), model(noisy, times, -told, nothing))
        assert not torch.equal(model(noisy, times, told), model(noisy, times, -told))


def test_a_decoder_learns_to_draw_what_it_is_told(monkeypatch):
    """Black where it is told -1, white where 1."""
    monkeypatch.setattr(training, "RATE", 4e-3)
    monkeypatch.setattr(training, "WARMUP", 10)
    torch.manual_seed(0)
    values = torch.tensor([0, 255], dtype=torch.uint8).repeat(20)
    images = values.view(-1, 1, 1, 1).expand(-1, 8, 8, 3).contiguous()
    pooled = {"prediction": values.float().view(-1, 1, 1)}
    told = Conditions(images, torch.ones(40, 4).bool(), torch.ones(40, 1, 4).bool(), pooled, (2, 2), 8)
    trainer = training.Trainer(decoder.Decoder(1, (8, 8), 1, (8, 16)), told, "prediction", 16, 0, torch.device("cpu"))
    for _ in range(90):
        trainer.advance()
    drawn = trainer.drawing.sample(torch.tensor([[-1.0], [1.0]]), torch.randn(2, 3, 8, 8), 10)
    assert drawn[0].mean() < 0.3 < 0.7 < drawn[1].mean()


def error_of(capsys, *arguments):
    """The one sentence that the command ends with."""
    assert main(["visualise", *map(str, arguments)]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    return error


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.source=synthetic"], "data.source=synthetic has no images to show; name some with --images"),
        (["data.source=module:function"], "is code, which only training imports; name images with --images"),
        (["data.source=/nowhere"], "/nowhere"),
    ],
)
def test_runs_without_images(tmp_path, photos, small, capsys, overrides, words):
    run = leave(tmp_path / "run", photos, *overrides)
    assert words in error_of(capsys, run)
    assert not (run / "pictures" / "conditions.pt").exists()


def test_no_predictor(tmp_path, photos, small, capsys):
    config = load_config(ROOT / "configs" / "mae_cifar10.yaml", [f"data.source={photos}"])
    save_config(config, tmp_path / "config.yaml")
    assert "objective.method=mae has no predictor of target blocks" in error_of(capsys, tmp_path)


def test_no_run_and_no_checkpoint(tmp_path, run, capsys):
    assert "expected the folder of a run" in error_of(capsys, tmp_path)
    weights = run / "checkpoints" / "step-00000003" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    assert str(weights) in error_of(capsys, run)
    weights.unlink()
    weights.parent.rmdir()
    assert "the run has no complete checkpoint yet" in error_of(capsys, run)


def test_weights_without_a_predictor_and_of_another_architecture(tmp_path, photos, small, capsys):
    run = leave(tmp_path / "run", photos)
    path = run / "checkpoints" / "step-00000003" / "weights.safetensors"
    from ijepa_fast.interop.weights import load_weights

    weights = load_weights(path)
    weights.networks.pop("predictor")
    path.unlink()  # the file lies in memory
    save_weights(path, weights)
    assert "the file has no predictor" in error_of(capsys, run)
    other = leave(tmp_path / "other", photos, "model.dim=64")
    path.write_bytes((other / path.relative_to(run)).read_bytes())
    assert "the architectures differ" in error_of(capsys, run)


def test_without_diffusers(run, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert "pip install ijepa_fast[visualise]" in error_of(capsys, run)


def test_one_image(tmp_path, run, photos, capsys):
    folder = tmp_path / "one"
    folder.mkdir()
    (folder / "a.png").write_bytes((photos / "00.png").read_bytes())
    assert "expected at least 16 images to train a decoder on, got 1" in error_of(capsys, run, "--images", folder)
    assert "got 3" in error_of(capsys, run, "--count", 3)


def test_other_settings_and_damaged_files(run, capsys):
    assert main(["visualise", str(run), *QUICK]) == 0
    capsys.readouterr()
    assert "count=10000 then, 20 now; remove it to begin anew" in error_of(capsys, run, *QUICK, "--count", 20)
    (run / "pictures" / "prediction.pt").write_bytes(b"nothing")
    assert "prediction.pt: cannot be read" in error_of(capsys, run, *QUICK)
    (run / "pictures" / "conditions.pt").write_bytes(b"nothing")
    assert "conditions.pt: cannot be read" in error_of(capsys, run, *QUICK)
    (run / "checkpoints" / "step-00000003").rename(run / "checkpoints" / "step-00000009")
    (run / "pictures" / "conditions.pt").unlink()
    assert main(["visualise", str(run), *QUICK, "--of", "target"]) == 0


@pytest.mark.parametrize(("option", "value"), [("--side", "1000"), ("--guidance", "-1"), ("--guidance", "nan")])
def test_options_out_of_range(run, capsys, option, value):
    assert f"{option}: expected" in error_of(capsys, run, option, value)


def test_thirteen_channels(tmp_path, small, capsys):
    """Of 16 bits: the first three are drawn, and it is said."""
    rng = np.random.default_rng(0)
    (tmp_path / "data").mkdir()
    for number in range(20):
        np.save(tmp_path / "data" / f"{number:02}.npy", rng.integers(0, 4000, (CROP, CROP, 13), dtype=np.uint16))
    more = ["data.channels=13", f"data.mean={[0.03] * 13}", f"data.std={[0.02] * 13}", "data.depth=uint16"]
    run = leave(tmp_path / "run", tmp_path / "data", *more)
    assert main(["visualise", str(run), *QUICK]) == 0
    assert "of 13 channels the first three are drawn; the encoder saw all" in capsys.readouterr().err
    images = torch.load(run / "pictures" / "conditions.pt", weights_only=True)["images"]
    assert images.shape == (20, 16, 16, 3)
    assert images.dtype == torch.uint8
    assert len(images.unique()) > 200
