"""The training loader: order, resuming, ranks, pixels, and life with broken files."""

import io
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

pytest.importorskip("PIL")
pytest.importorskip("nvidia.dali")

from PIL import Image, ImageOps

from ijepa_fast.data.central import eval_batches
from ijepa_fast.data.crops import TRIES, counter_uniform, random_resized_crop
from ijepa_fast.data.dali import TrainLoader
from ijepa_fast.data.decode import Decoder, Work, decode_all
from ijepa_fast.data.headers import screen
from ijepa_fast.data.recover import TooManyBadFiles
from ijepa_fast.data.sources import open_source
from tests.data_images import bad_kinds, good_kinds, write_photos

COUNT = 40


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    write_photos(folder, COUNT)
    return open_source(folder)


def take(source, steps, **options):
    loader = TrainLoader(source, **({"batch_size": 8, "crop": 32, "seed": 3} | options))
    try:
        return [next(loader) for _ in range(steps)]
    finally:
        loader.close()


@pytest.mark.parametrize("crop", [32, 80], ids=["resized by DALI", "resized by resize.py"])
def test_batches_have_the_promised_form(photos, crop):
    batch = take(photos, 1, crop=crop)[0]
    assert batch.images.shape == (8, crop, crop, 3)
    assert batch.images.dtype == torch.uint8
    assert batch.indices.dtype == torch.int64
    assert batch.epoch == 0


@pytest.mark.parametrize("flip", [False, True], ids=["as they are", "flipped"])
def test_a_resumed_loader_goes_on_exactly(photos, flip):
    whole = take(photos, 9, flip=flip)
    resumed = take(photos, 5, flip=flip, start_step=4)
    for a, b in zip(whole[4:], resumed):
        assert torch.equal(a.indices, b.indices)
        assert torch.equal(a.images, b.images)
        assert a.epoch == b.epoch


def test_two_ranks_cover_every_epoch_once_and_equal_one_rank(photos):
    one = take(photos, 10, batch_size=8)
    two = [take(photos, 10, batch_size=4, rank=rank, world_size=2) for rank in range(2)]
    for epoch in range(2):
        seen = torch.cat([b.indices for ranks in two for b in ranks[epoch * 5 : epoch * 5 + 5]])
        assert sorted(seen.tolist()) == list(range(COUNT))
    for step in range(10):
        assert torch.equal(one[step].images, torch.cat([ranks[step].images for ranks in two]))


def test_a_batch_may_span_two_epochs(photos):
    batches = take(photos, 5, batch_size=16)
    stream = torch.cat([b.indices for b in batches])
    assert sorted(stream[:COUNT].tolist()) == sorted(stream[COUNT:].tolist()) == list(range(COUNT))
    assert [b.epoch for b in batches] == [0, 0, 0, 1, 1]


def test_seeds_give_other_orders_and_windows(photos):
    a, b = take(photos, 1, seed=1)[0], take(photos, 1, seed=2)[0]
    assert not torch.equal(a.indices, b.indices)


def test_extra_is_made_for_the_step_of_the_batch(photos):
    batches = take(photos, 3, start_step=7, draw=lambda step: step * 10)
    assert [b.draw for b in batches] == [70, 80, 90]


def test_extras_of_later_steps_are_made_while_this_one_is_worked_on(photos):
    made = []
    loader = TrainLoader(photos, batch_size=8, crop=32, draw=made.append)
    next(loader)
    deadline = time.monotonic() + 30
    while len(made) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    loader.close()
    assert sorted(made)[:4] == [0, 1, 2, 3]


def test_an_error_in_extra_reaches_the_caller(photos):
    with pytest.raises(ZeroDivisionError):
        take(photos, 3, draw=lambda step: 1 // (step - 1))


def test_arguments_that_cannot_work_are_named(photos):
    with pytest.raises(ValueError, match=r"batch_size: 64 .* lower batch_size"):
        TrainLoader(photos, batch_size=64, crop=32)
    with pytest.raises(ValueError, match="interpolation: expected"):
        TrainLoader(photos, batch_size=8, crop=32, interpolation="nearest")
    with pytest.raises(ValueError, match="scale, ratio"):
        TrainLoader(photos, batch_size=8, crop=32, scale=(0.5, 2.0))
    with pytest.raises(ValueError, match="crop: expected"):
        next(eval_batches(photos, batch_size=8, crop=64, resize=32))


def test_closing_ends_the_thread_and_next_says_so(photos):
    loader = TrainLoader(photos, batch_size=8, crop=32)
    next(loader)
    loader.close()
    loader.close()
    with pytest.raises(RuntimeError, match="closed"):
        next(loader)


def native_threads() -> int:
    """How many threads this process has, Python's and others."""
    return len(os.listdir("/proc/self/task"))


def test_nothing_is_left_running(photos):
    take(photos, 1, crop=80)  # what is started once and for all
    before = native_threads()
    for crop in (32, 80):
        take(photos, 2, crop=crop)
        batches = eval_batches(photos, batch_size=8, crop=crop, resize=crop)
        next(batches)
        batches.close()
    deadline = time.monotonic() + 10
    while native_threads() > before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert native_threads() <= before


@pytest.mark.multi_rank
@pytest.mark.parametrize(
    "ending",
    ["pass", "raise KeyboardInterrupt", "import os, signal; os.kill(os.getpid(), 2)"],
    ids=["end", "exception", "Ctrl-C"],
)
def test_a_process_ends_with_a_loader_still_open(photos, ending):
    program = (
        # A shell's background job ignores Ctrl-C, and so would the program.
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from ijepa_fast.data.sources import open_source\n"
        "from ijepa_fast.data.dali import TrainLoader\n"
        f"loader = TrainLoader(open_source({photos.root!r}), batch_size=8, crop=32)\n"
        f"next(loader)\n{ending}\n"
    )
    begin = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program], timeout=60, capture_output=True)
    assert (done.returncode == 0) == (ending == "pass")
    assert time.monotonic() - begin < 40


def test_without_dali_the_error_names_the_package(photos, monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(ImportError, match="pip install nvidia-dali-cuda130"):
        TrainLoader(photos, batch_size=8, crop=32)


def decode(files: list[bytes], windows: np.ndarray, crop: int, interpolation: str, device: str) -> np.ndarray:
    decoder = Decoder(crop=crop, interpolation=interpolation, flip=False, device=device, threads=2)
    encoded = [np.frombuffer(data, np.uint8) for data in files]
    work = Work(np.arange(len(files)), np.arange(len(files)), encoded, windows.astype(np.int32))
    ((_, images),) = decode_all(decoder, [work], lambda work, reasons: pytest.fail(f"bad: {reasons}"), len(files))
    decoder.close()
    return images.cpu().numpy()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda:0", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("crop", [48, 224])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_crops_agree_with_pillow_on_every_kind_of_file(crop, interpolation, device):
    kinds = good_kinds()
    sizes = np.array([screen(data) for data in kinds.values()])
    uniform = counter_uniform(5, np.arange(len(sizes)), 2 * TRIES + 2)
    windows = random_resized_crop(sizes, uniform, (0.3, 1.0), (3 / 4, 4 / 3))
    images = decode(list(kinds.values()), windows, crop, interpolation, device)
    filter_type = {"bilinear": Image.BILINEAR, "bicubic": Image.BICUBIC}[interpolation]
    for name, data, size, (x, y, w, h), image in zip(kinds, kinds.values(), sizes, windows, images):
        pillow = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
        assert (pillow.height, pillow.width) == tuple(size), name
        expected = np.asarray(pillow.crop((x, y, x + w, y + h)).resize((crop, crop), filter_type)).astype(int)
        assert np.abs(image - expected).mean() < 1.0, name


@pytest.mark.gpu
@pytest.mark.parametrize("hw_decoder_load", [0.0, 1.0])
def test_batches_dropped_before_the_gpu_has_read_them_stay_whole(photos, hw_decoder_load):
    options = {"batch_size": 8, "crop": 224, "seed": 3, "device": "cuda:0", "hw_decoder_load": hw_decoder_load}
    expected = [batch.images.clone() for batch in take(photos, 12, **options)]
    loader, found = TrainLoader(photos, **options), []
    for _ in range(12):
        batch = next(loader)
        torch.cuda._sleep(200_000_000)  # about a tenth of a second, in which later batches are decoded
        found.append(batch.images.clone())
        del batch
    loader.close()
    assert all(torch.equal(a, b) for a, b in zip(expected, found))


def test_evaluation_takes_the_central_square_of_every_sample_once_in_order(photos):
    batches = list(eval_batches(photos, batch_size=16, crop=64, resize=80))
    assert [len(images) for images, _ in batches] == [16, 16, 8]
    assert torch.equal(torch.cat([labels for _, labels in batches]), torch.from_numpy(photos.labels))
    image = Image.open(photos.name(17))
    scale = 80 / min(image.size)
    resized = image.resize((round(image.width * scale), round(image.height * scale)), Image.BILINEAR)
    left, top = (resized.width - 64) // 2, (resized.height - 64) // 2
    expected = np.asarray(resized.crop((left, top, left + 64, top + 64))).astype(int)
    assert np.abs(batches[1][0][1].numpy() - expected).mean() < 6  # half a pixel apart at most


@pytest.fixture
def with_bad(tmp_path):
    """300 files, one of each broken kind among them."""
    write_photos(tmp_path / "images", 300 - len(bad_kinds()), size=48)
    for name, data in bad_kinds().items():
        (tmp_path / "images" / "class0" / name).write_bytes(data)
    return open_source(tmp_path / "images"), tmp_path / "run" / "bad_files.txt"


def test_broken_files_are_replaced_named_once_and_batches_stay_full(with_bad):
    source, record = with_bad
    bad = {i for i in range(len(source)) if source.name(i).rsplit("/", 1)[1] in bad_kinds()}
    loader = TrainLoader(source, batch_size=20, crop=32, bad_files=record, max_bad_share=0.05)
    batches = [next(loader) for _ in range(31)]
    loader.close()
    assert all(len(b.images) == len(b.indices) == 20 for b in batches)
    assert not bad & set(torch.cat([b.indices for b in batches]).tolist())
    epoch = torch.cat([b.indices for b in batches[:15]]).tolist()
    assert set(range(len(source))) - bad <= set(epoch)
    assert loader.replaced >= 2 * len(bad_kinds())
    lines = record.read_text().splitlines()
    assert sorted(line.split("\t")[0] for line in lines) == sorted(source.name(i) for i in bad)
    assert all(len(line.split("\t")[1]) > 5 for line in lines)


def test_resuming_with_the_record_gives_the_same_sequence(with_bad):
    source, record = with_bad
    options = {"batch_size": 20, "crop": 32, "max_bad_share": 0.05}
    whole = take(source, 12, **options)
    take(source, 5, **options, bad_files=record)
    resumed = take(source, 7, **options, bad_files=record, start_step=5)
    for a, b in zip(whole[5:], resumed):
        assert torch.equal(a.indices, b.indices)
        assert torch.equal(a.images, b.images)


def test_two_ranks_share_one_record(with_bad):
    source, record = with_bad
    options = {"batch_size": 10, "crop": 32, "max_bad_share": 0.05, "world_size": 2, "bad_files": record}
    loaders = [TrainLoader(source, rank=rank, **options) for rank in range(2)]
    for _ in range(15):
        for loader in loaders:
            next(loader)
    for loader in loaders:
        loader.close()
    names = [line.split("\t")[0] for line in record.read_text().splitlines()]
    assert len(names) == len(set(names)) == len(bad_kinds())


def test_half_a_percent_of_broken_files_is_survived_and_more_than_allowed_is_not(tmp_path):
    write_photos(tmp_path, 398, size=40)
    for name in ("empty.jpg", "broken_inside.png"):
        (tmp_path / "class0" / name).write_bytes(bad_kinds()[name])
    source = open_source(tmp_path)
    loader = TrainLoader(source, batch_size=40, crop=32)  # the default share, 1 %
    for _ in range(10):
        assert len(next(loader).images) == 40
    loader.close()
    assert len(loader.bad_files) == 2
    with pytest.raises(TooManyBadFiles, match=r"2 of 400 .* max_bad_share = 0.004; .* check-data"):
        take(source, 10, batch_size=40, max_bad_share=0.004)


def test_evaluation_leaves_broken_files_out(with_bad):
    source, record = with_bad
    batches = list(eval_batches(source, batch_size=64, crop=32, resize=32, bad_files=record, max_bad_share=0.05))
    assert sum(len(images) for images, _ in batches) == 300 - len(bad_kinds())
    assert len(record.read_text().splitlines()) == len(bad_kinds())


def test_small_files_are_read_once_into_memory(photos, monkeypatch):
    reads = []
    read = photos.read
    monkeypatch.setattr(photos, "read", lambda index: reads.append(index) or read(index))
    take(photos, 15)
    assert len(reads) == COUNT
    take(photos, 15, cache_bytes=0)
    assert len(reads) > 2 * COUNT
