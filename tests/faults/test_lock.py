"""The lock of a run's folder where the kernel's is missing, or is of each machine alone."""

import errno
import json
import socket
import subprocess
import time

import pytest

from ijepa_fast.run import lock
from ijepa_fast.run.lock import FolderInUse, Lock


@pytest.fixture
def path(tmp_path, monkeypatch):
    """A lock file to be; with short times."""
    for name, seconds in (("BEAT", 0.1), ("STALE", 0.6), ("SETTLE", 0.2)):
        monkeypatch.setattr(lock, name, seconds)
    return tmp_path / "run" / "checkpoints" / ".lock"


def without_locks(monkeypatch, code=errno.ENOLCK):
    def flock(*_):
        raise OSError(code, "no locks")

    monkeypatch.setattr(lock.fcntl, "flock", flock)


def from_elsewhere(monkeypatch, host="elsewhere"):
    monkeypatch.setattr(lock.socket, "gethostname", lambda: host)


def test_with_locks_the_kernel_decides(path):
    first = Lock(path)
    with pytest.raises(FolderInUse, match=r"process \d+ on .*, since .*, trains there"):
        Lock(path)
    first.release()
    second = Lock(path)  # what the first wrote is gone
    second.release()
    assert path.read_text() == ""


def test_an_owner_on_another_machine_is_known_by_its_signs(path, monkeypatch):
    """Both machines get the lock, as on a file system whose locks are of each machine alone."""
    first = Lock(path)
    first._file.close()  # another machine's lock is not seen here
    first._file = path.open("a+")
    from_elsewhere(monkeypatch)
    with pytest.raises(FolderInUse, match="trains there"):
        Lock(path)
    first._ended.set()  # killed: no sign any more, and its name is left
    first._thread.join()
    began = time.monotonic()
    second = Lock(path)
    assert 0.2 < time.monotonic() - began < 5
    assert json.loads(path.read_text())["host"] == "elsewhere"
    second.release()


def test_a_sign_that_is_old_is_not_waited_for(path, monkeypatch):
    first = Lock(path)
    first._ended.set()
    first._thread.join()
    first._file.close()
    time.sleep(0.7)
    from_elsewhere(monkeypatch)
    began = time.monotonic()
    Lock(path).release()
    assert time.monotonic() - began < 0.5


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS], ids=errno.errorcode.get)
def test_without_locks_a_living_process_of_this_machine_is_the_owner(path, monkeypatch, code):
    without_locks(monkeypatch, code)
    owner = subprocess.Popen(["sleep", "100"])
    of_owner = {"host": socket.gethostname(), "pid": owner.pid, "since": "now", "born": lock._born(owner.pid)}
    path.parent.mkdir(parents=True)
    for changed, free in (({}, False), ({"born": "1"}, True)):  # another process has the number by now
        path.write_text(json.dumps(of_owner | changed))
        if free:
            Lock(path).release()
        else:
            with pytest.raises(FolderInUse, match=f"process {owner.pid} on .*, since now, trains there"):
                Lock(path)
    path.write_text(json.dumps(of_owner))
    owner.kill()
    owner.wait()
    Lock(path).release()


def test_another_error_of_the_lock_is_an_error(path, monkeypatch):
    without_locks(monkeypatch, errno.EIO)
    with pytest.raises(OSError, match="no locks"):
        Lock(path)


def test_of_two_starts_at_once_one_gives_way(path, monkeypatch):
    """Without locks: the other writes over what this one wrote, before it has settled."""
    without_locks(monkeypatch)
    other = json.dumps({"host": "elsewhere", "pid": 7, "since": "now"})
    monkeypatch.setattr(lock.time, "sleep", lambda _: path.write_text(other))
    with pytest.raises(FolderInUse, match="process 7 on elsewhere"):
        Lock(path)
    assert path.read_text() == other


def test_an_owner_that_was_cut_off_finds_another_in_its_place(path, monkeypatch):
    first = Lock(path)
    monkeypatch.setattr(lock, "_held", [first])
    assert not lock.lost()
    other = json.dumps({"host": "elsewhere", "pid": 7, "since": "now"})
    path.write_text(other)
    first._thread.join(10)
    assert lock.lost()
    with pytest.raises(FolderInUse, match="process 7 on elsewhere, since now, took it over"):
        lock.check()
    first.release()
    assert path.read_text() == other


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"host": 1}', "\x00\x00"])
def test_a_lock_file_that_names_nobody_is_free(path, text):
    path.parent.mkdir(parents=True)
    path.write_text(text)
    Lock(path).release()
