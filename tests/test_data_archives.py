"""Archives: zip, tar.gz, tar of tars, patterns; and what of them is damaged."""

import gzip
import io
import tarfile
import zipfile

import pytest

pytest.importorskip("nvidia.dali")
pytest.importorskip("sklearn")

from ijepa_fast.data import sources
from ijepa_fast.data.dali import TrainLoader
from ijepa_fast.data.headers import BadImage
from ijepa_fast.data.sources import open_source
from tests.data_images import encode, photographs, write_tar


@pytest.fixture(scope="module")
def images():
    """Four files, no two alike, in two folders."""
    photo = photographs()[0]
    return {f"{'ab'[i % 2]}/{i}.jpg": encode(photo.crop((20 * i, 0, 20 * i + 64, 48))) for i in range(4)}


def write_zip(path, members, kind=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", kind) as archive:
        archive.mkdir("a")
        for name, data in members.items():
            archive.writestr(name, data)


def tar_of(members):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def held(source):
    return {source.index.names[i]: source.read(i) for i in range(len(source))}


@pytest.mark.parametrize("kind", [zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED])
def test_a_zip_is_read_in_place(tmp_path, images, kind):
    write_zip(tmp_path / "x.zip", images | {"notes.txt": b"hello"}, kind)
    for _ in range(2):  # as it is, then from the kept index
        source = open_source(tmp_path / "x.zip", cache=tmp_path / "cache")
        assert held(source) == images
        assert source.classes == ["a", "b"]
        assert source.left_out == "1 .txt"
    loader = TrainLoader(source, batch_size=4, crop=32, threads=1)
    assert next(loader).images.shape == (4, 32, 32, 3)
    loader.close()


def test_a_tar_gz_is_unpacked_once(tmp_path, images, capsys):
    (tmp_path / "x.tar.gz").write_bytes(gzip.compress(tar_of(images)))
    cache = tmp_path / "cache"
    assert held(open_source(tmp_path / "x.tar.gz", cache=cache)) == images
    assert "unpacking it once" in capsys.readouterr().err
    assert held(open_source(tmp_path / "x.tar.gz", cache=cache)) == images
    assert "unpacking" not in capsys.readouterr().err


def test_a_tar_of_tars_is_read_in_place(tmp_path, images):
    """As ImageNet is shipped: the inner archives are the classes."""
    inner = {f"{c}.tar": tar_of({n[2:]: d for n, d in images.items() if n[0] == c}) for c in "ab"}
    write_tar(tmp_path / "outer.tar", inner)
    source = open_source(tmp_path / "outer.tar")
    assert held(source) == images
    assert source.classes == ["a", "b"]


def test_an_archive_that_several_threads_open_at_once_is_read_by_each(tmp_path, images, monkeypatch):
    """The cache keeps one of the files they open; the others are held by nobody but their readers."""
    monkeypatch.setattr(sources, "_open_shard", open_uncached)
    write_tar(tmp_path / "x.tar", images)
    assert held(open_source(tmp_path / "x.tar", cache=tmp_path / "cache")) == images


def open_uncached(path):
    return open(path, "rb", buffering=0)


open_uncached.cache_clear = lambda: None


def test_patterns_with_braces_and_stars(tmp_path, images):
    for number, (name, data) in enumerate(images.items()):
        write_tar(tmp_path / f"s{number:02}.tar", {name: data})
    assert len(open_source(f"{tmp_path}/s{{00,03}}.tar")) == 2
    assert len(open_source(f"{tmp_path}/s{{00..02}}.tar")) == 3
    assert len(open_source(f"{tmp_path}/s0*.tar")) == 4
    with pytest.raises(ValueError, match=r"1 of 2 shards do not exist, first .*s07\.tar"):
        open_source(f"{tmp_path}/s{{00,07}}.tar")


def test_damaged_archives_are_named(tmp_path, images):
    write_zip(tmp_path / "x.zip", images)
    source = open_source(tmp_path / "x.zip")
    data = bytearray((tmp_path / "x.zip").read_bytes())
    start = int(source.index.start[0])
    data[start : start + 8] = b"\xff" * 8
    (tmp_path / "x.zip").write_bytes(data)
    with pytest.raises(BadImage, match="cannot be unpacked"):
        open_source(tmp_path / "x.zip").read(0)
    (tmp_path / "x.zip").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"x\.zip: expected a zip archive"):
        open_source(tmp_path / "x.zip")
    packed = gzip.compress(tar_of(images))
    (tmp_path / "y.tgz").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(ValueError, match=r"y\.tgz: cut short or no gzip file"):
        open_source(tmp_path / "y.tgz", cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.tar"))
    whole = tar_of({"a.tar": tar_of(images)})
    (tmp_path / "z.tar").write_bytes(whole.replace(b"b/3.jpg", b"b/3.jpX"))
    with pytest.raises(ValueError, match=r"z\.tar:a\.tar: no tar header at byte"):
        open_source(tmp_path / "z.tar")
