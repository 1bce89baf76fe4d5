"""Strange inputs, as people have them: each is one sentence that says what it is, or is read as it was meant."""

import io
import pickle
import struct
import sys
import tarfile
import zipfile

import numpy as np
import pytest

pytest.importorskip("PIL")
pytest.importorskip("nvidia.dali")

from PIL import Image

from ijepa_fast.__main__ import main
from ijepa_fast.config import load_config, parse_options, present
from ijepa_fast.data.sources import open_source
from ijepa_fast.interop.load import load
from ijepa_fast.methods import beit, cae, ijepa


def jpeg() -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), 90, np.uint8)).save(out, "JPEG")
    return out.getvalue()


def photos(folder, *names):
    for name in names or ("0.jpg", "1.jpg"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg())
    return folder


def refusal(path) -> str:
    with pytest.raises(ValueError) as error:
        open_source(path)
    assert "\n" not in str(error.value)
    return str(error.value)


KINDS = {
    "data_batch_1": (pickle.dumps({"data": 1}), "a Python pickle"),
    "train-images-idx3-ubyte": (struct.pack(">IIII", 2051, 1, 2, 2) + bytes(4), "an IDX file"),
    "a.parquet": (b"PAR1\x15" + bytes(20), "a Parquet file"),
    "a.fits": (b"SIMPLE  =                    T", "a FITS file"),
    "a.dcm": (bytes(128) + b"DICM", "a DICOM file"),
    "a.heic": (b"\0\0\0\x18ftypheic" + bytes(9), "a HEIC image"),
    "a.mp4": (b"\0\0\0\x18ftypisom" + bytes(9), "a video"),
    "a.mat": (b"MATLAB 5.0 MAT-file" + bytes(9), "a MATLAB file"),
    "a.bin": (b"\1\2\0\3", "binary data"),
}


@pytest.mark.parametrize("name", KINDS)
def test_a_file_of_another_kind_is_named(tmp_path, name):
    data, words = KINDS[name]
    (tmp_path / name).write_bytes(data)
    assert f"{name}: expected a text list of paths, got {words}" in refusal(tmp_path / name)


def test_an_image_that_is_none_says_what_it_is(tmp_path, capsys):
    photos(tmp_path)
    (tmp_path / "page.jpg").write_text("<!DOCTYPE html>")
    (tmp_path / "lfs.jpg").write_text("version https://git-lfs.github.com/spec/v1")
    assert main(["check-data", str(tmp_path)]) == 1
    out = "".join(capsys.readouterr())
    assert "not a JPEG, PNG or WebP image but an HTML page" in out
    assert "but a Git LFS pointer" in out


ARRAYS = {
    "cut.npy": ("it is cut short", lambda path: path.write_bytes(npy(np.zeros((4, 8, 8, 3), np.uint8))[:300])),
    "objects.npy": ("Python objects", lambda path: path.write_bytes(npy(np.array([{}], dtype=object)))),
    "web.npy": ("got an HTML page", lambda path: path.write_text("<html>")),
    "line.npy": ("found an array of shape (9,)", lambda path: path.write_bytes(npy(np.arange(9)))),
    "text.h5": ("expected an HDF5 file", lambda path: path.write_text("hello")),
    "cut.npz": ("expected an NPZ file", lambda path: path.write_bytes(b"PK\3\4aaaa")),
    "bare.zarr": ("expected a Zarr array or group, found none", lambda path: path.mkdir()),
    "bad.zarr": ("JSON is damaged", lambda path: (path.mkdir(), (path / "zarr.json").write_text("{"))),
}


def npy(array) -> bytes:
    out = io.BytesIO()
    np.save(out, array, allow_pickle=True)
    return out.getvalue()


@pytest.mark.parametrize("name", ARRAYS)
def test_a_file_of_arrays_says_what_is_wrong(tmp_path, name):
    if name.endswith(("h5", "zarr")):
        pytest.importorskip({"h5": "h5py", "zarr": "zarr"}[name.split(".")[1]])
    words, write = ARRAYS[name]
    write(tmp_path / name)
    said = refusal(tmp_path / name)
    assert str(tmp_path / name) in said
    assert words in said


def test_archives_say_what_they_are(tmp_path):
    with zipfile.ZipFile(tmp_path / "whole.zip", "w") as archive:
        archive.writestr("a.jpg", jpeg())
    (tmp_path / "cut.zip").write_bytes((tmp_path / "whole.zip").read_bytes()[:-40])
    assert "one that is cut short or damaged" in refusal(tmp_path / "cut.zip")
    with tarfile.open(tmp_path / "plain.tar.gz", "w") as archive:
        archive.add(__file__, "a.py")
    assert "expected a gzip-compressed tar file, got a tar archive" in refusal(tmp_path / "plain.tar.gz")


def test_an_address_is_not_fetched():
    assert "is an address: fetch it first" in refusal("https://example.org/photos")


@pytest.mark.parametrize(
    "table", ["file, label\n./0.jpg, a\n./1.jpg, b\n", "file,label\n0.jpg ,a\n" + "x/../1.jpg,b\n"], ids=["dots", "up"]
)
def test_a_table_is_read_as_it_was_meant(tmp_path, table):
    photos(tmp_path)
    (tmp_path / "labels.csv").write_text(table.replace(" ,", ","))
    source = open_source(tmp_path)
    assert not source.index.problem
    assert source.classes == ["a", "b"]
    assert list(source.columns) == ["label"]


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ("file,label\n0,a\n1,b\n", "the first row is for '0'"),
        ("file,label\ncat\\0.jpg,a\ncat\\1.jpg,b\n", r"the first row is for 'cat\\0.jpg'"),
        ('file,label\n"0.jpg,a\n1.jpg,b\n', "line 2: expected 2 cells"),
        ("file;label\n0.jpg;a\n", "separated by commas"),
    ],
    ids=["no extension", "backslash", "quote", "semicolon"],
)
def test_a_table_that_cannot_be_used_hinders_no_training(tmp_path, table, words):
    photos(tmp_path)
    (tmp_path / "labels.csv").write_text(table)
    source = open_source(tmp_path)
    assert len(source) == 2
    assert words in source.index.problem


def test_parts_of_a_data_set_are_no_classes(tmp_path):
    photos(tmp_path, *(f"{part}/{kind}/{n}.jpg" for part in ("train", "val") for kind in ("cat", "dog") for n in "01"))
    source = open_source(tmp_path)
    assert len(source) == 8
    assert source.labels is None
    assert "train and val look like parts of a data set" in source.index.problem
    assert open_source(tmp_path / "val").classes == ["cat", "dog"]
    assert open_source(photos(tmp_path / "flat", "train/0.jpg", "test/0.jpg")).classes == ["test", "train"]


def test_labels_that_do_not_match_are_said(tmp_path):
    np.savez(tmp_path / "a.npz", images=np.zeros((4, 8, 8, 3), np.uint8), labels=np.arange(3))
    source = open_source(tmp_path / "a.npz")
    assert len(source) == 4
    assert "3 labels for 4 images" in source.index.problem


def test_numbers_that_no_float_holds_are_bad_pixels(tmp_path, capsys, recwarn):
    np.save(tmp_path / "a.npy", np.full((2, 8, 8, 3), 1e300))
    assert main(["check-data", str(tmp_path / "a.npy")]) == 1
    assert "expected finite pixels" in "".join(capsys.readouterr())
    assert not [warning for warning in recwarn if issubclass(warning.category, RuntimeWarning)]


DATASETS = """
import numpy as np
class Items:
    def __init__(self, of):
        self.of = of
    def __len__(self):
        return 8
    def __getitem__(self, number):
        return self.of(number)
def fails():
    raise RuntimeError("no such bucket")
def wants(argument):
    return []
def first():
    return Items(lambda number: 1 / 0)
def late():
    return Items(lambda number: 1 / 0 if number == 3 else np.zeros((3, 8, 8), np.uint8))
def paths():
    return Items(lambda number: f"/nowhere/{number}.jpg")
"""


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("fails", r"RuntimeError: no such bucket \(strange_data.py, line 11\)"),
        ("wants", "missing 1 required positional argument"),
        ("first", "ZeroDivisionError"),
        ("paths", "item 0 is the path '/nowhere/0.jpg', which does not exist"),
    ],
)
def test_what_a_data_set_of_ones_own_raises_is_a_sentence(tmp_path, monkeypatch, function, words):
    (tmp_path / "strange_data.py").write_text(DATASETS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "strange_data", raising=False)
    with pytest.raises(ValueError, match=f"data.source=strange_data:{function}: .*{words}"):
        open_source(f"strange_data:{function}")


def test_an_item_that_raises_is_a_bad_file(tmp_path, monkeypatch, capsys):
    (tmp_path / "strange_data.py").write_text(DATASETS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "strange_data", raising=False)
    assert main(["check-data", "strange_data:late"]) == 1
    out = "".join(capsys.readouterr())
    assert "strange_data:late[3]: the data set raised ZeroDivisionError: division by zero" in out
    assert "8 files, 1 bad" in out


def test_a_shell_leaves_the_home_folder_to_us(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    config = load_config("quickstart", ["data.source=~/photos", "runs=~/runs", "probe.train=~/photos"])
    assert (config.data.source, config.runs) == ("/home/somebody/photos", "/home/somebody/runs")
    assert config.probe.train == "/home/somebody/photos"
    config = load_config("quickstart", ["data.where=~/maps", "data.window=64", "probe.test=~/photos", "init=~/runs/a"])
    assert (config.data.where, config.probe.test) == ("/home/somebody/maps", "/home/somebody/photos")
    assert config.init == "/home/somebody/runs/a"


@pytest.mark.parametrize(
    ("options", "given"),
    [
        (ijepa.Options, {"teacher_from": "~/a", "teacher_cache": "~/b"}),
        (beit.Options, {"tokenizer": "~/a"}),
        (cae.Options, {"tokenizer": "~/a"}),
    ],
)
def test_so_it_does_in_a_methods_options(monkeypatch, options, given):
    """Also where an earlier version has written them into a checkpoint."""
    monkeypatch.setenv("HOME", "/home/somebody")
    parsed = parse_options(given, options)
    flat = present({f"objective.options.{name}": path for name, path in given.items()})
    for name, path in given.items():
        assert getattr(parsed, name) == flat[f"objective.options.{name}"] == path.replace("~", "/home/somebody")


def test_weights_are_looked_for_in_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ValueError, match=f"{tmp_path}/nowhere does not exist"):
        load("~/nowhere")


@pytest.mark.parametrize(
    "arguments",
    [
        ["embed", "x", "--checkpoint", "x", "--out", "x.npy", "--batch-size", "0"],
        ["embed", "x", "--checkpoint", "x", "--out", "x.npy", "--device", "tpu"],
        ["stats", "x", "--images", "0"],
        ["stats", "x", "--window", "0"],
        ["stats", "x", "--channels", "0"],
        ["check-data", "x", "--processes", "-1"],
        ["check-data", "x", "--max-pixels", "many"],
        ["probe", "--checkpoint", "x", "--images", "0"],
        ["tokenizer", "x", "--out", "x.npz", "--vocabulary", "0"],
        ["report", "x", "--sample", "-3"],
        ["export", "--checkpoint", "x", "--format", "hf", "--out", "x", "--image-size", "0"],
    ],
    ids=" ".join,
)
def test_numbers_of_commands_have_bounds(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert arguments[-2] in said
    assert "at least 1" in said or "invalid choice" in said
