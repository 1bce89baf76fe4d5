"""The probe command: every probe, from weights in a file to the JSON; low-shot learning; bad input."""

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

pytest.importorskip("nvidia.dali")

from PIL import Image

from ijepa_fast.__main__ import main
from ijepa_fast.data.scenes import ensure_scenes
from ijepa_fast.eval.attentive import AttentiveProtocol
from ijepa_fast.eval.evaluate import OF_IMAGES, Options, evaluate, read_split
from ijepa_fast.eval.figures import ERRORS, figures_of, overview, table
from ijepa_fast.eval.labels import open_labelled
from ijepa_fast.eval.lowshot import FineTuning, draw_share, fine_tune, parameter_groups
from ijepa_fast.interop.load import PretrainedEncoder, load
from ijepa_fast.interop.weights import Arch, Weights, save_weights
from ijepa_fast.models.initial import init_weights
from ijepa_fast.models.vit import Encoder
from ijepa_fast.run.provenance import FORMAT

ARCH = Arch(image_size=32, patch=8, dim=32, depth=4, heads=2)
CLASSES = {"dots": 2, "stripes": 8}


def random_weights(arch=ARCH, seed=0):
    """An encoder nobody trained, and another one as its target encoder."""
    states = []
    for offset in range(2):
        torch.manual_seed(seed + offset)
        encoder = Encoder(**arch.encoder_options()).apply(init_weights)
        states.append(encoder.state_dict() | {"pos_embed": encoder.positions[None]})
    return Weights(arch, {"encoder": states[0], "target_encoder": states[1]})


def write_images(root, each, seed):
    """Two classes, stripes of one width or the other in colours that say nothing."""
    generator = np.random.default_rng(seed)
    for name, period in CLASSES.items():
        (root / name).mkdir(parents=True)
        for i in range(each):
            wave = (np.arange(32) + generator.integers(period)) // (period / 2) % 2
            colours = generator.integers(0, 256, (2, 3))
            image = np.where(wave[None, :, None] > 0, colours[0], colours[1]) * np.ones((32, 1, 1))
            Image.fromarray(image.astype(np.uint8)).save(root / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Weights, training and test images."""
    root = tmp_path_factory.mktemp("probe")
    save_weights(root / "weights.safetensors", random_weights())
    write_images(root / "train", 40, 0)
    write_images(root / "test", 20, 1)
    return root


def command(files, *options):
    """The command line on `files`."""
    where = ["--checkpoint", files / "weights.safetensors", "--data", files / "train", "--test", files / "test"]
    return ["probe", *map(str, where), *(() if "--device" in options else ("--device", "cpu")), *options]


def test_every_probe(files, tmp_path, capsys, monkeypatch):
    short = partial(AttentiveProtocol, epochs=2, least_steps=10)
    monkeypatch.setattr("ijepa_fast.eval.attentive.AttentiveProtocol", short)
    tuning = ["--finetune", "small", "--finetune-epochs", "2", "--share", "0.2"]
    names = "linear,knn,retrieval,fewshot,corruption,attentive,lowshot,finetune"
    probes = ["--probes", names, "--features", "last,last4", "--heads", "bn_linear", "--episodes", "30"]
    out = tmp_path / "probes.json"
    assert main(command(files, *probes, *tuning, "--seeds", "2", "--out", str(out))) == 0
    results = json.loads(out.read_text())
    assert results["version"] == FORMAT
    assert results["network"] is None
    assert results["arch"]["dim"] == 32
    assert results["options"]["share"] == 0.2
    figures = {figure.probe: figure for figure in overview(figures_of(results)) if figure.metric not in ERRORS}
    low = "low-shot 0.2 of labels, "
    names = ["linear", "linear, last4", "linear, best"]
    others = [
        "10-NN",
        "20-NN",
        "retrieval",
        "2-way 1-shot",
        "2-way 5-shot",
    ]
    others += ["linear, clean", "linear, noise", "linear, blur", "linear, jpeg", "attentive"]
    assert list(figures) == [*names, *others, low + "linear", low + "fine-tuned"]
    for name, figure in figures.items():
        ranked = name == "retrieval"
        assert (figure.task, figure.metric) == ("class", "mean_average_precision" if ranked else "accuracy")
        assert figure.chance == pytest.approx(0.5, abs=0.05 if ranked else 0)
        assert figure.n == 40
        assert figure.error > 0
        assert len(figure.seeds) == (1 if name.endswith(("-NN", "-shot", "retrieval")) else 2)
    for last, last4, best in zip(*(figures[name].chosen for name in names)):
        assert best == max(last, last4, key=lambda run: run["held_out"])
    assert capsys.readouterr().out == table(overview(figures_of(results))) + "\n"


def test_scenes_know_their_maps(files, tmp_path):
    """Dense probes of the embedded scenes need no maps, which are drawn; they may be named all the same."""
    out = tmp_path / "probes.json"
    scenes = [str(ensure_scenes(tmp_path, count, 32, seed, processes=1)) for count, seed in ((24, 0), (8, 1))]
    options = ["--data", scenes[0], "--test", scenes[1], "--probes", "segmentation,depth", "--out", str(out)]
    assert main(command(files, *options)) == 0
    found = {figure.key: figure for figure in figures_of(json.loads(out.read_text()))}
    assert {key[1:] for key in found if key[0] == "segmentation"} == {
        (probe, metric) for probe in ("linear", "20-NN") for metric in ("mean_iou", "accuracy")
    }
    assert found["depth", "linear", "r2"].value > 0  # the ground is near below and far above
    assert all(figure.n == 8 and figure.error > 0 for figure in found.values())
    same = ["--depth-map", f"{scenes[0]}-maps/depth", "--test-depth-map", f"{scenes[1]}-maps/depth"]
    assert main(command(files, *options, *same)) == 0
    assert {figure.key: figure for figure in figures_of(json.loads(out.read_text()))} == found


def test_an_untrained_encoder_is_a_runs(files, capsys):
    assert main(command(files, "--untrained")) == 1
    assert "--untrained: expected a run's folder" in capsys.readouterr().err


@pytest.mark.gpu
def test_every_probe_on_a_gpu(files, tmp_path):
    """In fp32 the figures that no training is in are the CPU's; bf16 and the trained ones run."""
    found = {}
    for device, precision in (("cpu", "fp32"), ("cuda", "fp32"), ("cuda", "bf16")):
        out = tmp_path / f"{device}-{precision}.json"
        options = ["--probes", ",".join(OF_IMAGES), "--finetune", "small", "--finetune-epochs", "2", "--share", "0.2"]
        assert main(command(files, *options, "--device", device, "--precision", precision, "--out", str(out))) == 0
        found[device, precision] = {f.probe: f.value for f in figures_of(json.loads(out.read_text()))}
    assert len({tuple(probes) for probes in found.values()}) == 1
    assert found["cuda", "fp32"]["10-NN"] == pytest.approx(found["cpu", "fp32"]["10-NN"], abs=0.06)


@pytest.mark.parametrize("network", ["encoder", "target_encoder", None])
def test_networks_and_layers_are_the_ones_asked_for(files, network):
    """Features of the evaluation against ijepa_fast.load's: last layer normalised, last four not; either encoder."""
    part = open_labelled(files / "test")
    images = torch.from_numpy(np.stack([np.array(Image.open(part.source.name(i))) for i in range(3)]))
    encoder, options = load(files / "weights.safetensors", network), Options(crop=32, batch_size=8)
    split = read_split(encoder, part, replace(options, features=("last", "last4")))
    torch.testing.assert_close(split.features["last"][:3], encoder(images).mean(1), atol=1e-4, rtol=1e-4)
    layers = torch.cat([layer.mean(1) for layer in encoder.layers(images, 4)], 1)
    torch.testing.assert_close(split.features["last4"][:3], layers, atol=1e-4, rtol=1e-4)
    alone = read_split(encoder, part, options)
    torch.testing.assert_close(alone.features["last"], split.features["last"], atol=1e-5, rtol=1e-5)


def test_blocks_are_probed_one_by_one_and_the_best_is_chosen_on_held_out_images(files, tmp_path):
    part, encoder = open_labelled(files / "test"), load(files / "weights.safetensors")
    images = torch.from_numpy(np.stack([np.array(Image.open(part.source.name(i))) for i in range(3)]))
    split = read_split(encoder, part, Options(crop=32, batch_size=8, features=("last", "last4", "blocks")))
    blocks = [f"block {number + 1}" for number in range(ARCH.depth)]
    assert list(split.features) == ["last", "last4", *blocks]
    for name, layer in zip(blocks, encoder.layers(images, ARCH.depth)):
        torch.testing.assert_close(split.features[name][:3], layer.mean(1), atol=1e-4, rtol=1e-4)
    out = tmp_path / "probes.json"
    assert main(command(files, "--probes", "linear,knn", "--features", "last,blocks", "--out", str(out))) == 0
    figures = {figure.probe: figure for figure in figures_of(json.loads(out.read_text()))}
    tried = {name: figures[name].chosen[0] for name in ("linear", *(f"linear, {block}" for block in blocks))}
    assert list(figures) == [*tried, "linear, best", "10-NN", "20-NN"]
    best = max(tried, key=lambda name: tried[name]["held_out"])
    assert figures["linear, best"].chosen[0] == tried[best]
    assert figures["linear, best"].value == figures[best].value


def test_the_attentive_probe_reads_patches_of_a_method_read_by_its_class_token(monkeypatch, tmp_path, files):
    arch = replace(ARCH, class_token=True, readout="class")
    encoder = PretrainedEncoder(Encoder(**arch.encoder_options()), arch)
    read = []
    monkeypatch.setattr(
        "ijepa_fast.eval.evaluate.fit_attentive",
        lambda dense, rows, *_, **__: read.append(next(dense.read(rows, 4))[0].shape) or (lambda x: x[:, 0, :2], {}),
    )
    part = open_labelled(files / "test")
    evaluate(encoder, part, part, Options(crop=32, probes=("attentive",)))
    assert read == [(4, 16, 32)]


def test_a_share_of_every_class():
    targets = torch.tensor([0] * 300 + [1] * 100 + [2] * 20)
    drawn = draw_share(targets, 0.01, 0)
    assert targets[drawn].bincount().tolist() == [3, 1, 1]
    assert draw_share(targets, 0.01, 1).tolist() != drawn.tolist()
    assert draw_share(targets, 0.01, 0).tolist() == drawn.tolist()
    with pytest.raises(ValueError, match="--share"):
        draw_share(targets, 1.5, 0)


@pytest.mark.parametrize("arch", [ARCH, replace(ARCH, class_token=True, readout="class")], ids=["patches", "class"])
def test_rates_fall_by_layer(arch):
    """Embeddings below block 0 below ... below final norm and head; no decay of biases and norms."""
    from ijepa_fast.eval.lowshot import Classifier

    encoder = PretrainedEncoder(Encoder(**arch.encoder_options()), arch)
    classifier = Classifier(encoder, 3)
    groups = parameter_groups(classifier, 1.0, 0.75, 0.05)
    names = {parameter: name for name, parameter in classifier.named_parameters()}
    rates = {names[p]: (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert len(rates) == len(names)
    assert rates["head.weight"] == (1.0, 0.05)
    assert rates["encoder.encoder.norm.bias"] == (1.0, 0.0)
    for layer in range(4):
        name = f"encoder.encoder.blocks.{layer}.mlp.fc1.weight"
        assert rates[name] == (pytest.approx(0.75 ** (4 - layer)), 0.05)
    embeddings = [name for name in rates if name.startswith(("encoder.encoder.patch_embed.", "encoder.encoder.cls"))]
    assert len(embeddings) == (3 if arch.class_token else 2)
    assert [rates[name][0] for name in embeddings] == pytest.approx([0.75**5] * len(embeddings))


def test_fine_tuning_learns_and_leaves_the_encoder_alone(files):
    train, test = open_labelled(files / "train"), open_labelled(files / "test")
    encoder = load(files / "weights.safetensors")
    before = [p.clone() for p in encoder.parameters()]
    rows = np.arange(80)
    protocol = FineTuning(epochs=30, batch=16, rate=3e-3, scale=(0.8, 1.0))
    tuned = fine_tune(encoder, train.source, rows, train.labels["class"], 2, protocol)
    assert all(torch.equal(a, b) for a, b in zip(before, encoder.parameters()))
    assert not any(p.requires_grad for p in encoder.parameters())
    images = torch.from_numpy(np.stack([np.array(Image.open(test.source.name(i))) for i in range(40)]))
    with torch.no_grad():
        assert (tuned(images).argmax(1) == test.labels["class"]).float().mean() > 0.75


def _change(files, tmp_path, change):
    weights = random_weights()
    change(weights.networks["target_encoder"])
    save_weights(tmp_path / "changed.safetensors", weights)
    return ["--checkpoint", str(tmp_path / "changed.safetensors")]


BAD = {
    "missing key": (
        lambda f, t: _change(f, t, lambda state: state.pop("blocks.1.mlp.fc1.weight")),
        ["target_encoder.blocks.1.mlp.fc1.weight", "(128, 32)", "lack it"],
    ),
    "another shape": (
        lambda f, t: _change(f, t, lambda state: state.update({"norm.weight": torch.ones(48)})),
        ["target_encoder.norm.weight", "(32,)", "(48,)"],
    ),
    "another architecture": (
        lambda f, t: _change(f, t, lambda state: state.update({"cls_token": torch.ones(1, 1, 32)})),
        ["target_encoder.cls_token", "(1, 1, 32)", "the model does not"],
    ),
    "image size": (lambda f, t: ["--image-size", "36"], ["image_size", "multiple of the patch, 8", "36"]),
    "no such file": (lambda f, t: ["--checkpoint", "/nowhere"], ["/nowhere does not exist"]),
    "no such data": (lambda f, t: ["--data", "/nowhere"], ["/nowhere", "does not exist"]),
    "classes": (lambda f, t: ["--test", str(write_other(t))], ["'class'", "2 classes", "'cat'"]),
    "one class": (
        lambda f, t: ["--data", str(write_one(t)), "--test", str(write_one(t))],
        ["/one: all images have the same class"],
    ),
    "fewer images than neighbours": (lambda f, t: ["--images", "9"], ["/train: k-NN takes at least 10", "got 9"]),
    "label": (lambda f, t: ["--labels", "kind"], ["--labels kind", "class"]),
    "share": (lambda f, t: ["--probes", "lowshot", "--share", "0"], ["--share", "got 0"]),
    "resize": (lambda f, t: ["--resize", "16"], ["crop", "resize = 16", "32"]),
    "no maps": (lambda f, t: ["--probes", "depth"], ["--probes depth", "--depth-map"]),
}


def write_other(root):
    """Test images of which one class is unknown."""
    for name in ("dots", "cat"):
        (root / "other" / name).mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(root / "other" / name / "0.png")
    return root / "other"


def write_one(root):
    """A dozen images of one class."""
    (root / "one" / "dots").mkdir(parents=True, exist_ok=True)
    for number in range(12):
        Image.new("RGB", (32, 32)).save(root / "one" / "dots" / f"{number}.png")
    return root / "one"


@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_with_one_sentence(files, tmp_path, capsys, case):
    options, words = BAD[case]
    assert main(command(files, *options(files, tmp_path))) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    for word in words:
        assert word in lines[0]


def test_data_without_test(files, capsys):
    where = ["--checkpoint", str(files / "weights.safetensors")]
    assert main(["probe", *where, "--data", str(files / "train")]) == 1
    assert "--data, --test: expected both" in capsys.readouterr().err
    assert main(["probe", *where]) == 1
    assert "no run's folder" in capsys.readouterr().err


def test_last_four_layers_of_three(files, tmp_path, capsys):
    arch = Arch(image_size=32, patch=8, dim=32, depth=3, heads=2)
    save_weights(tmp_path / "shallow.safetensors", random_weights(arch))
    options = ["--checkpoint", str(tmp_path / "shallow.safetensors"), "--features", "last4"]
    assert main(command(files, *options)) == 1
    assert "--features last4: the encoder has 3 layers" in capsys.readouterr().err


def test_another_resolution(files, tmp_path):
    out = tmp_path / "out.json"
    assert main(command(files, "--image-size", "64", "--probes", "knn", "--out", str(out))) == 0
    results = json.loads(out.read_text())
    assert results["arch"]["image_size"] == results["options"]["crop"] == 64
    assert [figure.probe for figure in figures_of(results)] == ["10-NN", "20-NN"]
