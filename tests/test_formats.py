"""Every format gives the pixels that were written, whole and by windows; what does not fit is one sentence."""

import json
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("nvidia.dali")
pytest.importorskip("tifffile")
pytest.importorskip("h5py")
pytest.importorskip("zarr")

import h5py
import tifffile
import zarr
from PIL import Image

from ijepa_fast.data import stats
from ijepa_fast.data.central import eval_batches
from ijepa_fast.data.check import check
from ijepa_fast.data.check import main as check_main
from ijepa_fast.data.dali import TrainLoader
from ijepa_fast.data.headers import BadImage
from ijepa_fast.data.label_map import with_label_map
from ijepa_fast.data.pixels import Pixels
from ijepa_fast.data.reading import Reading
from ijepa_fast.data.recover import TooManyBadFiles
from ijepa_fast.data.sources import open_source
from tests.image_sets import bands

DEEP, FLOAT = bands(5, count=2), bands(5, "float32", count=2) / 7
GREY, RGB = bands(1, count=2), (bands(3, count=2) % 251).astype(np.uint8)


def pixels(source, index=0):
    raster = source.raster(index)
    return raster.read(0, 0, raster.height, raster.width)


def tiff(**options):
    def write(folder, image):
        first = options.get("planarconfig") != "contig"
        tifffile.imwrite(folder / "a.tif", image.transpose(2, 0, 1) if first else image, **options)

    return write


def hdf5(folder, image):
    with h5py.File(folder / "a.h5", "w") as file:
        file["deep/inside"] = image[None]


def save_zarr(folder, image):
    zarr.save_array(folder / "a.zarr", image.transpose(2, 0, 1))


def ome_zarr(folder, image):
    group = zarr.open_group(folder / "a.zarr", mode="w")
    group.create_array("0", data=image.transpose(2, 0, 1)[None, :, None])
    group.create_array("1", data=image[::2, ::2].transpose(2, 0, 1)[None, :, None])
    axes = [{"name": name} for name in "tczyx"]
    group.attrs["multiscales"] = [{"axes": axes, "datasets": [{"path": "0"}, {"path": "1"}]}]


WRITERS = {
    "tiff": tiff(photometric="minisblack", planarconfig="contig"),
    "tiff, planes": tiff(photometric="minisblack", planarconfig="separate"),
    "tiff, pages": tiff(photometric="minisblack"),
    "tiff, tiles": tiff(photometric="minisblack", planarconfig="contig", tile=(16, 16), compression="zlib"),
    "tiff, tiled planes": tiff(photometric="minisblack", planarconfig="separate", tile=(16, 32), compression="lzw"),
    "tiff, strips": tiff(photometric="minisblack", planarconfig="contig", rowsperstrip=7, compression="zstd"),
    "npy": lambda folder, image: np.save(folder / "a.npy", image),
    "npy, channels first": lambda folder, image: np.save(folder / "a.npy", image.transpose(2, 0, 1)),
    "npz": lambda folder, image: np.savez_compressed(folder / "a.npz", x=image),
    "hdf5": hdf5,
    "zarr": save_zarr,
    "ome-zarr": ome_zarr,
}


@pytest.mark.parametrize("image", [DEEP[0], FLOAT[0]], ids=["uint16", "float32"])
@pytest.mark.parametrize("name", WRITERS)
def test_pixels_are_those_that_were_written(tmp_path, name, image):
    WRITERS[name](tmp_path, image)
    source = open_source(tmp_path, reading=Reading(channels=5))
    assert source.reading.depth == str(image.dtype)
    assert np.array_equal(pixels(source), image)
    raster = source.raster(0)
    assert np.array_equal(raster.read(3, 9, 20, 31), image[3:23, 9:40])


@pytest.mark.parametrize("name", WRITERS)
def test_windows_are_parts_of_the_image(tmp_path, name):
    """A grid of squares whose last ones end at the border."""
    data, reading = tmp_path / "data", Reading(channels=5, window=16)
    data.mkdir()
    WRITERS[name](data, DEEP[0])
    source, kept = (open_source(data, reading=reading, cache=tmp_path / "cache") for _ in range(2))
    assert len(source) == len(kept) == 9
    corners = [(y, x) for y in (0, 16, 24) for x in (0, 16, 28)]
    for number, (y, x) in enumerate(corners):
        assert np.array_equal(pixels(kept, number), DEEP[0][y : y + 16, x : x + 16])
        assert source.name(number).endswith(f"at y={y}, x={x}")


@pytest.mark.parametrize(
    ("name", "options", "channels"),
    [("a.gif", {}, 3), ("a.bmp", {}, 3), ("a.ppm", {}, 3), ("a.avif", {"quality": 100, "subsampling": "4:4:4"}, 3)],
)
def test_what_pillow_reads_is_read_as_rgb(tmp_path, name, options, channels):
    """By DALI too, which gets the pixels: so that one set may have several formats."""
    image = Image.fromarray(RGB[0])
    try:
        image.save(tmp_path / name, **options)
    except (KeyError, OSError):
        pytest.skip("this Pillow does not write it")
    Image.fromarray(RGB[1]).save(tmp_path / "b.png")
    source = open_source(tmp_path)
    ((images, _),) = eval_batches(source, batch_size=2, crop=40, resize=40)
    expected = np.asarray(Image.open(tmp_path / name).convert("RGB"))[:, 2:42]
    assert torch.equal(images[0], torch.from_numpy(expected.copy()))
    assert torch.equal(images[1], torch.from_numpy(RGB[1][:, 2:42]))


def test_rgb_of_eight_bits_goes_the_same_way_in_every_format(tmp_path):
    crops = []
    for name, write in (("png", lambda p, x: Image.fromarray(x).save(p)), ("tif", tifffile.imwrite), ("npy", np.save)):
        folder = tmp_path / name
        folder.mkdir()
        for number, image in enumerate(RGB):
            write(folder / f"{number}.{name}", image)
        source = open_source(folder)
        assert source.reading == Reading(depth="uint8")
        loader = TrainLoader(source, batch_size=2, crop=32, threads=1)
        crops.append(next(loader).images)
        loader.close()
    assert torch.equal(crops[0], crops[1])
    assert torch.equal(crops[0], crops[2])


def test_png_of_16_bits_keeps_them(tmp_path):
    Image.fromarray(GREY[0][..., 0]).save(tmp_path / "a.png")
    assert np.array_equal(pixels(open_source(tmp_path, reading=Reading(channels=1))), GREY[0])
    codecs = pytest.importorskip("imagecodecs")
    (tmp_path / "a.png").write_bytes(codecs.png_encode(DEEP[0][..., :3].copy()))
    assert np.array_equal(pixels(open_source(tmp_path, reading=Reading(depth="uint16"))), DEEP[0][..., :3])


def test_stacks_pages_bands_and_labels(tmp_path):
    np.savez(tmp_path / "a.npz", images=DEEP, labels=[4, 9])
    source = open_source(tmp_path / "a.npz", reading=Reading(channels=2, bands=(4, 0)))
    assert len(source) == 2
    assert source.classes == ["4", "9"]
    assert source.name(1).endswith("a.npz[1]")
    assert np.array_equal(pixels(source, 1), DEEP[1][..., [4, 0]])
    tifffile.imwrite(tmp_path / "pages.tif", DEEP[0].transpose(2, 0, 1), photometric="minisblack")
    pages = open_source(tmp_path / "pages.tif", reading=Reading(channels=1, page="each"))
    assert len(pages) == 5
    assert np.array_equal(pixels(pages, 3), DEEP[0][..., 3:4])
    one = open_source(tmp_path / "pages.tif", reading=Reading(channels=1, page=2))
    assert np.array_equal(pixels(one), DEEP[0][..., 2:3])


def test_no_data_are_filled_with_the_mean_as_it_is_to_the_model(tmp_path):
    image = FLOAT[0].copy()
    image[3, 4], image[5, 6, 1] = np.nan, -9999
    np.save(tmp_path / "a.npy", image)
    reading = Reading(channels=5, nodata=-9999.0, fill=(1.0, 2.0, 3.0, 4.0, 5.0))
    found = pixels(open_source(tmp_path, reading=reading))
    assert found[3, 4].tolist() == [1, 2, 3, 4, 5]
    assert found[5, 6].tolist() == [image[5, 6, 0], 2, *image[5, 6, 2:]]
    np.save(tmp_path / "a.npy", np.zeros((8, 8, 1), np.uint16))
    deep = open_source(tmp_path, reading=Reading(channels=1, nodata=0.0, fill=(0.5,)))
    assert (pixels(deep) == 32768).all()


def test_a_map_says_where_windows_lie(tmp_path):
    np.save(tmp_path / "a.npy", DEEP[0])
    where = np.zeros((10, 11), np.uint8)  # a quarter of the size
    where[:4, :4] = 255
    Image.fromarray(where).save(tmp_path / "tissue.png")
    reading = Reading(channels=5, window=16, where=str(tmp_path / "tissue.png"))
    source = open_source(tmp_path / "a.npy", reading=reading)
    assert [(int(y), int(x)) for y, x in zip(source.index.y, source.index.x)] == [(0, 0)]
    Image.fromarray(0 * where).save(tmp_path / "tissue.png")
    with pytest.raises(ValueError, match=r"data\.where=.*tissue\.png leaves no window"):
        open_source(tmp_path / "a.npy", reading=reading)


def save(name, image):
    return lambda folder: np.save(folder / name, image)


def no_numbers(folder):
    np.save(folder / "a.npy", np.array([["x", "y"]]))


BAD = {
    "channels": (save("a.npy", DEEP[0]), Reading(), "a.npy: expected 3 channels, found an array .*; set data.channels"),
    "tiff": (
        lambda folder: tifffile.imwrite(folder / "a.tif", DEEP[0].transpose(2, 0, 1), photometric="minisblack"),
        Reading(channels=4),
        "a.tif: expected 4 channels, found 5; set data.channels=5, or choose of them with data.bands",
    ),
    "bands": (
        save("a.npy", DEEP[0]),
        Reading(channels=2, bands=(0, 7)),
        r"expected bands 0 to 4, which the file has, found 7 in data\.bands; change data\.bands",
    ),
    "depth": (
        save("a.npy", FLOAT[0]),
        Reading(channels=5, depth="uint16"),
        "expected uint16, found float32; convert the files to one depth, or set data.depth=float32",
    ),
    "page": (
        lambda folder: tifffile.imwrite(folder / "a.tif", GREY[0][..., 0]),
        Reading(channels=1, page=3),
        r"a.tif: expected page 3, found 1 pages; change data\.page",
    ),
    "axes": (save("a.npy", DEEP[0]), Reading(channels=5, axes="NHWC"), r"expected axes NHWC, found an array of shape"),
    "array": (
        lambda folder: np.savez(folder / "a.npz", x=DEEP, y=DEEP),
        Reading(channels=5),
        r"expected one array of images, found x \(2, 40, 44, 5\), y .*; choose one: data\.array=NAME",
    ),
    "no array": (
        lambda folder: np.savez(folder / "a.npz", x=DEEP),
        Reading(channels=5, key="z"),
        r"expected an array 'z', found x; change data\.array",
    ),
    "no numbers": (no_numbers, Reading(channels=1), "expected pixels that are numbers, found <U1"),
    "damaged": (
        lambda folder: (folder / "a.tif").write_bytes(b"II*\0nothing"),
        Reading(channels=1),
        "a.tif: cannot be",
    ),
    "pickled": (
        lambda folder: np.save(folder / "a.npy", np.array([None, 3], object), allow_pickle=True),
        Reading(channels=1),
        "a.npy: .*Python objects",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_a_sentence_with_the_file(tmp_path, name):
    write, reading, words = BAD[name]
    write(tmp_path)
    with pytest.raises(ValueError, match=words) as error:
        open_source(tmp_path, reading=reading)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_nan_and_mixed_images_are_bad_files_with_reasons(tmp_path):
    for number in range(40):
        np.save(tmp_path / f"{number:02}.npy", FLOAT[number % 2])
    lost = FLOAT[0].copy()
    lost[2, 3, 1] = np.nan
    np.save(tmp_path / "07.npy", lost)
    np.save(tmp_path / "08.npy", FLOAT[0][..., :3])
    np.save(tmp_path / "09.npy", FLOAT[0][:, :, :5].astype(np.float32)[..., :4])
    source = open_source(tmp_path, reading=Reading(channels=5))
    listed = tmp_path / "bad_files.txt"
    loader = TrainLoader(source, batch_size=40, crop=16, threads=2, bad_files=listed, max_bad_share=0.2)
    images = next(loader).images
    loader.close()
    assert images.isfinite().all()
    reasons = dict(line.split("\t") for line in listed.read_text().splitlines())
    assert "found 1 of 8800 that are NaN or infinite; set data.nodata" in reasons[str(tmp_path / "07.npy")]
    assert "expected 5 channels, found an array of shape (40, 44, 3)" in reasons[str(tmp_path / "08.npy")]
    strict = TrainLoader(source, batch_size=40, crop=16, threads=2)
    with pytest.raises(TooManyBadFiles):
        next(strict)


@pytest.mark.parametrize(
    ("module", "name", "write"),
    [
        ("tifffile", "a.tif", lambda path: tifffile.imwrite(path, GREY[0][..., 0])),
        ("h5py", "a.h5", lambda path: path.write_bytes(b"")),
        ("zarr", "a.zarr", lambda path: path.mkdir()),
    ],
)
def test_a_missing_package_is_a_sentence(tmp_path, monkeypatch, capsys, module, name, write):
    write(tmp_path / name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"needs the package {module}, .*; pip install ijepa_fast\[science\]"):
        open_source(tmp_path / name, reading=Reading(channels=1))
    assert check_main([str(tmp_path / name)]) == 2
    assert capsys.readouterr().err.startswith("error: a")


def test_check_data_says_what_it_found(tmp_path, capsys):
    np.save(tmp_path / "a.npy", DEEP[0])
    np.save(tmp_path / "b.npy", DEEP[1][:30])
    (tmp_path / "notes.txt").write_text("hello")
    assert check(str(tmp_path), 1, reading=Reading(channels=0)) == 0
    out = capsys.readouterr().out
    assert "2 .npy, 30 x 44 to 40 x 44 pixels (height x width); 5 channels of uint16" in out
    assert "2 files, 0 bad; left out: 1 .txt" in out


@pytest.mark.parametrize("stretch", ["none", "percentile", "asinh"])
def test_stats_measure_what_the_model_sees(tmp_path, capsys, stretch):
    """Normalised by the lines that are printed, pixels have mean 0 and deviation 1."""
    import yaml

    np.save(tmp_path / "a.npy", DEEP)
    assert stats.main([str(tmp_path / "a.npy"), "--axes", "NHWC", "--stretch", stretch]) == 0
    lines = capsys.readouterr().out.partition("data:")[2]
    keys = yaml.safe_load("data:" + lines)["data"]
    assert (keys["channels"], keys["depth"], keys["axes"]) == (5, "uint16", "NHWC")
    ends = tuple(keys.get("low", ())), tuple(keys.get("high", ()))
    scale = Pixels(tuple(keys["mean"]), tuple(keys["std"]), stretch, *ends)
    patches = scale.patches(torch.from_numpy(DEEP), 4, torch.float32).view(2, 110, 5, 16)
    assert patches.mean((0, 1, 3)).abs().max() < 0.1
    assert (patches.std((0, 1, 3)) - 1).abs().max() < 0.1


def test_rasters_say_what_they_cannot_give(tmp_path):
    np.save(tmp_path / "a.npy", DEEP)
    source = open_source(tmp_path / "a.npy", reading=Reading(channels=5))
    with pytest.raises(BadImage, match=r"declares 44 x 40 pixels, over the bound of 100; raise data\.max_pixels"):
        source.raster(0, 100)


@pytest.mark.slow
def test_the_bench_of_formats_runs(tmp_path, capsys):
    """And against a checkout, which here is this one."""
    pytest.importorskip("sklearn")
    from bench import formats, report

    sizes = ["--count", "8", "--size", "64", "--large", "256", "--crop", "32", "--batch-size", "4", "--threads", "1"]
    path = tmp_path / "x.json"
    built = bool(list((formats.ROOT / "ijepa_fast").glob("_C*.so")))
    more = ["--against", str(formats.ROOT)] if built else []
    assert formats.main([*sizes, *more, "--seconds", "0.05", "--rounds", "1", "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["formats"]
    assert [row["format"] for row in rows] == ["jpg", "png", "tif", "npy", "h5", "zarr", "windows of a large tif"]
    assert all(rate > 0 for row in rows for rate in row["images_per_second"].values())
    assert [row["format"] for row in rows if "against" in row] == (["jpg", "png"] if built else [])
    shown = "\n".join(report.formats(path))
    assert "| windows of a large tif |" in shown
    assert shown in capsys.readouterr().out
    with pytest.raises(ValueError, match="expected a checkout with its extension built"):
        formats.main([*sizes, "--against", str(tmp_path), "--json", str(path)])


def test_a_format_that_fails_costs_the_others_nothing(tmp_path, monkeypatch, capsys):
    pytest.importorskip("sklearn")
    from bench import formats

    turns = []

    def some_fail(pair, seconds, rounds):
        turns.append(pair)
        if len(turns) == 3:
            raise OSError("no such codec")
        return {name: [(2.0, 1.0)] for name in pair}

    monkeypatch.setattr(formats, "measure", some_fail)
    arguments = ["--count", "2", "--size", "16", "--large", "64", "--json", str(tmp_path / "x.json")]
    assert formats.main(arguments) == 1
    out = capsys.readouterr().out
    assert "| tif | failed: OSError: no such codec" in out
    assert "| npy | 2 | 2 | 1.00 | 1.00 |" in out


def test_labels_from_a_map_of_classes(tmp_path):
    """Of windows, by what most of the map under them is; zero leaves out; of whole images, by a folder of maps."""
    image = np.random.default_rng(0).integers(0, 255, (64, 96, 3), dtype=np.uint8)
    tifffile.imwrite(tmp_path / "scene.tif", image, photometric="rgb", tile=(16, 16))
    classes = np.array([[3, 3, 7], [0, 7, 7]], np.uint8).repeat(5, 0).repeat(5, 1)
    classes[0, :5] = 7
    tifffile.imwrite(tmp_path / "map.tif", classes)
    source = open_source(tmp_path / "scene.tif", reading=Reading(window=32))
    labelled = with_label_map(source, str(tmp_path / "map.tif"))
    assert labelled.classes == ["3", "7"]
    assert labelled.labels.tolist() == [0, 0, 1, 1, 1]
    assert [labelled.name(i).partition(" at ")[2] for i in (2, 3)] == ["y=0, x=64", "y=32, x=32"]
    assert np.array_equal(labelled.raster(3).read(0, 0, 32, 32), image[32:64, 32:64])

    for name, value in (("a", 1), ("b", 2), ("c", 0)):
        (tmp_path / "many").mkdir(exist_ok=True)
        (tmp_path / "maps").mkdir(exist_ok=True)
        Image.fromarray(image).save(tmp_path / "many" / f"{name}.png")
        np.save(tmp_path / "maps" / f"{name}.npy", np.full((4, 6), value, np.uint8))
    whole = with_label_map(open_source(tmp_path / "many"), str(tmp_path / "maps"))
    assert (whole.labels.tolist(), whole.classes) == ([0, 1], ["1", "2"])

    for array, words in ((np.zeros((2, 2)), "no class for any"), (np.full((2, 2), 0.5), "whole numbers, 0 for none")):
        np.save(tmp_path / "wrong.npy", array.astype(np.float32))
        with pytest.raises(ValueError, match=words):
            with_label_map(source, str(tmp_path / "wrong.npy"))
    with pytest.raises(ValueError, match="there is no such file"):
        with_label_map(source, str(tmp_path / "none.tif"))
