"""Weights in and out: every format gives back every number, and the same image gives the same features everywhere."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("PIL")
pytest.importorskip("safetensors")

from PIL import Image
from safetensors.torch import load_file

import ijepa_fast
from ijepa_fast.interop import export
from ijepa_fast.interop.load import read
from ijepa_fast.interop.weights import Weights, load_state, load_weights, mlp_ratio, save_weights
from tests.interop_files import DATA, HEADS, NETWORKS, golden_weights, images, normalised, published, write_published
from tests.parity import STEP_KEYS, build, patches_of, relative_error, run_step
from tests.small import from_masks

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


@pytest.fixture
def weights(tmp_path):
    """Golden weights of a run with its own mean and std."""
    golden = golden_weights(tmp_path / "published.pth.tar")
    arch = replace(golden.arch, mean=MEAN, std=STD, interpolation="bicubic", step=3)
    return Weights(arch, golden.networks)


def exported(weights, tmp_path, form, **options):
    """Where `weights` lie after the command line exported them."""
    save_weights(tmp_path / "run.safetensors", weights)
    out = tmp_path / {"safetensors": "out.safetensors", "reference": "out.pth.tar"}.get(form, f"out_{form}")
    flags = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    command = ["--checkpoint", str(tmp_path / "run.safetensors"), "--format", form, "--out", str(out), *flags]
    assert export.main(command) == 0
    return out


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key


@pytest.mark.parametrize("form", ["safetensors", "reference"])
def test_round_trip_of_all_networks(weights, tmp_path, form):
    back = read(exported(weights, tmp_path, form), HEADS)
    for name in NETWORKS:
        assert_equal(back.networks[name], weights.networks[name])
    if form == "safetensors":
        assert back.arch == weights.arch
    else:
        assert back.arch == replace(
            weights.arch, mean=back.arch.mean, std=back.arch.std, interpolation="bilinear", step=None
        )


@pytest.mark.parametrize("form", ["hf", "timm"])
@pytest.mark.parametrize("network", ["target_encoder", "encoder"])
def test_round_trip_of_one_encoder(weights, tmp_path, form, network):
    back = read(exported(weights, tmp_path, form, network=network))
    assert_equal(back.networks["target_encoder"], weights.networks[network])
    assert (back.arch.mean, back.arch.std, back.arch.interpolation) == (MEAN, STD, "bicubic")
    assert back.arch.encoder_options() == weights.arch.encoder_options()


def test_the_target_encoder_is_the_default(weights, tmp_path):
    x = images()
    assert not torch.equal(
        weights.networks["encoder"]["norm.weight"], weights.networks["target_encoder"]["norm.weight"]
    )
    path = exported(weights, tmp_path, "safetensors")
    wanted = ijepa_fast.load(path, network="target_encoder")(x)
    for form in ("hf", "timm"):
        assert torch.equal(ijepa_fast.load(exported(weights, tmp_path, form))(x), wanted)
    assert torch.equal(ijepa_fast.load(path)(x), wanted)
    assert not torch.equal(ijepa_fast.load(path, network="encoder")(x), wanted)


def test_transformers_gives_the_same_features(weights, tmp_path):
    """The folder through transformers' own classes, from uint8 images on, with the folder's image processor."""
    transformers = pytest.importorskip("transformers")
    folder = exported(weights, tmp_path, "hf")
    model, report = transformers.AutoModel.from_pretrained(folder, output_loading_info=True)
    assert isinstance(model, transformers.IJepaModel)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    encoder, x = ijepa_fast.load(folder), images()
    inputs = processor(images=[Image.fromarray(image.numpy()) for image in x], return_tensors="pt").pixel_values
    with torch.no_grad():
        theirs = model.eval()(inputs).last_hidden_state
    assert (encoder(x) - theirs).abs().max() < 1e-5
    assert encoder(x).std() > 0.1


@pytest.mark.parametrize("form", ["plain", "sharded", "classifier"])
def test_transformers_folder_comes_in(tmp_path, form):
    """A folder that transformers wrote itself, of sizes that are nobody's, at its own resolution and at another."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 80}
    config = transformers.IJepaConfig(**sizes, image_size=32, patch_size=8, layer_norm_eps=1e-6)
    kind = transformers.IJepaForImageClassification if form == "classifier" else transformers.IJepaModel
    whole = kind(config).eval()
    model = whole.ijepa if form == "classifier" else whole
    model.embeddings.position_embeddings.data.normal_()
    whole.save_pretrained(tmp_path / "theirs", max_shard_size="20KB" if form == "sharded" else "5GB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").exists() == (form == "sharded")
    for size in (32, 48):
        encoder, x = ijepa_fast.load(tmp_path / "theirs", image_size=size), images(2, size)
        with torch.no_grad():
            inputs = normalised(x, encoder.mean, encoder.std)
            theirs = model(inputs, interpolate_pos_encoding=size != 32).last_hidden_state
        assert encoder.encoder.blocks[0].attn.heads == 4
        assert (encoder(x) - theirs).abs().max() < 1e-5


def test_a_processor_that_says_one_half_is_not_believed(weights, tmp_path):
    half = Weights(replace(weights.arch, mean=(0.5,) * 3, std=(0.5,) * 3), weights.networks)
    folder = exported(half, tmp_path, "hf")
    assert ijepa_fast.load(folder).std == (0.5,) * 3  # written by this project: it is what the run had
    processor = json.loads((folder / "preprocessor_config.json").read_text())
    del processor["written_by"]
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    with pytest.warns(UserWarning, match=r"mean and std \.5"):
        assert ijepa_fast.load(folder).mean == pytest.approx((0.485, 0.456, 0.406))


def test_timm_gives_the_same_features(weights, tmp_path):
    timm = pytest.importorskip("timm")
    folder = exported(weights, tmp_path, "timm")
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    x = images()
    inputs = normalised(x, model.pretrained_cfg["mean"], model.pretrained_cfg["std"])
    encoder = ijepa_fast.load(folder)
    with torch.no_grad():
        assert (model.forward_features(inputs) - encoder(x)).abs().max() < 1e-5
        assert (model(inputs) - encoder(x).mean(1)).abs().max() < 1e-5


def test_timm_folder_is_what_its_loader_expects(weights, tmp_path):
    """timm's VisionTransformer, without class token and head, has these keys and shapes and no others; its loader takes
    the model's arguments from `model_args` and the image's from `pretrained_cfg`.
    """
    folder = exported(weights, tmp_path, "timm")
    dim, hidden, shapes = 96, 384, {}
    shapes |= {"pos_embed": (1, 64, dim), "patch_embed.proj.weight": (dim, 3, 8, 8), "patch_embed.proj.bias": (dim,)}
    shapes |= {"norm.weight": (dim,), "norm.bias": (dim,)}
    for i in range(3):
        for layer, rows, columns in (
            ("attn.qkv", 3 * dim, dim),
            ("attn.proj", dim, dim),
            ("mlp.fc1", hidden, dim),
            ("mlp.fc2", dim, hidden),
        ):
            shapes |= {f"blocks.{i}.{layer}.weight": (rows, columns), f"blocks.{i}.{layer}.bias": (rows,)}
        for norm in ("norm1", "norm2"):
            shapes |= {f"blocks.{i}.{norm}.weight": (dim,), f"blocks.{i}.{norm}.bias": (dim,)}
    held = load_file(folder / "model.safetensors")
    assert {key: tuple(tensor.shape) for key, tensor in held.items()} == shapes
    config = json.loads((folder / "config.json").read_text())
    arguments = config["model_args"]
    assert arguments["class_token"] is False
    assert (arguments["embed_dim"], arguments["depth"], arguments["num_heads"]) == (96, 3, HEADS)
    assert int(arguments["embed_dim"] * arguments["mlp_ratio"]) == hidden
    assert config["pretrained_cfg"]["input_size"] == [3, 64, 64]
    assert (tuple(config["pretrained_cfg"]["mean"]), tuple(config["pretrained_cfg"]["std"])) == (MEAN, STD)


def test_reference_layout_reproduces_the_published_step(tmp_path):
    """Weights that went out in the published layout and came back compute the golden step; the names are its own."""
    with np.load(DATA) as archive:
        model, _ = build(archive)
        first = {k: archive[k] for k in archive.files if k.startswith("init/")}
        golden = {key: archive[f"s0/{key}"] for key in STEP_KEYS}
    states = {
        name: {k.split("/")[2]: torch.from_numpy(v) for k, v in first.items() if k.startswith(f"init/{name}/")}
        for name in NETWORKS
    }
    arch = golden_weights(tmp_path / "other.pth.tar").arch
    out = exported(Weights(arch, states), tmp_path, "reference")
    content = torch.load(out, weights_only=True)
    for name in NETWORKS:
        assert set(content[name]) == {f"module.{key}" for key in states[name]}
    back = read(out, HEADS)
    for module in (model.encoder, model.predictor, model.target_encoder):
        for parameter in module.parameters():
            parameter.data.fill_(float("nan"))
    for name in NETWORKS:
        load_state(getattr(model, name), back.networks[name], name)
    patches = patches_of(torch.from_numpy(golden["images"]), model.encoder.patch)
    packed = from_masks(golden["masks_context"], golden["masks_target"], model.encoder.patches)
    ours = run_step(model, patches, packed)
    for key in ("target_encoder_out", "context_out", "predictions", "loss_smooth_l1"):
        assert relative_error(ours[key].reshape(golden[key].shape), golden[key]) < 1e-5, key


def test_published_checkpoint_comes_in(tmp_path):
    content, back = published(), read(write_published(tmp_path / "a.pth.tar"), HEADS)
    for name in NETWORKS:
        assert_equal({f"module.{k}": v for k, v in back.networks[name].items()}, content[name])
    assert (back.arch.image_size, back.arch.patch, back.arch.depth, back.arch.predictor_depth) == (64, 8, 3, 2)


@pytest.mark.parametrize(("hidden", "dim"), [(6144, 1408), (3072, 768), (100, 96), (2730, 1024)])
def test_mlp_ratio_gives_the_hidden_width_again(hidden, dim):
    """The giant's ratio is 48/11, which no float holds."""
    assert int(dim * mlp_ratio(hidden, dim)) == hidden


def test_positions_are_resampled(weights, tmp_path):
    """To another grid as torch's bicubic does it, and to the same grid not at all."""
    save_weights(tmp_path / "w.safetensors", weights)
    encoder = ijepa_fast.load(tmp_path / "w.safetensors", image_size=96)
    assert encoder(images(2, 96)).shape == (2, 144, 96)
    table = weights.networks["target_encoder"]["pos_embed"].view(1, 8, 8, 96).permute(0, 3, 1, 2)
    wanted = torch.nn.functional.interpolate(table, (12, 12), mode="bicubic").permute(0, 2, 3, 1).reshape(144, 96)
    assert torch.equal(encoder.encoder.positions, wanted)
    same = ijepa_fast.load(tmp_path / "w.safetensors", image_size=64)
    assert torch.equal(same.encoder.positions, weights.networks["target_encoder"]["pos_embed"][0])
    larger = load_weights(exported(weights, tmp_path, "safetensors", **{"image-size": 96}))
    assert larger.networks["predictor"]["predictor_pos_embed"].shape == (1, 144, 48)


def test_loaded_encoder(weights, tmp_path):
    save_weights(tmp_path / "w.safetensors", weights)
    encoder = ijepa_fast.load(tmp_path / "w.safetensors")
    x = images()
    features, layers = encoder(x), encoder.layers(x, 2)
    assert features.shape == (3, 64, 96)
    assert features.dtype == torch.float32
    assert not features.requires_grad
    assert [layer.shape for layer in layers] == [features.shape] * 2
    last = torch.nn.functional.layer_norm(
        layers[-1], (96,), encoder.encoder.norm.weight, encoder.encoder.norm.bias, 1e-6
    )
    torch.testing.assert_close(last, features, rtol=0, atol=1e-5)
    # The normalisation is the training's: mean-coloured images are zero patches, whatever the patch embedding.
    grey = torch.full((1, 64, 64, 3), 255, dtype=torch.uint8) * torch.tensor(MEAN)
    assert encoder._patchify(grey.round().to(torch.uint8)).abs().max() < 0.02
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 90, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    assert encoder.read([tmp_path / "a.png"] * 2).shape == (2, 64, 64, 3)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 0.1)])
def test_loaded_encoder_on_a_gpu(weights, tmp_path, dtype, tolerance):
    save_weights(tmp_path / "w.safetensors", weights)
    here = ijepa_fast.load(tmp_path / "w.safetensors")
    there = ijepa_fast.load(tmp_path / "w.safetensors", device="cuda").to(dtype)
    features = there(images().cuda())
    assert features.dtype == dtype
    assert (features.float().cpu() - here(images())).abs().max() < tolerance


def test_importing_the_package_is_light():
    code = "import sys, ijepa_fast; assert 'torch' not in sys.modules; ijepa_fast.load; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_the_same_weights_are_the_same_bytes(weights, tmp_path):
    save_weights(tmp_path / "one.safetensors", weights)
    for copy in range(4):
        save_weights(tmp_path / f"{copy}.safetensors", load_weights(tmp_path / "one.safetensors"))
        assert (tmp_path / f"{copy}.safetensors").read_bytes() == (tmp_path / "one.safetensors").read_bytes()
