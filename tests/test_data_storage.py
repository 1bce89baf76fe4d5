"""What is no regular file, what is too large, and storage that is away for a moment or for good."""

import errno
import os
import threading
import time

import numpy as np
import pytest
import torch

pytest.importorskip("PIL")
pytest.importorskip("nvidia.dali")

from ijepa_fast.data import storage
from ijepa_fast.data.central import eval_batches
from ijepa_fast.data.check import check
from ijepa_fast.data.dali import TrainLoader
from ijepa_fast.data.sources import open_source
from ijepa_fast.data.storage import MAX_BYTES, StorageTrouble, read_file
from tests.data_images import write_photos, write_tar


@pytest.fixture
def brief(monkeypatch):
    """Waits of .3 s in all."""
    monkeypatch.setattr(storage, "WAITS", (0.02, 0.04, 0.08, 0.16))


@pytest.fixture
def photos(tmp_path):
    write_photos(tmp_path / "photos", 40, size=40)
    return open_source(tmp_path / "photos")


def take(source, steps, **options):
    loader = TrainLoader(source, **({"batch_size": 8, "crop": 32, "seed": 3, "cache_bytes": 0} | options))
    try:
        return [next(loader) for _ in range(steps)]
    finally:
        loader.close()


def make_strange(folder):
    """Names of images that are none, and the reasons against them."""
    folder.mkdir(parents=True, exist_ok=True)
    os.mkfifo(folder / "fifo.jpg")
    (folder / "zero.jpg").symlink_to("/dev/zero")
    (folder / "folder.jpg").mkdir()
    with open(folder / "sparse.jpg", "wb") as file:
        file.truncate(20 << 30)
    return {
        "fifo.jpg": "not a regular file but a FIFO",
        "zero.jpg": "not a regular file but a device",
        "folder.jpg": "not a regular file but a folder",
        "sparse.jpg": f"has {20 << 30} bytes, over the bound of {MAX_BYTES} for one image",
    }


def test_only_regular_files_of_bounded_size_are_read(tmp_path, capfd):
    reasons = make_strange(tmp_path / "photos" / "class0")
    write_photos(tmp_path / "photos", 40, size=40)
    source, record = open_source(tmp_path / "photos"), tmp_path / "bad_files.txt"
    begin = time.monotonic()
    batches = take(source, 12, bad_files=record, max_bad_share=0.2)
    assert all(len(batch.images) == 8 for batch in batches)
    listed = dict(line.split("\t") for line in record.read_text().splitlines())
    assert listed == {f"{tmp_path}/photos/class0/{name}": reason for name, reason in reasons.items()}
    assert check(str(tmp_path / "photos"), 2) == 1
    assert f"44 files, {len(reasons)} bad" in capfd.readouterr().out
    assert time.monotonic() - begin < 30


def test_a_large_member_of_a_shard_is_not_read_whole(tmp_path, monkeypatch):
    write_tar(tmp_path / "a.tar", {"1.jpg": b"x" * 2000})
    monkeypatch.setattr(storage, "MAX_BYTES", 1999)
    with pytest.raises(ValueError, match="2000 bytes, over the bound of 1999"):
        open_source(tmp_path).read(0)


def test_a_read_that_comes_in_pieces_is_whole(tmp_path, monkeypatch):
    data = bytes(range(256)) * 20
    (tmp_path / "a").write_bytes(data)
    real = os.read
    monkeypatch.setattr(os, "read", lambda file, size: real(file, min(size, 1000)))
    assert read_file(str(tmp_path / "a")) == data


def test_a_folder_that_is_away_for_a_moment_changes_nothing(photos, tmp_path, brief, capfd):
    expected = take(photos, 10)
    loader = TrainLoader(photos, batch_size=8, crop=32, seed=3, cache_bytes=0, bad_files=tmp_path / "bad")
    found = [next(loader)]
    (tmp_path / "photos").rename(tmp_path / "away")
    threading.Timer(0.1, lambda: (tmp_path / "away").rename(tmp_path / "photos")).start()
    found += [next(loader) for _ in range(9)]
    loader.close()
    assert [batch.indices.tolist() for batch in found] == [batch.indices.tolist() for batch in expected]
    assert all(torch.equal(a.images, b.images) for a, b in zip(found, expected))
    assert (tmp_path / "bad").read_text() == ""
    assert "No such file or directory; trying again in 0.02 s" in capfd.readouterr().err


@pytest.mark.parametrize("code", ["ENOENT", "EIO", "ESTALE", "EACCES", "ETIMEDOUT"])
def test_trouble_that_passes_is_no_bad_image_and_trouble_that_stays_ends_the_run(photos, tmp_path, brief, code):
    number, expected = getattr(errno, code), take(photos, 5)
    read, tries, lock = photos.read, {}, threading.Lock()

    def troubled(index, times):
        with lock:
            tries[index] = tries.get(index, 0) + 1
        if tries[index] <= times:
            raise OSError(number, os.strerror(number))
        return read(index)

    photos.read = lambda index: troubled(index, 2)
    for a, b in zip(take(photos, 5, bad_files=tmp_path / "bad"), expected):
        assert torch.equal(a.images, b.images)
    photos.read = lambda index: troubled(index, 10**9)
    words = r"class\d/\d+.jpg: cannot be read: is it mounted\? " + os.strerror(number) + ", tried 5 times within 0.3 s"
    with pytest.raises(StorageTrouble, match=words):
        take(photos, 1, bad_files=tmp_path / "bad")
    with pytest.raises(StorageTrouble, match=words):
        next(eval_batches(photos, batch_size=8, crop=32, resize=32, bad_files=tmp_path / "bad"))
    assert (tmp_path / "bad").read_text() == ""


def test_a_shard_that_was_replaced_is_opened_again(tmp_path, brief, monkeypatch):
    write_tar(tmp_path / "a.tar", {f"{i}.jpg": bytes([i]) * 100 for i in range(4)})
    source = open_source(tmp_path)
    assert source.read(1) == b"\1" * 100
    real, stale = os.pread, set()

    def pread(file, *place):
        if not stale:
            stale.add(file)
        if file in stale and len(stale) == 1:
            stale.add(None)
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return real(file, *place)

    monkeypatch.setattr(os, "pread", pread)
    assert storage.Patience()(lambda: source.read(2), lambda: source.name(2)) == b"\2" * 100
    with open(tmp_path / "a.tar", "r+b") as file:
        file.truncate(1500)
    with pytest.raises(StorageTrouble, match=r"a.tar: is \d+ bytes shorter than when it was indexed"):
        source.read(3)


def test_closing_does_not_wait_for_storage(photos, monkeypatch):
    monkeypatch.setattr(storage, "WAITS", (600,))
    photos.read = lambda index: os.stat(photos.root + "/nothing") and b""
    loader = TrainLoader(photos, batch_size=8, crop=32)
    time.sleep(0.3)
    begin = time.monotonic()
    loader.close()
    assert time.monotonic() - begin < 5


def test_names_listed_when_storage_was_away_are_read_once_more(photos, tmp_path):
    """Earlier versions listed them as bad."""
    expected, record = take(photos, 5), tmp_path / "bad"
    names = [photos.name(i) for i in range(14)]
    record.write_text("".join(f"{name}\tcannot be read: Stale file handle\n" for name in names))
    for a, b in zip(take(photos, 5, bad_files=record), expected):
        assert np.array_equal(a.indices, b.indices)
