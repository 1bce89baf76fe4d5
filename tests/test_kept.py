"""A frozen teacher's targets, computed once: the crops they are of, the trajectory, a resume, what is refused."""

import json
from contextlib import ExitStack
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("deepspeed")
pytest.importorskip("nvidia.dali")
pytest.importorskip("PIL")

from ijepa_fast.config import ConfigError, load_config
from ijepa_fast.data.crops import crop_keys
from ijepa_fast.data.dali import TrainLoader
from ijepa_fast.data.sources import open_source
from ijepa_fast.run import kept
from ijepa_fast.run.build import build_method
from tests.data_images import bad_kinds, write_photos
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


# What is refused


def made_of(photos, *changes, given=7):
    """What the values follow from, of a run with `changes`, whose teacher has the number `given`."""
    options = options_of(photos, "somewhere", "here")
    config = load_config("quickstart", [*TINY, *options, *changes])
    method = build_method(config)
    method.given = given
    return json.loads(json.dumps(kept._made_of(config, method, open_source(photos)), default=str))


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
        (made_of(others), "another the images"),
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
    assert (tmp_path / "photos").is_dir()
    monkeypatch.setattr(kept.shutil, "disk_usage", lambda _: SimpleNamespace(free=31))
    assert "would take 0.0 GB, of 4 crops, and has room for 0.0" in refused(tmp_path / "new", {})
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["teacher: frozen, teacher_from: a, teacher_cache: b"], "teacher_cache=b: with data.crops_per_image=0"),
        (["teacher_cache: b", "data.crops_per_image=1"], "teacher_cache=b: the average moves; set teacher=frozen"),
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
