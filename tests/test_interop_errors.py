"""Files that are not what they should be: one sentence that names the key and both shapes, and nothing half-loaded."""

import json
import os
import pickle
from dataclasses import replace

import pytest
import torch

pytest.importorskip("safetensors")

from safetensors.torch import load_file, save_file

import ijepa_fast
from ijepa_fast.interop import export
from ijepa_fast.interop.huggingface import save_hf
from ijepa_fast.interop.load import read
from ijepa_fast.interop.timm import save_timm
from ijepa_fast.interop.weights import load_state, save_weights
from ijepa_fast.models.vit import Encoder
from tests.interop_files import HEADS, golden_weights, images, published


@pytest.fixture
def weights(tmp_path):
    return golden_weights(tmp_path / "published.pth.tar")


class Bomb:
    """Unpickling it would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("place", ["opt", "encoder", "alone"])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path, place, legacy):
    bomb = Bomb(tmp_path / "exploded")
    content = bomb if place == "alone" else published() | {place: {"module.x": bomb}}
    torch.save(content, tmp_path / "bad.pth.tar", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match="could run code") as error:
        ijepa_fast.load(tmp_path / "bad.pth.tar", heads=HEADS)
    assert "bad.pth.tar" in str(error.value)
    assert not (tmp_path / "exploded").exists()


def test_a_plain_pickle_is_refused_and_not_run(tmp_path):
    (tmp_path / "bad.pth.tar").write_bytes(pickle.dumps({"encoder": Bomb(tmp_path / "exploded")}))
    with pytest.raises(ValueError, match=r"bad\.pth\.tar"):
        ijepa_fast.load(tmp_path / "bad.pth.tar")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04 cut short"])
@pytest.mark.parametrize("name", ["a.pth.tar", "a.safetensors"])
def test_no_file_of_weights(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=name.replace(".", r"\.")) as error:
        ijepa_fast.load(tmp_path / name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.pop("encoder"), ["key 'encoder'", "target_encoder"]),
        (lambda c: c.update(classifier={}), ["got also ['classifier']"]),
        (lambda c: c["predictor"].pop("module.predictor_embed.weight"), ["'predictor_embed.weight'", "missing"]),
        (lambda c: c["encoder"].pop("module.pos_embed"), ["'pos_embed'", "missing"]),
        (lambda c: c["target_encoder"].pop("module.blocks.1.norm1.bias"), ["blocks.1.norm1.bias", "(96,)", "lack"]),
        (
            lambda c: c["target_encoder"].update({"module.norm.weight": torch.ones(95)}),
            ["target_encoder.norm.weight", "(96,)", "(95,)"],
        ),
        (
            lambda c: c["target_encoder"].update({"module.cls_token": torch.zeros(1, 1, 96)}),
            ["target_encoder.cls_token", "(1, 1, 96)"],
        ),
        (
            lambda c: c["encoder"].update({"module.pos_embed": torch.zeros(1, 65, 96)}),
            ["pos_embed", "(1, n*n, D)", "(1, 65, 96)"],
        ),
        (
            lambda c: c["target_encoder"].update({"module.pos_embed": torch.zeros(1, 64, 48)}),
            ["target_encoder.pos_embed", "(1, 64, 96)", "(1, 64, 48)"],
        ),
        (lambda c: c["encoder"].update({"module.norm.weight": 3}), ["norm.weight", "tensor", "int"]),
    ],
)
def test_a_published_checkpoint_of_another_kind(tmp_path, change, words):
    content = published()
    change(content)
    torch.save(content, tmp_path / "bad.pth.tar")
    with pytest.raises(ValueError) as error:
        ijepa_fast.load(tmp_path / "bad.pth.tar", heads=HEADS)
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


def test_a_width_that_does_not_tell_the_heads(tmp_path):
    torch.save(published(), tmp_path / "a.pth.tar")
    with pytest.raises(ValueError, match="heads: not to be read off weights of width 96"):
        ijepa_fast.load(tmp_path / "a.pth.tar")


def test_nothing_is_half_loaded(weights):
    """A state that fits in all keys but the last leaves the module as it was."""
    encoder = Encoder(**weights.arch.encoder_options())
    before = {key: tensor.clone() for key, tensor in encoder.state_dict().items()}
    state = dict(weights.networks["encoder"])
    del state["norm.bias"]
    with pytest.raises(ValueError, match=r"encoder\.norm\.bias: the model has shape \(96,\), the weights lack it"):
        load_state(encoder, state)
    state = {**weights.networks["encoder"], "pos_embed": torch.zeros(1, 81, 96)}
    with pytest.raises(ValueError, match=r"pos_embed: the model has shape \(1, 64, 96\), the weights \(1, 81, 96\)"):
        load_state(encoder, state)
    after = encoder.state_dict()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())


def test_wrong_image_sizes(weights, tmp_path):
    save_weights(tmp_path / "w.safetensors", weights)
    for size in (60, 0, -8):
        with pytest.raises(ValueError, match=f"multiple of the patch, 8, got {size}"):
            ijepa_fast.load(tmp_path / "w.safetensors", image_size=size)
    encoder = ijepa_fast.load(tmp_path / "w.safetensors")
    for wrong in (images(1, 32), images(1).permute(0, 3, 1, 2), images(1)[0], images(1).float()):
        with pytest.raises(ValueError, match=r"\(B, 64, 64, 3\), or float") as error:
            encoder(wrong)
        assert str(tuple(wrong.shape)) in str(error.value)


def test_paths_without_weights(tmp_path):
    (tmp_path / "run" / "checkpoints" / "draft-00000001").mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    for path, words in (("nowhere", "does not exist"), ("empty", "no weights"), ("run", "no complete checkpoint")):
        with pytest.raises(ValueError, match=words):
            ijepa_fast.load(tmp_path / path)
    with pytest.raises(ValueError, match="target_encoder' or 'encoder', got 'predictor'"):
        ijepa_fast.load(tmp_path, network="predictor")


def test_a_published_checkpoint_without_its_target_encoder_gives_the_other_one_with_a_word(tmp_path):
    content = published()
    content.pop("target_encoder")
    torch.save(content, tmp_path / "a.pth.tar")
    with pytest.warns(UserWarning, match="has no target_encoder"):
        encoder = ijepa_fast.load(tmp_path / "a.pth.tar", heads=HEADS)
    assert torch.equal(encoder.encoder.norm.weight, content["encoder"]["module.norm.weight"])
    word = pytest.warns(UserWarning, match="its encoder is the default")
    with word, pytest.raises(ValueError, match="no target_encoder; choose of encoder, predictor"):
        ijepa_fast.load(tmp_path / "a.pth.tar", network="target_encoder", heads=HEADS)


def test_a_safetensors_file_of_something_else(weights, tmp_path):
    save_file({"encoder.x": torch.zeros(2)}, tmp_path / "a.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="architecture under 'ijepa_fast' in the header"):
        ijepa_fast.load(tmp_path / "a.safetensors")
    save_file({"model.x": torch.zeros(2)}, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match=r"got \['model'\]"):
        ijepa_fast.load(tmp_path / "b.safetensors")
    save_file({"encoder.x": torch.zeros(2)}, tmp_path / "c.safetensors", {"ijepa_fast": json.dumps({"patch": 8})})
    with pytest.raises(ValueError, match="lacks"):
        ijepa_fast.load(tmp_path / "c.safetensors")
    # A header of another architecture than the tensors'.
    save_weights(tmp_path / "d.safetensors", replace(weights, arch=replace(weights.arch, depth=4)))
    with pytest.raises(ValueError, match=r"target_encoder\.blocks\.3\..*: the model has shape .*the weights lack it"):
        ijepa_fast.load(tmp_path / "d.safetensors")


def edit_json(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def edit_tensors(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def query(key, value):
    return lambda tensors: tensors.update({key: value}) if value is not None else tensors.pop(key)


QUERY = "encoder.layer.1.attention.attention.query.weight"


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda f: edit_json(f / "config.json", model_type="vit"), ["config.json", "'vit'", "no class token"]),
        (lambda f: edit_json(f / "config.json", num_hidden_layers=4), ["num_hidden_layers is 4", "3"]),
        (lambda f: edit_json(f / "config.json", hidden_size=64), ["hidden_size is 64", "96"]),
        (lambda f: edit_json(f / "config.json", hidden_act="relu"), ["hidden_act", "relu", "gelu"]),
        (lambda f: (f / "config.json").write_text("{"), ["config.json", "JSON"]),
        (lambda f: (f / "model.safetensors").unlink(), ["model.safetensors", "neither"]),
        (lambda f: (f / "model.safetensors").write_bytes(b"x" * 99), ["model.safetensors", "expected a safetensors"]),
        (lambda f: edit_tensors(f / "model.safetensors", query(QUERY, None)), ["layer.1", "query", "missing"]),
        (
            lambda f: edit_tensors(f / "model.safetensors", query(QUERY, torch.zeros(90, 96))),
            ["blocks.1.attn.qkv.weight", "(288, 96)", "(282, 96)"],
        ),
        (
            lambda f: edit_tensors(f / "model.safetensors", query("encoder.layer.0.lambda_1", torch.zeros(96))),
            ["encoder.layer.0.lambda_1", "not a weight of IJepaModel"],
        ),
    ],
)
def test_a_hugging_face_folder_of_another_model(weights, tmp_path, edit, words):
    save_hf(tmp_path / "hf", weights.networks["target_encoder"], weights.arch)
    edit(tmp_path / "hf")
    with pytest.raises(ValueError) as error:
        ijepa_fast.load(tmp_path / "hf")
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


def test_a_timm_folder_of_another_model(weights, tmp_path):
    save_timm(tmp_path / "timm", weights.networks["target_encoder"], weights.arch)
    edit_json(tmp_path / "timm" / "config.json", model_args={"embed_dim": 96})
    with pytest.raises(ValueError, match="class_token"):
        ijepa_fast.load(tmp_path / "timm")


def test_export_says_what_is_wrong_and_leaves_nothing(weights, tmp_path, capsys):
    save_weights(tmp_path / "w.safetensors", weights)
    (tmp_path / "out").mkdir()
    run = ["--checkpoint", str(tmp_path / "w.safetensors"), "--format"]
    for command, words in (
        ([*run, "hf", "--out", str(tmp_path / "out")], "exists already"),
        ([*run, "reference", "--out", str(tmp_path / "new"), "--network", "encoder"], "--network"),
        ([*run, "safetensors", "--out", str(tmp_path / "new")], "ends in .safetensors"),
        ([*run, "hf", "--out", str(tmp_path / "new"), "--image-size", "65"], "multiple of the patch, 8, got 65"),
        (["--checkpoint", str(tmp_path / "no"), "--format", "hf", "--out", str(tmp_path / "new")], "does not exist"),
    ):
        assert export.main(command) == 1
        errors = capsys.readouterr().err
        assert errors.startswith("error: ")
        assert errors.count("\n") == 1
        assert words in errors
    strange = {**weights.networks["target_encoder"], "strange.weight": torch.zeros(1)}
    broken = replace(weights, networks=weights.networks | {"target_encoder": strange})
    with pytest.raises(KeyError):
        export.export(broken, "hf", tmp_path / "new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "published.pth.tar", "w.safetensors"]
    assert read(tmp_path / "w.safetensors").arch == weights.arch
