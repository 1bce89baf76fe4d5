"""Disks that are full or gone, files that are no YAML, images that are not those the run began with: one sentence."""

import json
import shutil

import numpy as np
import pytest

from tests.faults.run import saved
from tests.launch import finish, losses, run, start

pytest.importorskip("deepspeed")
pytest.importorskip("nvidia.dali")
pytest.importorskip("PIL")

from PIL import Image

from ijepa_fast.config import ConfigError, load_config
from ijepa_fast.data.index import Index, Names
from ijepa_fast.data.sources import Source
from ijepa_fast.run.log import _reopen
from ijepa_fast.run.sources import identity


def only_error(text):
    assert "Traceback" not in text
    (error,) = [line for line in text.splitlines() if line.startswith("error: ")]
    return error


STEPS = ("optim.epochs=9", "log.keep=9")


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("from ijepa_fast.run import checkpoint; checkpoint._free = lambda folder: 1000", ["No space", "1,000 free"]),
        # Files of at most 50 kB: a write fails half-way, as on a disk that is full.
        ("import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))", ["File too large"]),
    ],
    ids=["no room", "fails half-way"],
)
def test_a_checkpoint_that_cannot_be_written_leaves_the_others(tmp_path, code, words):
    folder = run(tmp_path, *STEPS, "optim.steps=2")
    statuses, errors = finish(start(tmp_path, *STEPS, "optim.steps=4", first=code))
    assert statuses == [1]
    error = only_error(errors)
    for word in ("step-00000004", "bytes needed", "earlier checkpoints are intact", *words):
        assert word in error
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names == [".lock", "step-00000002"]
    unbroken = run(tmp_path, *STEPS, "optim.steps=4", "name=unbroken")
    assert losses(run(tmp_path, *STEPS, "optim.steps=4")) == losses(unbroken)


def test_a_folder_that_cannot_be(tmp_path):
    (tmp_path / "quickstart").write_text("a file")
    statuses, errors = finish(start(tmp_path, "optim.steps=1"))
    assert statuses == [1], errors[-3000:]
    assert str(tmp_path / "quickstart") in only_error(errors)


@pytest.mark.parametrize("text", ["a: [1, 2", "a: b: c", "\t- x", b"\xff\xfe\x00"])
def test_a_yaml_that_cannot_be_read_is_named(tmp_path, text):
    path = tmp_path / "bad.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=r"bad\.yaml is not readable YAML"):
        load_config(path)


def test_the_log_is_rewritten_whole(tmp_path):
    path = tmp_path / "log.jsonl"
    good = [json.dumps({"step": step, "loss": 1.0}) for step in (1, 2, 3)]
    path.write_text("\n".join([good[0], "[1]", good[1][:-3], good[1], "null", good[2], good[2][:5]]))
    with _reopen(path, 2) as log:
        log.write(good[2] + "\n")
    assert path.read_text().splitlines() == good
    assert list(tmp_path.iterdir()) == [path]


def test_identity_is_of_the_names_alone():
    def of(names, root="/a"):
        return identity(Source(root, Index(Names.of(names))))

    assert identity(None) is None
    assert of(["x.jpg", "y.jpg"]) == of(["x.jpg", "y.jpg"], root="/b")
    assert of(["x.jpg", "y.jpg"])["images"] == 2
    assert len({of(names)["sha256"] for names in (["x.jpg", "y.jpg"], ["x.jpgy", ".jpg"], ["x.jpg"], ["y", "x"])}) == 4


def test_images_that_changed_are_refused_and_moved_ones_are_not(tmp_path):
    photos, generator = tmp_path / "photos", np.random.default_rng(0)
    photos.mkdir()
    for number in range(16):
        Image.fromarray(generator.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(photos / f"{number:02}.png")
    options = ("optim.epochs=9", "log.keep=9")
    unbroken = run(tmp_path, *options, f"data.source={photos}", "optim.steps=4", "name=unbroken")
    run(tmp_path, *options, f"data.source={photos}", "optim.steps=2")
    moved = photos.rename(tmp_path / "elsewhere")
    assert losses(run(tmp_path, *options, f"data.source={moved}", "optim.steps=4")) == losses(unbroken)

    shutil.copyfile(moved / "00.png", moved / "new.png")
    more = (*options, f"data.source={moved}", "optim.steps=5", "optim.lr=0.5")
    statuses, errors = finish(start(tmp_path, *more))
    assert statuses == [1]
    assert "16 images -> 17" in only_error(errors)
    statuses, errors = finish(start(tmp_path, *more, "data.changed=accept"))
    assert statuses == [0], errors
    assert "optim.lr: 0.001 -> 0.5 from step 4" in errors
    records = [json.loads(line) for line in (tmp_path / "quickstart" / "log.jsonl").read_text().splitlines()]
    (change,) = [record["changed"] for record in records if record["step"] == 4 and "changed" in record]
    assert change["optim.lr"] == [0.001, 0.5]
    assert saved(tmp_path / "quickstart") == [2, 4, 5]
