"""Sets that are not RGB of eight bits: each is measured, trains, resumes to the bit, is probed, exported, reported."""

import json
import shutil

import numpy as np
import pytest
import torch

pytest.importorskip("yaml")
pytest.importorskip("deepspeed")
pytest.importorskip("nvidia.dali")
pytest.importorskip("tifffile")
pytest.importorskip("h5py")
pytest.importorskip("zarr")

import tifffile
import yaml
from safetensors.torch import load_file

import ijepa_fast
from ijepa_fast import api, probe, report
from ijepa_fast.data import stats
from ijepa_fast.data.reading import Reading
from ijepa_fast.data.sources import open_source
from ijepa_fast.interop import export
from tests import image_sets
from tests.launch import losses, rank_files, run, some
from tests.test_methods import options_of

pytestmark = pytest.mark.slow

# What is written, what reads it, the method that is trained on it, and its options.
SETS = {
    "tiff": (image_sets.write_tiff, Reading(channels=13), "ijepa", []),
    "png": (image_sets.write_png, Reading(channels=1), "ijepa", ["objective.options.target=pixels"]),
    "hdf5": (image_sets.write_hdf5, Reading(channels=5), "ibot", ["data.flip=false"]),
    "zarr": (image_sets.write_zarr, Reading(channels=4), "mae", []),
    "large": (image_sets.write_large, Reading(window=2000), "ijepa", ["data.crop=[16,32]", "mask.min_keep=1"]),
}
WITH_LABELS = [name for name in SETS if name != "large"]


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """The source of each set, written when it is first asked for."""
    made = {}

    def of(name):
        if name not in made:
            made[name] = SETS[name][0](tmp_path_factory.mktemp(name) / "set")
        return made[name]

    return of


@pytest.fixture(scope="module")
def finished(sets, tmp_path_factory):
    """The folder of a finished run on each set, of four steps, and the options of it."""
    runs, made = tmp_path_factory.mktemp("runs"), {}

    def of(name):
        if name not in made:
            _, reading, method, more = SETS[name]
            measured = stats.measure(open_source(sets(name), reading=reading))
            keys = yaml.safe_load(measured.lines())["data"]
            config, options = options_of(method, *(f"data.{key}={value}" for key, value in keys.items()), *more)
            options += [f"data.source={sets(name)}", f"name={name}", "batch_size=4", "optim.epochs=2"]
            options += ["optim.steps=4", "log.checkpoint_every=2", "log.keep=3"]
            made[name] = run(runs, *options, config=config), options, config
        return made[name]

    return of


@pytest.mark.parametrize("name", some(SETS, "tiff", "large"))
def test_resumed_is_bitwise_unbroken(finished, tmp_path, name):
    unbroken, options, config = finished(name)
    shutil.copytree(unbroken, tmp_path / name)
    shutil.rmtree(tmp_path / name / "checkpoints" / "step-00000004")
    broken = run(tmp_path, *options, config=config)
    assert len(losses(broken)) == 4
    assert losses(broken) == losses(unbroken)
    (expected,), (found,) = (map(load_file, rank_files(folder, 4)) for folder in (unbroken, broken))
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


@pytest.mark.parametrize("name", SETS)
def test_what_is_read_is_what_was_trained_on(finished, sets, name):
    """The encoder says channels and depth, and reads files as training does."""
    folder, *_ = finished(name)
    encoder, source = ijepa_fast.load(folder), open_source(sets(name), reading=SETS[name][1])
    raster = source.raster(0)
    assert (encoder.arch.reading.channels, encoder.arch.reading.depth) == (raster.channels, str(raster.dtype))
    if name in ("tiff", "png"):
        images = encoder.read([source.name(0), source.name(1)])
        assert str(images.dtype) == f"torch.{raster.dtype}"
        features = encoder(images)
        assert features.isfinite().all()
        assert not torch.equal(features[0], features[1])
        unit = 65535
        by_transform = torch.stack([encoder.transform(source.raster(i).read(0, 0, 40, 44)) for i in (0, 1)])
        torch.testing.assert_close(by_transform, images.permute(0, 3, 1, 2).float() / unit)
        torch.testing.assert_close(encoder(by_transform), features, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", WITH_LABELS)
def test_probe(finished, sets, name, tmp_path):
    out = tmp_path / "figures.json"
    command = ["--checkpoint", str(finished(name)[0]), "--data", str(sets(name)), "--test", str(sets(name))]
    assert probe.main([*command, "--probes", "knn", "--out", str(out)]) == 0
    assert json.loads(out.read_text())["figures"]


def test_windows_of_the_large_file_are_probed_by_a_map(finished, sets, tmp_path, capsys):
    """Two maps part the scene: the west is trained on, the east is tested on. Zero is no class."""
    out, maps = tmp_path / "figures.json", {}
    for name, columns in (("west", slice(0, 2)), ("east", slice(2, 4))):
        classes = np.zeros((4, 4), np.uint8)
        classes[:, columns] = np.array([[1, 2], [2, 1], [1, 2], [2, 0]])
        tifffile.imwrite(tmp_path / f"{name}.tif", classes.repeat(50, 0).repeat(50, 1))
        maps[name] = str(tmp_path / f"{name}.tif")
    command = ["--checkpoint", str(finished("large")[0]), "--data", str(sets("large")), "--test", str(sets("large"))]
    command += ["--label-map", maps["west"], "--test-label-map", maps["east"]]
    assert probe.main([*command, "--probes", "linear", "--out", str(out)]) == 0
    assert json.loads(out.read_text())["figures"]
    assert capsys.readouterr().out.split()[-1] == "7"  # of eight windows in the east, one without a class
    assert probe.main([*command[:6], "--probes", "linear"]) == 1


def test_windows_of_the_large_file_are_embedded_and_read(finished, sets, tmp_path):
    folder, path = finished("large")[0], str(sets("large"))
    assert api.main([path, "--checkpoint", str(folder), "--out", str(tmp_path / "x.npy")]) == 0
    names = (tmp_path / "x.txt").read_text().splitlines()
    assert [name.partition(" at ")[2] for name in names[:5]] == [
        *(f"y=0, x={x}" for x in (0, 2000, 4000, 6000)),
        "y=2000, x=0",
    ]
    encoder = ijepa_fast.load(folder)
    images = encoder.read([path])
    assert images.shape == (16, 16, 32, 3)
    features = torch.from_numpy(np.load(tmp_path / "x.npy"))
    torch.testing.assert_close(encoder(images).mean(1), features, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.from_numpy(ijepa_fast.embed([path], encoder)), features)


@pytest.mark.parametrize("name", SETS)
def test_report(finished, sets, name, tmp_path):
    folder, *_ = finished(name)
    assert (
        report.main([str(folder), "--images", str(sets(name)), "--sample", "8", "--out", str(tmp_path / "r.html")]) == 0
    )
    assert "Nearest neighbours" in (tmp_path / "r.html").read_text()
    assert (folder / "masks.png").is_file() == (SETS[name][2] != "ibot")


@pytest.mark.parametrize(
    ("name", "form"), [*((name, "hf") for name in SETS), ("large", "timm"), ("tiff", "timm"), ("tiff", "safetensors")]
)
def test_export(finished, name, form, tmp_path):
    """What is written gives the same features when it is loaded again, of images of its channels and depth."""
    folder, out = finished(name)[0], tmp_path / ("out.safetensors" if form == "safetensors" else "out")
    assert export.main(["--checkpoint", str(folder), "--format", form, "--out", str(out)]) == 0
    encoder, again = ijepa_fast.load(folder), ijepa_fast.load(out)
    assert again.arch.reading == encoder.arch.reading
    images = torch.rand(2, len(encoder.mean), *encoder.arch.size)
    torch.testing.assert_close(again(images), encoder(images))
    if form != "safetensors":
        config = json.loads((out / "config.json").read_text())
        channels = config["num_channels"] if form == "hf" else config["model_args"]["in_chans"]
        assert channels == len(encoder.mean)


@pytest.mark.parametrize("name", ["tiff", "large"])
def test_transformers_reads_it(finished, name, tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = finished(name)[0]
    assert export.main(["--checkpoint", str(folder), "--format", "hf", "--out", str(tmp_path / "hf")]) == 0
    model, encoder = transformers.AutoModel.from_pretrained(tmp_path / "hf").eval(), ijepa_fast.load(folder)
    images = torch.rand(2, len(encoder.mean), *encoder.arch.size)
    mean, std = (torch.tensor(values)[:, None, None] for values in (encoder.mean, encoder.std))
    with torch.no_grad():
        tokens = model((images - mean) / std).last_hidden_state
    assert (encoder(images) - tokens).abs().max() < 1e-5
