"""Sources: folder trees, text lists, tar shards, their labels, and the kept index."""

import os
import tarfile

import numpy as np
import pytest

pytest.importorskip("tqdm")
pytest.importorskip("PIL")

from ijepa_fast.data import index, scan
from ijepa_fast.data.sources import TarSource, open_source
from tests.data_images import bad_kinds, encode, photographs, write_photos, write_tar


def names(source):
    return [source.index.names[i] for i in range(len(source))]


@pytest.fixture
def jpeg():
    return encode(photographs()[0].resize((20, 16)))


def test_a_nested_folder_has_classes(tmp_path, jpeg):
    for name in ("b/2.JPG", "a/deep/1.png", "a/0.jpeg", "a/notes.txt", ".hidden/3.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(jpeg)
    source = open_source(tmp_path)
    assert names(source) == ["a/0.jpeg", "a/deep/1.png", "b/2.JPG"]
    assert source.left_out == "1 .txt"
    assert source.classes == ["a", "b"]
    assert source.labels.tolist() == [0, 0, 1]
    assert source.read(2) == jpeg


def test_a_flat_folder_has_no_labels(tmp_path, jpeg):
    for name in ("1.webp", "ä ö.jpg"):
        (tmp_path / name).write_bytes(jpeg)
    source = open_source(tmp_path)
    assert names(source) == ["1.webp", "ä ö.jpg"]
    assert source.labels is None
    assert source.classes == []


def test_links_to_folders_are_followed_but_not_in_circles(tmp_path, jpeg):
    (tmp_path / "data/a").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "data/a/1.jpg").write_bytes(jpeg)
    (tmp_path / "elsewhere/2.jpg").write_bytes(jpeg)
    (tmp_path / "data/b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data/a/loop").symlink_to(tmp_path / "data")
    assert names(open_source(tmp_path / "data")) == ["a/1.jpg", "b/2.jpg"]


def test_a_table_of_labels_takes_precedence_and_a_column_can_be_chosen(tmp_path, jpeg):
    for name in ("0.jpg", "1.jpg", "2.jpg"):
        (tmp_path / name).write_bytes(jpeg)
    (tmp_path / "labels.csv").write_text(
        "file,kind,count,metres\n2.jpg,cube,10,1.5\n0.jpg,ball,9,2.5\n1.jpg,cube,9,3\n"
    )
    source = open_source(tmp_path)
    assert (source.classes, source.labels.tolist()) == (["ball", "cube"], [0, 1, 1])
    source = open_source(tmp_path, label="count")
    assert (source.classes, source.labels.tolist()) == (["9", "10"], [0, 0, 1])
    assert source.columns["metres"].tolist() == [2.5, 3.0, 1.5]
    with pytest.raises(ValueError, match=r"no classes 'metres'; it has kind, count"):
        open_source(tmp_path, label="metres")
    (tmp_path / "3.jpg").write_bytes(jpeg)
    with pytest.raises(ValueError, match=r"1 images have no row, the first '3.jpg'"):
        open_source(tmp_path, label="kind")


def test_a_text_list(tmp_path, jpeg):
    (tmp_path / "images").mkdir()
    for name in ("images/a b.jpg", "images/c.jpg"):
        (tmp_path / name).write_bytes(jpeg)
    file = tmp_path / "list.txt"
    file.write_text(f"# comment\nimages/a b.jpg\n\n{tmp_path}/images/c.jpg\n")
    source = open_source(file)
    assert len(source) == 2
    assert source.labels is None
    assert source.read(0) == source.read(1) == jpeg
    file.write_text("images/a b.jpg 12\nimages/c.jpg\t3\n")
    source = open_source(file)
    assert (source.classes, source.labels.tolist()) == (["3", "12"], [1, 0])
    assert source.read(0) == jpeg


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("images/a b.jpg 12\nimages/c.jpg\n", "1 of 2 lines have a label; write one on every line, or on none"),
        ("import os\n", "list.txt, line 1: expected a path that ends in .*; got the line 'import os'"),
    ],
    ids=["a label on one line only", "no list of images"],
)
def test_a_text_list_that_is_none_says_why(tmp_path, text, words):
    (tmp_path / "list.txt").write_text(text)
    (tmp_path / "images").mkdir()
    (tmp_path / "images/c.jpg").touch()
    with pytest.raises(ValueError, match=words):
        open_source(tmp_path / "list.txt", label="class")


@pytest.mark.parametrize("pattern", ["", "train-{000..001}.tar", "train-*.tar"], ids=["folder", "range", "wildcard"])
@pytest.mark.parametrize(
    "format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT], ids=["ustar", "gnu", "pax"]
)
def test_shards_of_every_tar_format_and_long_names(tmp_path, jpeg, format, pattern):
    long = f"{'d' * 90}/{'n' * 60 if format == tarfile.USTAR_FORMAT else 'n' * 180}.jpg"
    other = encode(photographs()[1].resize((9, 30)), "PNG")
    write_tar(tmp_path / "train-000.tar", {long: jpeg, "ä/1.png": other}, format)
    write_tar(tmp_path / "train-001.tar", {"ä/2.jpg": jpeg}, format)
    source = open_source(f"{tmp_path}/{pattern}")
    assert isinstance(source, TarSource)
    assert names(source) == [long, "ä/1.png", "ä/2.jpg"]
    assert [source.read(i) for i in range(3)] == [jpeg, other, jpeg]
    assert source.classes == ["d" * 90, "ä"]
    assert source.groups.tolist() == [0, 0, 1]
    assert len(open_source(tmp_path / "train-001.tar")) == 1


def test_labels_of_webdataset_shards(tmp_path, jpeg):
    members = {"x/000.jpg": jpeg, "x/000.cls": b"7\n", "x/001.cls": b"12", "x/001.jpg": jpeg, "x/001.json": b"{}"}
    write_tar(tmp_path / "s.tar", members)
    source = open_source(tmp_path)
    assert (source.classes, source.labels.tolist()) == (["7", "12"], [0, 1])


def test_members_that_point_elsewhere_are_never_followed(tmp_path, jpeg):
    path = tmp_path / "evil.tar"
    (tmp_path / "secret.jpg").write_bytes(jpeg)
    with tarfile.open(path, "w") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE):
            info = tarfile.TarInfo(f"kind{kind.decode()}.jpg")
            info.type, info.linkname = kind, "secret.jpg"
            tar.addfile(info)
    write_tar(tmp_path / "outside.tar", {"../../up.jpg": jpeg, "/root.jpg": jpeg})
    before = sorted(os.listdir(tmp_path.parent))
    source = open_source(tmp_path)
    assert names(source) == ["../../up.jpg", "/root.jpg"]  # names only: the bytes are the member's own
    assert [source.read(i) for i in range(2)] == [jpeg, jpeg]
    assert sorted(os.listdir(tmp_path.parent)) == before


def test_shards_that_cannot_be_read_are_named(tmp_path, jpeg):
    write_tar(tmp_path / "a.tar", {"1.jpg": jpeg * 10})
    whole = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[:1500])
    with pytest.raises(ValueError, match=r"a.tar: cut short; its member at byte 0 ends \d+ bytes after the file"):
        open_source(tmp_path)
    with tarfile.open(tmp_path / "a.tar", "w:gz") as tar:
        tar.add(__file__)
    with pytest.raises(ValueError, match="expected an uncompressed tar file"):
        open_source(tmp_path)
    write_tar(tmp_path / "b0.tar", {"1.jpg": jpeg})
    with pytest.raises(ValueError, match=r"2 of 3 shards do not exist, first .*b1.tar"):
        open_source(f"{tmp_path}/b{{0..2}}.tar")


@pytest.mark.parametrize("kind", ["missing", "empty", "no image", "empty tar"])
def test_paths_without_images_say_what_was_expected(tmp_path, kind):
    path = tmp_path / "data"
    if kind != "missing":
        path.mkdir()
    if kind == "no image":
        (path / "notes.txt").write_text("hello")
    if kind == "empty tar":
        write_tar(path / "a.tar", {"notes.txt": b"hello"})
    match = "does not exist; expected a folder" if kind == "missing" else r"holds no image; expected files named \*.jpg"
    with pytest.raises(ValueError, match=match):
        open_source(path)


def count_scans(monkeypatch, name):
    calls = []
    real = getattr(scan, name)
    monkeypatch.setattr(f"ijepa_fast.data.sources.{name}", lambda *args: calls.append(1) or real(*args))
    return calls


def test_the_index_is_kept_until_the_folder_changes(tmp_path, monkeypatch):
    data, cache = tmp_path / "data", tmp_path / "cache"
    write_photos(data, 6, size=20)
    calls = count_scans(monkeypatch, "scan_folder")
    fresh, kept = open_source(data, cache=cache), open_source(data, cache=cache)
    assert len(calls) == 1
    assert names(kept) == names(fresh)
    assert kept.classes == fresh.classes
    assert np.array_equal(kept.labels, fresh.labels)
    (data / "class1/0001.jpg").rename(data / "class1/new.jpg")
    assert "class1/new.jpg" in names(open_source(data, cache=cache))
    (data / "class2").mkdir()
    (data / "class2/1.jpg").write_bytes(b"x")
    assert len(open_source(data, cache=cache)) == 7
    assert len(calls) == 3


def test_the_index_is_kept_until_a_shard_is_written_or_added(tmp_path, monkeypatch, jpeg):
    data, cache = tmp_path / "data", tmp_path / "cache"
    data.mkdir()
    write_tar(data / "0.tar", {"a.jpg": jpeg, "b.jpg": jpeg})
    calls = count_scans(monkeypatch, "scan_shards")
    assert [len(open_source(data, cache=cache)) for _ in range(3)] == [2, 2, 2]
    assert len(calls) == 1
    assert open_source(data, cache=cache).read(1) == jpeg
    write_tar(data / "0.tar", {"a.jpg": jpeg})
    assert len(open_source(data, cache=cache)) == 1
    write_tar(data / "1.tar", {"c.jpg": jpeg})
    assert len(open_source(data, cache=cache)) == 2


def test_a_damaged_kept_index_is_made_again(tmp_path, monkeypatch):
    data, cache = tmp_path / "data", tmp_path / "cache"
    write_photos(data, 4, size=20)
    calls = count_scans(monkeypatch, "scan_folder")
    open_source(data, cache=cache)
    (meta,) = cache.glob("*/meta.json")
    meta.write_text(meta.read_text()[:30])
    assert len(open_source(data, cache=cache)) == 4
    assert len(calls) == 2


def test_broken_files_do_not_hinder_indexing(tmp_path):
    for name, data in bad_kinds().items():
        (tmp_path / name).write_bytes(data)
    assert len(open_source(tmp_path)) == len(bad_kinds())


def test_copies_of_machines_under_one_path_have_an_index_each(tmp_path):
    """A machine sees its own copy: its index is another, and does not take the place of the first one's."""
    photos, one, other = tmp_path / "photos", tmp_path / "one", tmp_path / "other"
    for folder in (one, other):
        folder.mkdir()
        (folder / "a.jpg").write_bytes(b"")
    built = []

    def open_copy(folder):
        folder.rename(photos)
        index.cached(str(photos), tmp_path / "kept", lambda: built.append(folder) or index.Index(index.Names.of(["a"])))
        photos.rename(folder)

    for folder in (one, other, one, other):
        open_copy(folder)
    assert built == [one, other]
    assert len(list((tmp_path / "kept").glob("index-*"))) == 2
