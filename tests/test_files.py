"""What is published is complete whenever it is there, is made once, and leaves nothing else behind."""

import os
import signal
import subprocess
import sys

import pytest

from ijepa_fast.files import draft_of, publish
from tests.launch import ROOT


def write(draft, kind, text):
    """A draft that holds `text`, as a file or as a file in a folder."""
    if kind == "folder":
        draft.mkdir()
        draft /= "inside"
    draft.write_text(text)


def text_of(path):
    return (path / "inside" if path.is_dir() else path).read_text()


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_appears_at_the_end_and_replaces_what_was_there(tmp_path, kind):
    path = tmp_path / "new" / "thing"
    for text in ("first", "second"):
        with publish(path) as draft:
            write(draft, kind, text)
            assert not path.exists() if text == "first" else text_of(path) == "first"
        assert text_of(path) == text
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("lock", [False, True], ids=["free", "locked"])
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_failure_leaves_what_was_there(tmp_path, kind, lock):
    path = tmp_path / "thing"
    with publish(path, lock=lock) as draft:
        write(draft, kind, "good")

    def interrupted():
        with publish(path, lock=lock) as draft:
            write(draft, kind, "half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert text_of(path) == "good"
    assert list(tmp_path.iterdir()) == [path]


def test_a_block_that_writes_nothing_changes_nothing(tmp_path):
    (tmp_path / "thing").write_text("good")
    with publish(tmp_path / "thing", lock=True):
        pass
    assert (tmp_path / "thing").read_text() == "good"
    assert list(tmp_path.iterdir()) == [tmp_path / "thing"]


RACE = """
import sys, time
from pathlib import Path
from ijepa_fast.files import publish
path = Path(sys.argv[1])
with publish(path, lock=True) as draft:
    if not path.exists():
        draft.write_text("half")
        print("writing", flush=True)
        time.sleep(float(sys.argv[2]))
        draft.write_text("whole")
    else:
        print(path.read_text(), flush=True)
"""


def racer(path, seconds):
    return subprocess.Popen(
        [sys.executable, "-c", RACE, path, str(seconds)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )


def test_one_process_writes_and_the_others_wait_for_it(tmp_path):
    processes = [racer(tmp_path / "thing", 0.5) for _ in range(4)]
    outputs = sorted(process.communicate(timeout=60)[0].strip() for process in processes)
    assert outputs == ["whole", "whole", "whole", "writing"]
    assert list(tmp_path.iterdir()) == [tmp_path / "thing"]


def test_what_a_killed_process_left_is_in_nobodys_way(tmp_path):
    process = racer(tmp_path / "thing", 60)
    assert process.stdout.readline() == "writing\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert draft_of(tmp_path / "thing").exists()
    assert racer(tmp_path / "thing", 0).communicate(timeout=60)[0] == "writing\n"
    assert (tmp_path / "thing").read_text() == "whole"
    assert list(tmp_path.iterdir()) == [tmp_path / "thing"]


def test_durable_flushes_every_file_before_the_rename_and_the_folder_after(tmp_path, monkeypatch):
    path, flushed = tmp_path / "thing", []
    monkeypatch.setattr("os.fsync", lambda file: flushed.append((os.readlink(f"/proc/self/fd/{file}"), path.exists())))
    with publish(path, durable=True) as draft:
        write(draft, "folder", "good")
    assert flushed == [(str(draft / "inside"), False), (str(draft), False), (str(tmp_path), True)]
