"""Every method through the trainer and every command; and a method of somebody else's, which is one file."""

import json
import shutil
import subprocess
import sys

import pytest
import torch

from tests.launch import ROOT, TINY, finish, losses, run, some, start, unlaunched

pytest.importorskip("deepspeed")
pytest.importorskip("nvidia.dali")
pytest.importorskip("PIL")

from safetensors.torch import load_file

import ijepa_fast
from ijepa_fast import probe, report
from ijepa_fast.config import ConfigError, load_config
from ijepa_fast.interop import export
from ijepa_fast.interop.load import read
from ijepa_fast.methods.method import METHODS, Method, method_class
from ijepa_fast.run.build import build_method
from ijepa_fast.train import main as train
from tests.data_images import write_photos

TOKENS = f"tokenizer: {ROOT / 'tests' / 'data' / 'patch_tokens.safetensors'}, vocabulary: 32, token_patch: 4"
# The config that each method is tried with, and what makes it small.
TRIED = {
    "ijepa": ("quickstart", ["mask.padding=false"]),
    "mae": ("mae_cifar10", ["mask.min_keep=null", "model.predictor_dim=32"]),
    "ibot": (
        "ibot_cifar10",
        [
            "mask.min_keep=null",
            "objective.options={small_crops: 2, hidden: 16, bottleneck: 8, prototypes: 32}",
        ],
    ),
    "simmim": ("simmim_cifar10", ["mask.min_keep=null"]),
    "data2vec": ("data2vec_cifar10", ["mask.min_keep=null", "objective.options={masked: 20, smallest: 4, layers: 2}"]),
    "beit": ("beit_cifar10", ["mask.min_keep=null", f"objective.options={{{TOKENS}, masked: 20, smallest: 4}}"]),
    "cae": (
        "cae_cifar10",
        ["mask.min_keep=null", f"objective.options={{{TOKENS}, masked: 20, smallest: 4, width: 16}}"],
    ),
    "dino": (
        "dino_cifar10",
        [
            "mask.min_keep=null",
            "objective.options={small_crops: 2, hidden: 16, bottleneck: 8, prototypes: 32, norm_last_layer: false}",
        ],
    ),
    "lejepa": (
        "lejepa_cifar10",
        [
            "mask.min_keep=null",
            "objective.options={views: 2, small_views: 2, slices: 16, bottleneck: 16, hidden: 32, embedding: 8}",
        ],
    ),
    "msn": (
        "msn_cifar10",
        [
            "mask.min_keep=null",
            "objective.options={small_anchors: 2, patch_drop: 0.3, hidden: 16, out: 8, prototypes: 32, drop_path: 0.1}",
        ],
    ),
    "toy": ("mae_cifar10", ["mask.min_keep=null", "objective.method=tests.toy_method"]),
}
HEADED = ["target_encoder", "target_head"]
CARRIED = {"ibot": 2, "dino": 1, "msn": 8, "toy": 1}  # tensors that lie in a checkpoint beside the weights
AVERAGED = {
    "mae": [],
    "simmim": [],
    "beit": [],
    "lejepa": [],
    "cae": [],
    "ibot": HEADED,
    "dino": HEADED,
    "msn": HEADED,
}  # where not the encoder alone
BY_CLASS = {"ibot", "dino", "msn", "lejepa"}  # read by the class token
# What batch norm takes out again: the gradient is rounding, and Adam makes steps of that.
UNMOVED = {"msn": {"encoder.norm.bias", "head.fc1.bias", "head.fc2.bias"}}
NO_CLASS_TOKEN = {"ijepa", "toy"}
BEITS = {"simmim", "data2vec", "beit", "cae"}  # whose encoder has no key bias: a BeitModel
OTHERS = [name for name in TRIED if name != "ijepa"]  # what the trainer's own tests do not train


def options_of(name, *more):
    config, options = TRIED[name]
    return config, [*options, *more]


def train_small(runs, name, *more, ranks=1):
    config, options = options_of(name, *more)
    return run(runs, *options, config=config, ranks=ranks)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Labelled images, two classes."""
    folder = tmp_path_factory.mktemp("photos")
    for label in ("left", "right"):
        write_photos(folder / label, 20, size=40)
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory, photos):
    """The folder of a finished run of each method, trained when it is first asked for."""
    runs, found = tmp_path_factory.mktemp("runs"), {}

    def of(name):
        if name not in found:
            images = (f"data.source={photos}", "data.flip=false", "optim.epochs=4", "optim.steps=3")
            found[name] = train_small(runs, name, f"name={name}", *images)
        return found[name]

    return of


def checkpoint(folder, step):
    """Every tensor of a checkpoint's rank files."""
    tensors = {}
    for path in sorted((folder / "checkpoints" / f"step-{step:08d}").glob("rank-*")):
        tensors |= load_file(path)
    return tensors


def test_every_registered_method_is_tried():
    assert set(TRIED) - {"toy"} == set(METHODS)
    assert all(issubclass(method_class(name), Method) for name in METHODS)


@pytest.mark.slow
@pytest.mark.parametrize("name", some(OTHERS, "mae", "dino", "msn"))
def test_resumed_is_bitwise_unbroken(tmp_path, photos, name):
    """Views, masks, dropped branches, temperatures and what is carried are part of it; an epoch is 5 steps."""
    options = (f"data.source={photos}", "optim.epochs=4")
    unbroken = train_small(tmp_path, name, "name=unbroken", "optim.steps=6", *options)
    train_small(tmp_path, name, "name=broken", "optim.steps=3", *options)
    broken = train_small(tmp_path, name, "name=broken", "optim.steps=6", *options)
    assert losses(broken) == losses(unbroken)
    expected, found = checkpoint(unbroken, 6), checkpoint(broken, 6)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    carried = [tensor for key, tensor in found.items() if "|carried|" in key]
    assert len(carried) == CARRIED.get(name, 0)
    assert all(tensor.any() for tensor in carried)
    assert json.loads((broken / "summary.json").read_text())["steps"] == 6


@pytest.mark.slow
@pytest.mark.multi_rank
@pytest.mark.parametrize("name", some(OTHERS, "dino"))
def test_every_stage_gives_the_trajectory_of_stage_1(tmp_path, name):
    """On two ranks, where the statistics of a loss are one; of DINO with each parameter's gradient clipped."""
    options = ("optim.steps=3",)
    folders = [
        train_small(tmp_path, name, f"name=stage{stage}", f"engine.zero={stage}", *options, ranks=2)
        for stage in (1, 0, 2, 3)
    ]
    expected, *found = (load_file(f / "checkpoints" / "step-00000003" / "weights.safetensors") for f in folders)
    for folder, weights in zip(folders[1:], found, strict=True):
        assert losses(folder) == pytest.approx(losses(folders[0]), rel=1e-5), folder.name
        for key, tensor in expected.items():
            if key.removeprefix("target_") not in UNMOVED.get(name, ()):
                torch.testing.assert_close(weights[key], tensor, rtol=1e-3, atol=1e-5, msg=f"{folder.name} {key}")


@pytest.mark.slow
@pytest.mark.parametrize("name", TRIED)
class TestEveryRunCanBeUsed:
    """load, probe, export, report and init on a finished run of each method."""

    def test_load(self, finished, name):
        encoder = ijepa_fast.load(finished(name))
        features = encoder(torch.randint(256, (3, 32, 32, 3), dtype=torch.uint8))
        assert features.shape == (3, 1 if name in BY_CLASS else 64, 32)
        assert features.isfinite().all()
        weights = read(finished(name))
        averaged = [network for network in weights.networks if network.startswith("target_")]
        assert averaged == AVERAGED.get(name, ["target_encoder"])
        with pytest.raises(ValueError, match="'target_encoder' or 'encoder'"):
            ijepa_fast.load(finished(name), network="head")

    def test_probe(self, finished, photos, name, tmp_path, capsys):
        out = tmp_path / "figures.json"
        command = ["--checkpoint", str(finished(name)), "--data", str(photos), "--test", str(photos), "--out", str(out)]
        assert probe.main(command) == 0
        assert "linear" in capsys.readouterr().out
        assert json.loads(out.read_text())

    def test_a_last4_probe_needs_layers(self, finished, photos, name, capsys):
        command = ["--checkpoint", str(finished(name)), "--data", str(photos), "--test", str(photos)]
        assert probe.main([*command, "--features", "last4"]) == 1
        assert "the encoder has 2 layers" in capsys.readouterr().err

    @pytest.mark.parametrize("form", ["hf", "timm", "safetensors"])
    def test_export(self, finished, name, form, tmp_path):
        """What is written gives the same features when it is loaded again, by this project."""
        out = tmp_path / ("out.safetensors" if form == "safetensors" else "out")
        if form == "timm" and name in BEITS:
            assert export.main(["--checkpoint", str(finished(name)), "--format", form, "--out", str(out)]) == 1
            assert not out.exists()
            return
        assert export.main(["--checkpoint", str(finished(name)), "--format", form, "--out", str(out)]) == 0
        images = torch.randint(256, (3, 32, 32, 3), dtype=torch.uint8)
        torch.testing.assert_close(ijepa_fast.load(out)(images), ijepa_fast.load(finished(name))(images))

    def test_transformers_reads_it(self, finished, name, tmp_path):
        transformers = pytest.importorskip("transformers")
        assert export.main(["--checkpoint", str(finished(name)), "--format", "hf", "--out", str(tmp_path / "hf")]) == 0
        model, loading = transformers.AutoModel.from_pretrained(tmp_path / "hf", output_loading_info=True)
        assert not loading["unexpected_keys"]
        assert not [key for key in loading["missing_keys"] if "pooler" not in key]
        kind = "IJepaModel" if name in NO_CLASS_TOKEN else "BeitModel" if name in BEITS else "ViTModel"
        assert type(model).__name__ == kind
        encoder = ijepa_fast.load(finished(name))
        images = torch.randint(256, (3, 32, 32, 3), dtype=torch.uint8)
        mean, std = (torch.tensor(values)[:, None, None] for values in (encoder.mean, encoder.std))
        pixels = (images.permute(0, 3, 1, 2).float() / 255 - mean) / std
        with torch.no_grad():
            tokens = model.eval()(pixels).last_hidden_state
        if name not in NO_CLASS_TOKEN:
            tokens = tokens[:, :1] if name in BY_CLASS else tokens[:, 1:]
        assert (encoder(images) - tokens).abs().max() < 1e-5

    def test_the_published_layout_is_ijepas(self, finished, name, tmp_path, capsys):
        out = tmp_path / "out.pth.tar"
        status = export.main(["--checkpoint", str(finished(name)), "--format", "reference", "--out", str(out)])
        assert status == (0 if name == "ijepa" else 1)
        if status:
            assert "take hf, timm or safetensors" in capsys.readouterr().err
            assert not out.exists()

    def test_report(self, finished, name, photos, tmp_path, capsys):
        out = tmp_path / "report.html"
        command = [str(finished(name)), "--images", str(photos), "--sample", "20", "--out", str(out)]
        assert report.main(command) == 0
        page = out.read_text()
        assert "Nearest neighbours" in page
        assert ("only registered methods are imported" in page) == (name == "toy")

    def test_init(self, finished, name, tmp_path):
        """A run that does not move begins with the weights it was given."""
        still = ["optim.steps=1", "optim.start_lr=0", "optim.lr=0", "optim.final_lr=0", "optim.ema=1"]
        folder = train_small(tmp_path, name, f"init={finished(name)}", *still)
        given, found = (read(path).networks for path in (finished(name), folder))
        assert given.keys() == found.keys()
        for network, state in given.items():
            assert all(torch.equal(found[network][key], tensor) for key, tensor in state.items()), network


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ijepa", "mae", "ibot", "simmim"])
def test_init_from_another_librarys_folder(finished, name, tmp_path):
    """A run that does not move has the exported encoder's features."""
    assert export.main(["--checkpoint", str(finished(name)), "--format", "hf", "--out", str(tmp_path / "hf")]) == 0
    still = ["optim.steps=1", "optim.start_lr=0", "optim.lr=0", "optim.final_lr=0", "optim.ema=1"]
    images = torch.randint(256, (3, 32, 32, 3), dtype=torch.uint8)
    if name == "ibot":  # the format has no embedding of masked patches
        statuses, errors = finish(
            start(tmp_path, *options_of(name, f"init={tmp_path / 'hf'}")[1], config="ibot_cifar10")
        )
        assert statuses == [1]
        assert "encoder.masked_embed" in errors
        return
    folder = train_small(tmp_path, name, f"init={tmp_path / 'hf'}", *still)
    torch.testing.assert_close(ijepa_fast.load(folder)(images), ijepa_fast.load(finished(name))(images))


def test_a_method_of_somebody_elses_is_one_file(finished):
    """Its terms are in the log, its options in the saved configuration, its name in the checkpoint."""
    folder = finished("toy")
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert all(r["loss_terms"]["doubled"] == pytest.approx(2 * r["loss"]) for r in records)
    assert load_config(folder / "config.yaml").objective.options == {"noise": 0.1}
    assert read(folder).arch.method == "tests.toy_method"


def test_a_method_is_found_in_the_working_folder(tmp_path):
    """Under a launcher too, which does not put it on the search path."""
    shutil.copy(ROOT / "tests" / "toy_method.py", tmp_path / "somebodys_method.py")
    script = [sys.executable, str(ROOT / "ijepa_fast" / "train.py"), "--config", "mae_cifar10", *TINY]
    options = ["mask.min_keep=null", "objective.method=somebodys_method", f"runs={tmp_path}", "optim.steps=1"]
    done = subprocess.run(
        [*script, *options], cwd=tmp_path, env=unlaunched(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("config", "overrides", "words"),
    [
        ("mae_cifar10", ["objective.options={maksed: 0.5}"], ["objective.options.maksed", "did you mean", "masked"]),
        ("mae_cifar10", ["objective.options={masked: much}"], ["objective.options.masked", "much"]),
        ("mae_cifar10", ["mask.strategy=block"], ["mask", "draws its own masks"]),
        ("mae_cifar10", ["objective.method=bench.baselines.may"], ["objective.method", "bench.baselines.may", "ijepa"]),
        ("mae_cifar10", ["objective.method=ijepa_fast.masks.draw"], ["one subclass", "found 0"]),
        ("mae_cifar10", ["objective.method=..draw"], ["objective.method", "import path"]),
        ("mae_cifar10", ["engine.cuda_graphs=on", "objective.method=ibot"], ["engine.cuda_graphs=on", "ibot"]),
        ("mae_cifar10", ["engine.target_precision=fp8"], ["engine.target_precision=fp8", "mae"]),
        ("mae_cifar10", ["engine.target_stream=true"], ["engine.target_stream=true", "mae"]),
        ("ibot_cifar10", ["objective.options.small_crops=0"], ["objective.options.small_crops", "at least 1"]),
        ("quickstart", ["objective.options={bottleneck: 5}"], ["objective.options.bottleneck", "loss, target"]),
        ("quickstart", ["model.predictor_dim=102"], ["model.predictor_dim=102", "model.heads=4"]),
        ("mae_cifar10", ["objective.options.masked=1"], ["objective.options.masked", "64 patches"]),
        ("mae_cifar10", ["model.predictor_dim=100"], ["model.predictor_dim=100", "multiple of 32"]),
        ("ibot_cifar10", ["objective.options.temperature=0"], ["objective.options.temperature", "more than 0"]),
        ("quickstart", ["mask.policy=budget", "mask.budget=100"], ["mask.budget", "64 patches", "100"]),
        ("data2vec_cifar10", ["objective.options.largest=3"], ["objective.options.largest", "smallest=", "got 3"]),
        ("quickstart", ["objective.options.loss=l1"], ["objective.options.loss", "smooth_l1", "l1"]),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, list) else None,
)
def test_mistakes_name_the_key(config, overrides, words):
    with pytest.raises(ConfigError) as error:
        build_method(load_config(ROOT / "configs" / f"{config}.yaml", overrides))
    for word in words:
        assert word in str(error.value)


BROKEN = {
    "no_work": ("    def work", "    def labour", "Toy lacks work of the contract"),
    "capability": ("    Options = Options", "    capabilities = frozenset({'speed'})", "got speed"),
    "promise": ("    Options = Options", "    capabilities = frozenset({'forecast'})", "lacks saved_values"),
    "two": ("class Toy(", "class First(Method):\n    pass\n\n\nclass Toy(", "found 2"),
    "draw": (
        "step: int, first: int = 0, batch: int | None = None)",
        "step: int, rank: int = 0)",
        "Toy.draw: expected (images, seed, step, first, batch)",
    ),
    "options": ("    Options = Options", "    Options = dict", "Toy.Options: expected a dataclass"),
    "syntax": ("class Toy(", "class Toy)(", "objective.method"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_method_without_a_part_of_the_contract_is_named(tmp_path, monkeypatch, kind):
    old, new, words = BROKEN[kind]
    source = (ROOT / "tests" / "toy_method.py").read_text()
    (tmp_path / f"broken_{kind}.py").write_text(source.replace(old, new))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=f"objective.method.*broken_{kind}") as error:
        method_class(f"broken_{kind}")
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (
            "self.encoder = Encoder(",
            "self.network = Encoder(",
            "Toy.encoder: expected an ijepa_fast.models.vit.Encoder",
        ),
        ("return loss, {", "return loss  # {", "Toy.forward: expected (loss, its terms by name), got Tensor"),
    ],
    ids=["encoder", "loss"],
)
def test_what_only_a_run_shows_of_a_method_is_named(tmp_path, old, new, words):
    source = (ROOT / "tests" / "toy_method.py").read_text()
    changed = source.replace(old, new)
    if "self.network" in new:
        changed = changed.replace('self.keep_average("encoder")', "pass")
    (tmp_path / "unfinished_method.py").write_text(changed)
    script = [sys.executable, str(ROOT / "ijepa_fast" / "train.py"), "--config", "mae_cifar10", *TINY]
    options = ["mask.min_keep=null", "objective.method=unfinished_method", f"runs={tmp_path}", "optim.steps=1"]
    done = subprocess.run(
        [*script, *options], cwd=tmp_path, env=unlaunched(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 1
    assert f"error: {'objective.method=unfinished_method: ' if 'encoder' in words else ''}{words}" in done.stderr


def test_a_package_may_hand_on_its_method(tmp_path, monkeypatch):
    (tmp_path / "handing_on.py").write_text("from tests.toy_method import Toy\n")
    monkeypatch.chdir(tmp_path)
    assert method_class("handing_on").__name__ == "Toy"


def test_the_whole_import_path_of_a_registered_method_is_its_name():
    config = load_config("quickstart", ["objective.method=ijepa_fast.methods.ijepa"])
    assert config.objective.method == "ijepa"


def test_maes_decoder_has_heads_of_its_own():
    """As published: a decoder 512 wide beside a ViT-S, whose six heads do not divide it."""
    config = load_config("mae_vith14_ep1600", ["model.arch=vit_small", "model.patch=16"])
    with torch.device("meta"):
        assert build_method(config).decoder.dim == 512


def test_the_trainer_says_so_too(tmp_path):
    statuses, errors = finish(start(tmp_path, "objective.method=nowhere", "mask.min_keep=null", config="mae_cifar10"))
    assert statuses == [1]
    assert "error: objective.method" in errors


@pytest.mark.slow
def test_a_checkpoint_of_another_method_is_named(finished, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    shutil.copytree(finished("mae"), tmp_path / "run")
    config, options = options_of("toy", f"runs={tmp_path}", "name=run")
    assert train(["--config", config, *TINY, *options]) == 1
    errors = capsys.readouterr().err
    assert "is a checkpoint of objective.method=mae" in errors
    assert "set another name" in errors


@pytest.mark.slow
def test_weights_of_another_kind_of_encoder_are_named(finished, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    config, options = options_of("toy", f"runs={tmp_path}", f"init={finished('mae')}")
    assert train(["--config", config, *TINY, *options]) == 1
    assert "init: the weights are mae's" in capsys.readouterr().err
