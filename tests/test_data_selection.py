"""What is taken as an image and as a label, what is left out and said, and what is refused by name, place and kind."""

import bz2
import gzip
import io
import os
import tarfile
import time
import zipfile

import pytest

pytest.importorskip("nvidia.dali")
pytest.importorskip("PIL")

from ijepa_fast.data.check import check
from ijepa_fast.data.sources import open_source
from ijepa_fast.eval.labels import open_labelled
from tests.data_images import encode, photographs, write_photos, write_tar


@pytest.fixture(scope="module")
def jpeg():
    return encode(photographs()[0].resize((20, 16)))


@pytest.fixture
def write(tmp_path, jpeg):
    def write(*names, data=jpeg):
        for name in names:
            path = os.path.join(os.fsencode(tmp_path), os.fsencode(name))
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, "wb") as file:
                file.write(data)

    return write


def names(source):
    return [source.index.names[i] for i in range(len(source))]


def classes(path):
    part = open_labelled(path)
    return part.classes, {column: values.tolist() for column, values in part.labels.items()}


# What is an image.


def test_what_is_left_out_is_said_by_extension(tmp_path, write, capsys):
    write("a/1.jpg", "b/2.jpg", "a/3.tif", "b/4.TIF", "b/more.tar.gz", "README", ".DS_Store", "b/._2.jpg")
    source = open_source(tmp_path, cache=tmp_path.parent / "cache")
    assert names(source) == ["a/1.jpg", "b/2.jpg"]
    assert source.left_out.startswith("2 .tif, ")
    assert set(source.left_out.split(", ")) == {"2 .tif", "1 .tar.gz", "1 ._* of macOS", "1 without extension"}
    assert open_source(tmp_path, cache=tmp_path.parent / "cache").left_out == source.left_out
    check(str(tmp_path), 1)
    assert f"2 files, 0 bad; left out: {source.left_out}" in capsys.readouterr().out


def test_a_folder_of_other_formats_says_what_it_holds(tmp_path, write):
    write("a/1.jp2", "a/2.jp2", "3.zip")
    with pytest.raises(ValueError, match=r"holds no image; expected .*; found 2 .jp2, 1 .zip"):
        open_source(tmp_path)


def test_names_of_macos_are_no_images_in_shards_and_lists(tmp_path, write, jpeg):
    write_tar(tmp_path / "a.tar", {"x/1.jpg": jpeg, "x/._1.jpg": b"Mac", "./._2.jpg": b"Mac", "x/1.json": b"{}"})
    write_tar(tmp_path / "._a.tar", {})
    source = open_source(tmp_path)
    assert names(source) == ["x/1.jpg"]
    assert source.left_out == "3 ._* of macOS, 1 .json"
    write("y/1.jpg", "y/._1.jpg", "list.txt", data=b"y/1.jpg 3\ny/._1.jpg 3\n")
    assert names(open_source(tmp_path / "list.txt")) == ["y/1.jpg"]


def test_shards_beside_class_folders_are_an_error(tmp_path, write, jpeg):
    write("cat/1.jpg", "dog/2.jpg")
    write_tar(tmp_path / "train.tar", {"x/1.jpg": jpeg})
    with pytest.raises(ValueError, match=r"tar shards \(train.tar\) and folders of images \(cat/1.jpg\); move one"):
        open_source(tmp_path)
    assert names(open_source(f"{tmp_path}/*.tar")) == ["x/1.jpg"]


def test_one_stray_image_does_not_cost_every_label(tmp_path, write):
    write("cat/1.jpg", "dog/2.jpg", "preview.png")
    source = open_source(tmp_path)
    assert names(source) == ["cat/1.jpg", "dog/2.jpg"]
    assert source.classes == ["cat", "dog"]
    assert source.left_out == "1 beside the class folders (preview.png)"
    write("2.png")  # two of four are no accident
    assert open_source(tmp_path).labels is None
    assert len(open_source(tmp_path)) == 4


# Labels.


@pytest.mark.parametrize(
    ("folders", "order"),
    [
        (["1.0", "2.0"], ["1.0", "2.0"]),
        (["1e3", "7"], ["1e3", "7"]),
        (["0.5", "1.5"], ["0.5", "1.5"]),
        (["10", "9", "-1"], ["-1", "9", "10"]),
        (["nan", "inf"], ["inf", "nan"]),
        (["7", "007"], ["007", "7"]),
    ],
)
def test_folders_are_classes_whatever_they_are_called(tmp_path, write, folders, order):
    write(*(f"{name}/1.jpg" for name in folders))
    held, labels = classes(tmp_path)
    assert held == {"class": order}
    assert sorted(labels["class"]) == list(range(len(order)))


def test_whole_numbers_of_a_table_are_classes_however_they_are_written(tmp_path, write):
    write("a.jpg", "b.jpg", "c.jpg")
    (tmp_path / "labels.csv").write_bytes(
        b"\xef\xbb\xbffile,kind,count\r\na.jpg,2.0,1e1\r\nb.jpg,10,9.0\r\nc.jpg,2,9\r\n"
    )
    held, labels = classes(tmp_path)
    assert held == {"kind": ["2", "10"]}
    assert labels == {"kind": [0, 1, 0], "count": [10, 9, 9]}


TABLES = {
    "id,breed\na,pug\n": r"line 1: expected the columns file and at least one label, .*; got \['id', 'breed'\]",
    "file;kind\na.jpg;pug\n": r"line 1: expected .* separated by commas; got \['file;kind'\]",
    "file,kind\na.jpg,pug\nb.jpg\n": "line 3: expected 2 cells, got 1",
    "file,kind\na.jpg,pug\nb.jpg,pug,2\n": "line 3: expected 2 cells, got 3",
    "file,kind\na.jpg,pug\nb.jpg,pug\na.jpg,cat\n": "line 4: a.jpg has a row already, in line 2",
    "file,kind\na.jpg,pug\nb.jpg,\n": "line 3: expected a label under 'kind', got ''",
    "file,kind\na.jpg,1.5\nb.jpg,nan\n": "line 3: expected a label under 'kind', got 'nan'",
    "file,kind\na.jpg,pug\nb.jpg,\xe9pagneul\n": "line 3: is not UTF-8 text",
    "file,kind\na.jpg,p\0g\n": "line 2: .*NUL",
    "file,kind\na.jpg,pug\n": "1 images have no row, the first 'b.jpg'",
    "": r"got an empty file",
    "<!DOCTYPE html><html>": "expected a CSV table, got an HTML page",
    "file,kind\na.jpg," + "x" * 200_000 + "\n": "line 2: field larger",
}


@pytest.mark.parametrize("text", TABLES, ids=lambda text: text[:30])
def test_a_table_that_cannot_be_used_names_its_line_and_hinders_no_training(tmp_path, write, text, capsys):
    write("a.jpg", "b.jpg")
    write("labels.csv", data=text.encode("latin-1"))
    source = open_source(tmp_path, cache=tmp_path.parent / "cache")
    source = open_source(tmp_path, cache=tmp_path.parent / "cache")
    assert (len(source), source.labels, source.columns) == (2, None, {})
    with pytest.raises(ValueError, match="labels.csv.*" + TABLES[text]):
        open_labelled(tmp_path)
    with pytest.raises(ValueError, match="labels.csv.*" + TABLES[text]):
        open_source(tmp_path, label="kind")
    check(str(tmp_path), 1)
    assert "labels cannot be used: " in capsys.readouterr().out


# Lists.


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("\ufeffa.jpg\nb.jpg\n".encode(), [("a.jpg", None), ("b.jpg", None)]),
        ("é.jpg 3\n".encode(), [("é.jpg", "3")]),
        ("é.jpg 3\n".encode("latin-1"), [("\udce9.jpg", "3")]),
        (b"a.jpg\t  two words\nb c.jpg\t\tx\n", [("a.jpg", "two words"), ("b c.jpg", "x")]),
        (b"b c.jpg 12\r\na.jpg" + b" " * 40_000 + b"4\r\n", [("b c.jpg", "12"), ("a.jpg", "4")]),
    ],
    ids=["byte order mark", "utf-8", "latin-1", "tabs", "40,000 spaces"],
)
def test_lists_that_are_read(tmp_path, write, text, found):
    write(*(name for name, _ in found))
    write("list.txt", data=text)
    begin = time.monotonic()
    source = open_source(tmp_path / "list.txt")
    assert time.monotonic() - begin < 2
    assert names(source) == [name for name, _ in found]
    labels = [None] * len(found) if source.labels is None else [source.classes[i] for i in source.labels]
    assert labels == [label for _, label in found]
    assert all(source.read(i)[:2] == b"\xff\xd8" for i in range(len(source)))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"path,label\na.jpg,3\n", "list.txt, line 1: .*got the line 'path,label'"),
        (b'# made by hand\n"a.jpg" 3\n', "list.txt, line 2: expected a path .*without quotes"),
        (b"a.jpg,3\n", "list.txt, line 1: .*a label, if any, after a tab or space"),
        (b"a.jpg\na\0.jpg\n", "list.txt, line 2"),
        (b"a.jpg" + b" " * 40_000 + b"x\n", "list.txt, line 1"),
        ("a.jpg\n".encode("utf-16"), "list.txt: expected a text list of paths, got text in UTF-16: save it as UTF-8"),
        (
            b"".join(b"images/%d.jpg\n" % i for i in range(32)),
            "32 of 32 files do not exist, the first 'images/0.jpg'; ",
        ),
        (b"x.jpg\n" * 5000, "1000 of 1000 files of 5000 that were looked for do not exist"),
    ],
    ids=["head", "quotes", "commas", "NUL", "spaces", "UTF-16", "all wrong", "all of many wrong"],
)
def test_lists_that_cannot_be_read_say_where(tmp_path, write, text, words):
    write("a.jpg")
    write("list.txt", data=text)
    with pytest.raises(ValueError, match=words):
        open_source(tmp_path / "list.txt")


def test_a_line_is_shown_safely(tmp_path, write):
    write("list.txt", data=b"\x1b[2Jclear\n")
    with pytest.raises(ValueError) as error:
        open_source(tmp_path / "list.txt")
    assert "\x1b" not in str(error.value)


# Files named for what they are.


def archive(kind):
    file = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(file, "w") as out:
            out.writestr("a.jpg", b"x")
        return file.getvalue()
    with tarfile.open(fileobj=file, mode="w") as out:
        out.addfile(tarfile.TarInfo("a.jpg"))
    return gzip.compress(file.getvalue(), mtime=0) if kind == "tgz" else file.getvalue()


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"
PAGE = b"\n <!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>"


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("a.tar.gz", PAGE, "expected a gzip-compressed tar file, got an HTML page"),
        ("a.tgz", archive("tgz")[:60], "cut short"),
        ("a.tar", archive("tgz"), "no tar header at byte 0; .* got a gzip-compressed file"),
        ("a.tar.part", archive("tar"), "a tar archive"),
        ("a.zip", PAGE, "an HTML page"),
        ("a.zip", archive("tgz"), "gzip-compressed"),
        ("a.tar", archive("zip"), "a zip archive"),
        ("a.jpg", b"\xff\xd8\xff\xe0" + bytes(99), "a JPEG image"),
        ("a.tar", bz2.compress(archive("tar")), "a bzip2-compressed file"),
        ("a.txt", PAGE, "an HTML page"),
        ("a.tar", PAGE, "an HTML page"),
        ("a.txt", POINTER, "a Git LFS pointer"),
        ("a.tar", POINTER, "a Git LFS pointer"),
        ("a.tar", b"", "no tar header at byte 0; .* got an empty file"),
    ],
)
def test_a_source_of_another_kind_is_named_for_what_it_is(tmp_path, write, name, data, words):
    write(name, data=data)
    with pytest.raises(ValueError, match=words) as error:
        open_source(tmp_path / name, cache=tmp_path)
    assert name in str(error.value)


@pytest.mark.parametrize("name", ["PAR1", "BZh9", "GIF8", "Rar!", "PK", "II"])
def test_lists_may_begin_with_any_name(tmp_path, write, name):
    write(f"{name}/1.jpg")
    write("list.txt", data=f"{name}/1.jpg\n".encode())
    assert len(open_source(tmp_path / "list.txt")) == 1


def test_a_fifo_as_a_source_is_no_wait(tmp_path):
    os.mkfifo(tmp_path / "list.txt")
    os.mkfifo(tmp_path / "a.tar")
    with pytest.raises(ValueError, match="neither a folder nor a file"):
        open_source(tmp_path / "list.txt")
    with pytest.raises(ValueError, match=r"a\.tar"):
        open_source(tmp_path / "a.tar")


# Names from strangers.


def test_odd_names_train_and_are_shown_safely(tmp_path, write, capfd):
    strange = ["\udce9t\udce9/1.jpg", "\x1b[2J/2.jpg", "\u202egpj/3.jpg"]
    write(*strange, data=b"no image")
    source = open_source(tmp_path)
    assert sorted(names(source)) == sorted(strange)
    assert source.classes == ["\\x1b[2J", "\\u202egpj", "\\xe9t\\xe9"]
    assert source.read(0) == b"no image"
    assert check(str(tmp_path), 1) == 1
    out = capfd.readouterr().out
    assert "\x1b" not in out
    assert "\u202e" not in out
    assert "\\x1b[2J/2.jpg: not a JPEG" in out


# Archives.


def test_a_shard_without_its_end_mark_is_an_error_with_its_place(tmp_path, jpeg):
    for count in (1, 3):
        write_tar(tmp_path / "a.tar", {f"{i}.jpg": jpeg for i in range(3)})
        whole = (tmp_path / "a.tar").read_bytes()
        member = 512 + -(-len(jpeg) // 512) * 512
        (tmp_path / "a.tar").write_bytes(whole[: count * member])
        with pytest.raises(
            ValueError, match=rf"a.tar: cut short: it ends at byte {count * member} without tar's end mark"
        ):
            open_source(tmp_path)
    (tmp_path / "a.tar").write_bytes(whole[: 3 * member + 512])  # one block of zeros is one
    assert len(open_source(tmp_path)) == 3


def header(kind=b"0", size=b"00000000010\0", name=b"a.jpg"):
    """A tar header with a checksum that holds."""
    block = bytearray(512)
    block[: len(name)] = name
    block[124 : 124 + len(size)] = size
    block[156:157] = kind
    block[257:265] = b"ustar\x0000"
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def pax(*records, claimed=None):
    body = b"".join(records)
    size = len(body) if claimed is None else claimed
    return header(b"x", b"%011o\0" % size) + body + bytes(-len(body) % 512)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (pax(b"-5 size=1\n"), "extended header at byte 0 is no list of pax records"),
        (pax(b"0 path=x\n"), "extended header at byte 0 is no list"),
        (pax(b"path=x\n"), "extended header at byte 0 is no list"),
        (pax(b"99 path=x\n"), "extended header at byte 0 is no list"),
        (pax(b"14 size=-1024\n"), "extended header at byte 0 says that the next member has '-1024' bytes"),
        (pax(b"12 size=abc\n"), "says that the next member has 'abc' bytes"),
        (pax(b"7 a=bc\n", claimed=10**9), "extended header at byte 0 has 1000000000 bytes, which makes no sense"),
        (header(size=b"\xff" * 12), "no tar header at byte 0"),
        (header(size=b"-0000000010\0"), "no tar header at byte 0"),
        (header(size=b"0000xyz0010\0"), "no tar header at byte 0"),
        (header(size=b"\x80" + b"\xff" * 11), "cut short; its member at byte 0 ends"),
        (header(size=b"00000000000\0") + b"x" * 512, "no tar header at byte 512"),
    ],
)
def test_damaged_headers_are_named_with_shard_and_offset(tmp_path, data, words):
    (tmp_path / "bad.tar").write_bytes(data + bytes(1024))
    begin = time.monotonic()
    with pytest.raises(ValueError, match=f"bad.tar: .*{words}"):
        open_source(tmp_path)
    assert time.monotonic() - begin < 5


@pytest.mark.parametrize("label", [b"\xff\xfe", b"", b"x" * 5000])
def test_a_label_of_a_shard_that_is_none_has_its_place(tmp_path, jpeg, label):
    write_tar(tmp_path / "a.tar", {"1.jpg": jpeg, "1.cls": label})
    with pytest.raises(ValueError, match=r"a.tar: the .cls member at byte \d+ is no label"):
        open_source(tmp_path)


# The kept index.


def test_sources_of_long_and_like_names_keep_indices_of_their_own(tmp_path, jpeg):
    long = "ä" * 120
    for name in (long, "photos.v1", "photos.v2"):
        write_photos(tmp_path / name, 1 + len(name) % 5, size=20)
        cache = tmp_path / "cache"
        assert len(open_source(tmp_path / name, cache=cache)) == len(open_source(tmp_path / name, cache=cache))
    assert len(list((tmp_path / "cache").glob("*/meta.json"))) == 3
