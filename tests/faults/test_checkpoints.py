"""No damaged checkpoint is trained on, and none that is good is lost."""

import json
import os
import shutil
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from tests.faults.run import LONG, logged, saved, wait_for
from tests.launch import finish, losses, run, start

pytest.importorskip("deepspeed")
pytest.importorskip("nvidia.dali")

from safetensors.torch import load_file

from ijepa_fast.interop.tensors import write_tensors
from ijepa_fast.interop.weights import checkpoints
from ijepa_fast.run import checkpoint
from ijepa_fast.run.checkpoint import CheckpointError, Damaged, clear, prune, read_state
from ijepa_fast.run.digests import damage, is_sealed, seal

STEPS = ("optim.epochs=9", "log.checkpoint_every=2", "log.keep=9")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run with checkpoints of steps 2 and 4."""
    return run(tmp_path_factory.mktemp("runs"), *STEPS, "optim.steps=4")


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def empty(path):
    os.truncate(path, 0)


def zero(path):
    half = path.stat().st_size // 2
    with open(path, "r+b") as file:
        file.seek(half)
        file.write(bytes(path.stat().st_size - half))


def flip(path):
    with open(path, "r+b") as file:
        file.seek(path.stat().st_size * 3 // 4)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))


def swap(path):
    shutil.copyfile(path.parents[1] / "step-00000002" / path.name, path)


def delete(path):
    path.unlink()


def edit(path):
    path.write_bytes(path.read_bytes().replace(b'"step": 4', b'"step": 3').replace(b"F32", b"I32", 1))


def unsay(path):
    """The format becomes the first one, which had no digests."""
    path.write_bytes(path.read_bytes().replace(b'"format": 4', b'"format": 1').replace(b"F32", b"I32", 1))


def replace(path):
    """A folder of that name, as a synchronisation that went wrong leaves it."""
    path.unlink()
    path.mkdir()


FILES = ("rank-00000.safetensors", "weights.safetensors", "state.json")
DAMAGES = (truncate, empty, zero, flip, swap, delete, edit, unsay, replace)
IN_EVERY_RUN = {(truncate, FILES[0]), (zero, FILES[0]), (edit, FILES[2])}


@pytest.mark.parametrize(
    ("hurt", "name"),
    [
        pytest.param(hurt, name, marks=[] if (hurt, name) in IN_EVERY_RUN else [pytest.mark.slow])
        for hurt in DAMAGES
        for name in FILES
    ],
)
def test_damage_is_named_and_the_run_goes_on_from_the_newest_good_checkpoint(trained, tmp_path, hurt, name):
    folder = tmp_path / "quickstart"
    shutil.copytree(trained, folder)
    hurt(folder / "checkpoints" / "step-00000004" / name)
    statuses, errors = finish(start(tmp_path, *STEPS, "optim.steps=4"))
    assert statuses == [0], errors
    (warning,) = [line for line in errors.splitlines() if line.startswith("WARNING")]
    assert "step-00000004" in warning
    assert name in warning
    assert f"Going on from {folder / 'checkpoints' / 'step-00000002'}" in warning
    assert losses(folder) == losses(trained)
    assert saved(folder) == [2, 4]
    assert (folder / "checkpoints" / "step-00000004.aside").is_dir()
    whole = folder / "checkpoints" / "step-00000004" / "weights.safetensors"
    assert whole.read_bytes() == (trained / "checkpoints" / "step-00000004" / "weights.safetensors").read_bytes()


def test_no_good_checkpoint_is_an_error(trained, tmp_path):
    folder = tmp_path / "quickstart"
    shutil.copytree(trained, folder)
    for step in (2, 4):
        flip(folder / "checkpoints" / f"step-{step:08d}" / FILES[0])
    statuses, errors = finish(start(tmp_path, *STEPS, "optim.steps=4"))
    assert statuses == [1]
    assert "no checkpoint of the run verifies" in errors
    assert saved(folder) == [2, 4]


def test_resume_from_a_named_checkpoint(trained, tmp_path):
    folder = tmp_path / "quickstart"
    shutil.copytree(trained, folder)
    mine = folder / "checkpoints" / "step-00000002" / FILES[0]
    shutil.copyfile(mine.parents[1] / "step-00000004" / FILES[0], mine.with_name("rank-00000 (copy).safetensors"))
    assert run(tmp_path, *STEPS, "optim.steps=4", "resume=step-2", "log.keep=1") == folder
    assert losses(folder) == losses(trained)
    assert saved(folder) == [4]
    statuses, errors = finish(start(tmp_path, *STEPS, "optim.steps=4", "resume=step-3"))
    assert statuses == [1]
    assert "there are step-00000004" in errors


def test_a_checkpoint_of_the_first_format_is_read(trained, tmp_path):
    folder = tmp_path / "quickstart"
    shutil.copytree(trained, folder)
    shutil.rmtree(folder / "checkpoints" / "step-00000004")
    path = folder / "checkpoints" / "step-00000002" / "state.json"
    state = json.loads(path.read_text())
    path.write_text(json.dumps({"format": 1} | {key: state[key] for key in ("step", "shapes", "config")}))
    statuses, errors = finish(start(tmp_path, *STEPS, "optim.steps=4"))
    assert statuses == [0], errors
    assert errors.count("cannot be verified") == 1
    assert errors.count("drew masks by rank") == 1
    assert losses(folder) == losses(trained)


def test_pruning_removes_only_what_was_made_here(tmp_path):
    made = [f"step-{step:08d}" for step in (2, 4, 6, 8)]
    others = ["step-00000004-keep", "step-best", "step-4", "step-00000002.aside", "mine", "step-000000001"]
    others += ["step-\u0660\u0660\u0660\u0660\u0660\u0660\u0660\u0661", ".step-mine.draft"]
    for name in [*made, *others]:
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-00000001").write_text("a file")
    (tmp_path / "checkpoints" / "step-00000003").symlink_to(tmp_path / "checkpoints" / "mine")
    others += ["step-00000001", "step-00000003"]
    for name in (".step-00000002.draft", ".step-00000002.removed"):  # of a killed process
        (tmp_path / "checkpoints" / name).mkdir()
    clear(tmp_path)
    prune(tmp_path, keep=1, keep_every=4)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == sorted([*others, made[1], made[3]])
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000003", made[1], made[3]]


STATE = {"format": 4, "step": 4, "images": 32, "shapes": {}, "config": {}, "data": None, "files": {}}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "[" * 100_000,
        b"\xff\xfe",
        json.dumps(STATE),
        seal(STATE | {"step": 3}),
        seal(STATE).replace('"step": 4', '"step": 5'),
        *(
            seal({key: value for key, value in STATE.items() if key != missing})
            for missing in ("step", "files", "config", "images")
        ),
        *(seal(STATE | {key: value}) for key, value in (("step", "4"), ("shapes", []), ("files", None))),
        json.dumps({"format": 1, "step": 4, "shapes": {}}),
    ],
)
def test_a_state_that_is_not_what_was_written_is_damage(tmp_path, text):
    path = tmp_path / "step-00000004"
    path.mkdir()
    (path / "state.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(Damaged, match="step-00000004"):
        read_state(path)


def test_a_checkpoint_of_a_later_version_is_not_damage(tmp_path):
    (tmp_path / "state.json").write_text(seal(STATE | {"format": 99}))
    with pytest.raises(CheckpointError, match="format 99, this version reads") as caught:
        read_state(tmp_path)
    assert not isinstance(caught.value, Damaged)


def test_room_is_of_bytes_and_of_files(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    checkpoint._check_room(tmp_path / "not" / "yet", 1000)
    here = os.statvfs(tmp_path)
    with pytest.raises(OSError, match="No space left"):
        checkpoint._check_room(tmp_path, here.f_bavail * here.f_frsize * 2)
    for files, favail, full in ((1000, 4, True), (1000, 5, False), (0, 0, False)):
        status = SimpleNamespace(f_bavail=1000, f_frsize=4096, f_files=files, f_favail=favail)
        monkeypatch.setattr(os, "statvfs", lambda _, status=status: status)
        with pytest.raises(OSError, match=r"No inodes left on device \(5 needed, 4 free\)") if full else nullcontext():
            checkpoint._check_room(tmp_path, 1000)


def test_digests(tmp_path):
    tensors = {"b": torch.randn(3, 5), "a": torch.arange(4), "c": torch.randn(7).bfloat16(), "d": torch.tensor(1.0)}
    known = write_tensors(tmp_path / "one", tensors, {"z": "1", "y": "2"})
    assert known == write_tensors(tmp_path / "two", dict(reversed(tensors.items())), {"y": "2", "z": "1"})
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert damage(tmp_path / "one", known) is None
    read = load_file(tmp_path / "one")
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
    sealed = json.loads(seal({"step": 3, "shapes": {"w": (2, 3)}}))
    assert is_sealed(sealed)
    assert not is_sealed(sealed | {"step": 4})


def test_a_second_start_says_who_trains(tmp_path):
    first = start(tmp_path, *LONG)
    try:
        wait_for(lambda: logged(tmp_path / "quickstart") >= 1)
        statuses, errors = finish(start(tmp_path, *LONG))
        assert statuses == [1]
        assert f"process {first[0].pid} on " in errors
        assert "since" in errors
        assert first[0].poll() is None
    finally:
        finish_of(first)
    run(tmp_path, "optim.steps=1")  # the lock of a killed process is gone


def finish_of(processes):
    for process in processes:
        process.kill()
        process.communicate()
