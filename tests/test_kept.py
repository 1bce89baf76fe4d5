"""A frozen teacher's targets, computed once: the crops they are of, the trajectory, a resume, what is refused."""

import errno
import json
import os
import shutil
import sys
import time
from contextlib import ExitStack
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("deepspeed")
pytest.importorskip("nvidia.dali")
pytest.importorskip("PIL")

from PIL import Image

from ijepa_fast.config import ConfigError, load_config
from ijepa_fast.data.crops import crop_keys
from ijepa_fast.data.dali import TrainLoader
from ijepa_fast.data.sources import open_source
from ijepa_fast.run import kept
from ijepa_fast.run.build import build_method, make_ready
from ijepa_fast.run.sources import contents, identity
from tests.data_images import bad_kinds, encode, write_photos
from tests.launch import TINY, finish, losses, run, start

IMAGES = 21  # of which a batch of 8 has no whole number: it spans epochs
MEANS = ["data.mean=[0.485,0.456,0.406]", "data.std=[0.229,0.224,0.225]"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    write_photos(folder, IMAGES, size=40)
    return folder


def take(source, steps, **options):
    loader = TrainLoader(source, **({"batch_size": 8, "crop": 32, "seed": 3, "flip": True} | options))
    try:
        return [next(loader) for _ in range(steps)]
    finally:
        loader.close()


# Crops of which an image has few


def test_crops_come_in_turn_by_epoch():
    positions = np.arange(30)
    keys = crop_keys(positions, positions % 10 * 7 % 10, 10, 2)
    assert sorted(keys[:10]) == list(range(0, 20, 2))
    assert sorted(keys[10:20]) == list(range(1, 20, 2))
    assert sorted(keys[20:]) == list(range(0, 20, 2))
    assert crop_keys(positions, positions, 10, 0) is positions


def test_a_crop_that_comes_again_is_the_same_to_the_bit(photos):
    """Two of each image, mirrored ones too, and no third."""
    source = open_source(photos)
    seen = {}
    for batch in take(source, 16, crops_per_image=2, beside=lambda _, keys: keys):
        for key, index, image in zip(batch.draw.tolist(), batch.indices.tolist(), batch.images):
            assert key // 2 == index
            assert torch.equal(seen.setdefault(key, image), image)
    assert len(seen) == 2 * IMAGES
    assert len({image.numpy().tobytes() for image in seen.values()}) == 2 * IMAGES


def test_what_stands_in_for_a_bad_file_has_its_own_key(tmp_path):
    write_photos(tmp_path, 12, size=40)
    (tmp_path / "class0" / "bad.jpg").write_bytes(next(iter(bad_kinds().values())))
    source = open_source(tmp_path)
    (bad,) = [number for number in range(len(source)) if source.name(number).endswith("bad.jpg")]
    found = take(source, 13, crops_per_image=1, beside=lambda _, keys: keys, max_bad_share=0.5)
    crops = {}
    for batch in found:
        assert batch.draw.tolist() == batch.indices.tolist()
        for key, image in zip(batch.draw.tolist(), batch.images):
            assert torch.equal(crops.setdefault(key, image), image)
    assert crops.keys() == set(range(13)) - {bad}


# Runs


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    options = ["mask.min_keep=null", "model.predictor_dim=32", "optim.steps=2", "name=teacher"]
    return run(tmp_path_factory.mktemp("teachers"), *options, config="mae_cifar10")


def options_of(photos, teacher, cache=None):
    salt = f"teacher: frozen, teacher_from: {teacher}, target_layers: 2, target_norm: position"
    cached = f", teacher_cache: {cache}" if cache else ""
    data = [f"data.source={photos}", "data.crops_per_image=2", "data.flip=true", "optim.epochs=6"]
    return [*data, *MEANS, f"objective.options={{{salt}{cached}}}"]


@pytest.mark.slow
def test_cached_targets_are_those_of_every_step(tmp_path, photos, teacher):
    """As if the teacher ran in every step; a resume is to the bit and computes nothing again."""
    cache = tmp_path / "targets"
    plain = run(tmp_path, *options_of(photos, teacher), "name=plain", "optim.steps=9")
    cached = run(tmp_path, *options_of(photos, teacher, cache), "name=cached", "optim.steps=9")
    assert losses(cached) == pytest.approx(losses(plain), rel=1e-5)
    written = (cache / kept.VALUES).stat()
    assert written.st_size == 2 * IMAGES * 64 * 32 * 4
    broken = options_of(photos, teacher, cache)
    run(tmp_path, *broken, "name=broken", "optim.steps=4")
    assert losses(run(tmp_path, *broken, "name=broken", "optim.steps=9")) == losses(cached)
    assert (cache / kept.VALUES).stat().st_mtime_ns == written.st_mtime_ns
    assert (cache / kept.WRITTEN).read_bytes() == b"\1" * 2 * IMAGES
    first = json.loads((cached / "log.jsonl").read_text().splitlines()[0])["tokens_per_image"]
    assert first == json.loads((plain / "log.jsonl").read_text().splitlines()[0])["tokens_per_image"] - 64
    statuses, errors = finish(start(tmp_path, *broken, "name=other", "seed=1"))
    assert statuses == [1]
    assert "was made with another seed, 0, and this run has 1; name another folder" in errors


@pytest.mark.slow
@pytest.mark.multi_rank
def test_two_ranks_fill_and_read_one_folder(tmp_path, photos, teacher):
    folders = [
        run(tmp_path, *options_of(photos, teacher, tmp_path / f"targets-{ranks}"), *more, ranks=ranks)
        for ranks, more in ((1, ("name=one", "optim.steps=7")), (2, ("name=two", "optim.steps=7", "engine.zero=2")))
    ]
    one, two = ([*torch.from_file(str(tmp_path / f"targets-{n}" / kept.VALUES), size=86016)] for n in (1, 2))
    torch.testing.assert_close(torch.stack(two), torch.stack(one), rtol=1e-4, atol=1e-5)
    assert losses(folders[1]) == pytest.approx(losses(folders[0]), rel=1e-5)


# Which rows are there, in this process alone


@pytest.fixture
def alone(monkeypatch):
    """No other ranks, and no process group."""
    monkeypatch.setattr(kept, "on_first", lambda work: work())
    monkeypatch.setattr(kept, "together", lambda work: [work()])
    monkeypatch.setattr(kept.pulse, "at", lambda *_: None)


def random_teacher(photos, tmp_path, *changes):
    """Configuration, method and images of a run behind a random teacher, whose targets lie in tmp_path/targets."""
    options = f"objective.options={{teacher: random, teacher_cache: {tmp_path / 'targets'}}}"
    data = [f"data.source={photos}", "data.crops_per_image=2", f"runs={tmp_path / 'runs'}", "data.max_bad_share=0.5"]
    config = load_config("quickstart", [*TINY, *data, options, *changes])
    method = build_method(config)
    make_ready(method)
    return config, method, open_source(photos)


def recall_of(photos, tmp_path, *changes):
    config, method, source = random_teacher(photos, tmp_path, *changes)
    recall = kept.kept_values(config, method, source, torch.device("cpu"), 0, 1)
    return lambda *keys: recall(method.draw(len(keys), 0, 0), np.array(keys)).features, source


def test_a_row_that_is_not_there_is_no_target_of_zeros(alone, tmp_path):
    """An image that was over data.max_pixels when they were computed, and is not any more."""
    write_photos(tmp_path / "photos", 12, size=40)
    (tmp_path / "photos" / "class0" / "large.png").write_bytes(encode(Image.new("RGB", (200, 200)), "PNG"))
    recall, source = recall_of(tmp_path / "photos", tmp_path, "data.max_pixels=20000")
    (large,) = [number for number in range(len(source)) if source.name(number).endswith("large.png")]
    written = (tmp_path / "targets" / kept.WRITTEN).read_bytes()
    assert [row for row in range(26) if not written[row]] == [2 * large, 2 * large + 1]
    assert all(recall(row).any() for row in range(26) if row // 2 != large)
    recall, _ = recall_of(tmp_path / "photos", tmp_path, "data.max_pixels=50000")
    with pytest.raises(ConfigError) as error:
        recall(0, 1, 2 * large + 1)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(f"objective.options.teacher_cache: {tmp_path}/targets has no targets of ")
    assert "large.png, which could not be used when they were computed" in str(error.value)


def test_every_rank_flushes_what_it_wrote(alone, tmp_path, photos, monkeypatch):
    """Another machine's flush does not reach it; and two ranks write every row once."""
    flushed, rows, shape = [], [], (2 * IMAGES, 64, 32)
    draft = tmp_path / "draft"
    draft.mkdir()
    kept._reserve(draft / kept.VALUES, 2 * IMAGES * 64 * 32 * 4)
    kept._reserve(draft / kept.WRITTEN, 2 * IMAGES)
    flush, write = os.fsync, kept._write
    monkeypatch.setattr(
        kept.os, "fsync", lambda file: (flushed.append(os.readlink(f"/proc/self/fd/{file}")), flush(file))
    )
    monkeypatch.setattr(kept, "_write", lambda file, data, place: (rows.append(place), write(file, data, place)))
    for rank in (0, 1):
        config, method, source = random_teacher(photos, tmp_path)
        kept._fill("key", draft, shape, torch.float32, config, method, source, torch.device("cpu"), rank, 2)
        assert sorted(flushed) == sorted(str(draft / name) for name in (kept.VALUES, kept.WRITTEN))
        flushed.clear()
    assert (draft / kept.WRITTEN).read_bytes() == b"\1" * 2 * IMAGES
    assert len(rows) == 2 * 2 * IMAGES


def test_what_is_read_is_what_was_computed(alone, tmp_path, photos):
    recall, source = recall_of(photos, tmp_path)
    values = np.fromfile(tmp_path / "targets" / kept.VALUES, np.float32).reshape(2 * len(source), 64, 32)
    _, method, _ = random_teacher(photos, tmp_path)
    for batch in take(source, 4, crops_per_image=2, seed=0, flip=False, scale=(0.3, 1.0), beside=lambda _, keys: keys):
        found = torch.from_numpy(values[batch.draw])
        torch.testing.assert_close(found, method.keep(batch.images), rtol=1e-4, atol=1e-5)
    draw = method.draw(3, 0, 0)
    places = draw.union_places.long()
    images = torch.tensor([5, 0, 41])[torch.arange(3).repeat_interleave(draw.union_lengths)]
    assert torch.equal(recall(5, 0, 41), torch.from_numpy(values)[images, places])


def test_a_finished_cache_may_lie_on_a_disk_that_is_read_only(alone, tmp_path, photos, monkeypatch):
    recall_of(photos, tmp_path)

    def read_only(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(kept, "publish", read_only)
    recall, _ = recall_of(photos, tmp_path)
    assert recall(0, 1).any()
    shutil.rmtree(tmp_path / "targets")
    with pytest.raises(ConfigError, match=r"teacher_cache: .*targets: Read-only file system; name a folder"):
        recall_of(photos, tmp_path)


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "fsync"])
def test_a_disk_that_fills_is_one_sentence_and_leaves_nothing(alone, tmp_path, photos, monkeypatch, call):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(kept.os, call, full)
    with pytest.raises(ConfigError) as error:
        recall_of(photos, tmp_path)
    assert "objective.options.teacher_cache: " in str(error.value)
    assert "No space left on device; name a folder that can be written and has room" in str(error.value)
    assert [path.name for path in tmp_path.iterdir() if "targets" in path.name] == []


def test_room_is_reserved_where_the_file_system_can(tmp_path, monkeypatch):
    kept._reserve(tmp_path / "a", 100_000)
    assert (tmp_path / "a").stat().st_blocks * 512 >= 100_000

    def unable(*_):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(kept.os, "posix_fallocate", unable)
    kept._reserve(tmp_path / "b", 100_000)
    assert (tmp_path / "b").stat().st_size == 100_000


@pytest.mark.parametrize("folder", ["{}/file/targets", "{}/file/a/targets", "/proc/targets", "/proc/a/targets"])
def test_a_folder_that_cannot_be_is_one_sentence(tmp_path, folder):
    (tmp_path / "file").write_text("")
    words = refused(kept.Path(folder.format(tmp_path)), {})
    assert words.startswith(f"key: {folder.format(tmp_path)}: ")
    assert "name a folder that can be written and has room, or set it to null" in words


# What the images are


def arrays(folder, name, noise=0):
    """Twenty images in one file."""
    pixels = np.random.default_rng(0).integers(0, 200, (20, 40, 40, 3), np.uint8)
    folder.mkdir(exist_ok=True)
    np.save(folder / name, pixels + np.uint8(noise))
    return folder / name


def data_sets(folder, monkeypatch):
    (folder / "sets_of_this_test.py").write_text(
        "import numpy as np\n"
        "def of(number):\n"
        "    return [np.full((3, 40, 40), number + i, np.uint8) for i in range(20)]\n"
        "def a():\n    return of(1)\n"
        "def b():\n    return of(2)\n"
        "class Moving:\n"
        "    def __len__(self):\n        return 20\n"
        "    def __getitem__(self, number):\n"
        "        return np.random.randint(0, 255, (3, 40, 40)).astype(np.uint8)\n"
    )
    monkeypatch.chdir(folder)
    monkeypatch.delitem(sys.modules, "sets_of_this_test", raising=False)


def noisy(folder, copy):
    """A folder's images under the same names, a little lighter."""
    for path in sorted(folder.rglob("*.*")):
        target = copy / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(path) as image:
            target.write_bytes(encode(image.convert("RGB").point(lambda value: min(value + 9, 255)), "PNG"))
    return copy


def test_images_of_the_same_names_and_other_contents_are_others(tmp_path, photos, monkeypatch):
    """Arrays as long, data sets of as many items, copies with noise."""
    data_sets(tmp_path, monkeypatch)
    pairs = [
        (arrays(tmp_path / "one", "x.npy"), arrays(tmp_path / "other", "x.npy", 1)),
        ("sets_of_this_test:a", "sets_of_this_test:b"),
        (noisy(photos, tmp_path / "photos"), noisy(tmp_path / "photos", tmp_path / "noisy")),
    ]
    for first, other in pairs:
        one, two = open_source(first), open_source(other)
        assert identity(one) == identity(two)
        assert contents(one) != contents(two)
        assert contents(one) == contents(open_source(first))
    shutil.copytree(tmp_path / "photos", tmp_path / "moved")
    assert contents(open_source(tmp_path / "moved")) == contents(open_source(tmp_path / "photos"))


def test_images_that_changed_in_their_place_are_told(tmp_path):
    folder, path = tmp_path / "targets", arrays(tmp_path / "x", "x.npy")
    with ExitStack() as stack:
        own = made_of(path)
        assert not kept._begin("key", stack, folder, own, (4, 2), torch.float32)
        kept._end("key", kept.draft_of(folder), own, 0.0)
    arrays(tmp_path / "x", "x.npy", 3)
    words = f"(20 of {path}) than this run's (20 of {path}, whose names or contents have changed); name another folder"
    assert words in refused(folder, made_of(path))


def test_items_that_are_others_whenever_they_are_read_are_refused(tmp_path, monkeypatch):
    data_sets(tmp_path, monkeypatch)
    with pytest.raises(ConfigError, match="have other pixels whenever they are read"):
        made_of("sets_of_this_test:Moving")


def test_contents_are_read_at_once_and_past_bad_files(tmp_path):
    write_photos(tmp_path, 90, size=40)
    for name, content in bad_kinds().items():
        (tmp_path / "class0" / name).write_bytes(content)
    (tmp_path / "class0" / "folder.jpg").mkdir()
    os.mkfifo(tmp_path / "class0" / "fifo.jpg")
    source = open_source(tmp_path)
    began = time.perf_counter()
    found = contents(source)
    assert time.perf_counter() - began < 1
    assert contents(source) == found


# What is refused


def made_of(photos, *changes, given=7):
    """What the values follow from, of a run with `changes`, whose teacher has the number `given`."""
    options = options_of(photos, "somewhere", "here")
    config = load_config("quickstart", [*TINY, *options, *changes])
    method = build_method(config)
    method.given = given
    return kept._made_of("key", config, method, open_source(photos))


def refused(folder, values):
    with pytest.raises(ConfigError) as error, ExitStack() as stack:
        kept._begin("key", stack, folder, values, (4, 2), torch.float32)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_cache_of_something_else_is_one_sentence(tmp_path, photos, tmp_path_factory):
    folder, own = tmp_path / "targets", made_of(photos)
    with ExitStack() as stack:
        assert not kept._begin("key", stack, folder, own, (4, 2), torch.float32)
        kept._end("key", kept.draft_of(folder), own, 0.0)
    with ExitStack() as stack:
        assert kept._begin("key", stack, folder, own, (4, 2), torch.float32)
    others = tmp_path_factory.mktemp("others")
    write_photos(others, 9, size=40)
    layers = "objective.options.target_layers=1"
    for there, words in (
        (made_of(others), f"made of other images (21 of {photos}) than this run's (9 of {others}); name another"),
        (made_of(photos, given=8), "another teacher's weights, 7, and this run has 8"),
        (made_of(photos, layers), "another objective.options.target_layers, 2, and this run has 1"),
        (made_of(photos, "data.mean=[0.5,0.5,0.5]"), "another data.mean"),
        (made_of(photos, "data.scale=[0.5,1]"), "another data.scale"),
        (made_of(photos, "data.crops_per_image=3"), "another data.crops_per_image, 2, and this run has 3"),
        (made_of(photos, "engine.precision=bf16"), "another engine.precision, fp32, and this run has bf16"),
    ):
        assert words in refused(folder, there)
    assert made_of(photos, "objective.options.target_norm=token", "name=another") == own


def test_a_folder_of_something_else_is_left_alone(tmp_path, monkeypatch):
    (tmp_path / "photos").mkdir()
    assert "exists and holds no kept targets" in refused(tmp_path / "photos", {})
    for text in ("[]", "3", "{}", '{"the images": 3}', "{", ""):
        (tmp_path / "photos" / kept.MADE_OF).write_text(text)
        assert "exists and holds no kept targets" in refused(tmp_path / "photos", {})
    assert (tmp_path / "photos").is_dir()
    monkeypatch.setattr(kept.shutil, "disk_usage", lambda _: SimpleNamespace(free=31))
    assert "would take 0.0 GB, of 4 crops, and has room for 0.0" in refused(tmp_path / "new", {})
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["teacher: frozen, teacher_from: a, teacher_cache: b"], "teacher_cache=b: with data.crops_per_image=0"),
        (["teacher_cache: b", "data.crops_per_image=1"], "teacher_cache=b: the average moves; set teacher=frozen"),
        (["teacher: random, teacher_cache: ''", "data.crops_per_image=1"], "teacher_cache=: expected a folder for the"),
        (["teacher: random, teacher_cache: /", "data.crops_per_image=1"], "teacher_cache=/: expected a folder for the"),
        (["teacher: random, teacher_cache: .", "data.crops_per_image=1"], "teacher_cache=.: expected a folder for the"),
        (["teacher: random, teacher_cache: a/..", "data.crops_per_image=1"], "teacher_cache=a/..: expected a folder"),
    ],
)
def test_options_that_exclude_it(overrides, words):
    options, *more = overrides
    with pytest.raises(ConfigError) as error:
        build_method(load_config("quickstart", [f"objective.options={{{options}}}", *more]))
    assert words in str(error.value)


def test_fp8_is_refused(photos):
    method = build_method(load_config("quickstart", [*TINY, *options_of(photos, "somewhere", "here")]))
    with pytest.raises(ConfigError, match=r"engine.target_precision=fp8: cached targets are made in engine.precision"):
        method.use_fp8()
