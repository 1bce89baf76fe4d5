"""What happens to data over whole runs: broken files among the good, and a process that is killed in mid-epoch."""

import hashlib
import json
import signal
import subprocess
import sys

import pytest

pytest.importorskip("deepspeed")
pytest.importorskip("nvidia.dali")
pytest.importorskip("PIL")

from ijepa_fast.data.dali import TrainLoader
from ijepa_fast.data.sources import open_source
from tests.data_images import bad_kinds, write_photos
from tests.launch import ROOT, finish, losses, run, start


def broken_folder(folder, good: int, bad: int):
    """`good` photographs and `bad` broken files."""
    write_photos(folder, good, size=40)
    for number in range(bad):
        name, data = list(bad_kinds().items())[number % len(bad_kinds())]
        (folder / "class0" / f"{number}{name}").write_bytes(data)
    return folder


@pytest.mark.multi_rank
@pytest.mark.slow
def test_half_a_percent_of_broken_files_ends_with_the_right_counts(tmp_path):
    images = broken_folder(tmp_path / "images", 398, 2)
    options = (f"data.source={images}", "batch_size=40", "optim.epochs=1")
    folder = run(tmp_path / "runs", *options, ranks=2)
    assert len(losses(folder)) == 10  # all the steps of an epoch of 400
    lines = (folder / "bad_files.txt").read_text().splitlines()
    assert sorted(line.split("\t")[0] for line in lines) == sorted(str(p) for p in images.glob("class0/?[a-z]*.*"))
    assert json.loads((folder / "summary.json").read_text())["bad_files"] == 2
    assert list((tmp_path / "runs" / "index").glob("*images*/meta.json"))


@pytest.mark.multi_rank
def test_too_many_broken_files_end_a_run_with_one_sentence(tmp_path):
    images = broken_folder(tmp_path / "images", 190, 10)
    processes = start(tmp_path / "runs", f"data.source={images}", "batch_size=20", "optim.epochs=2")
    (status,), errors = finish(processes)
    assert status == 1
    assert "of 200 files cannot be decoded, more than max_bad_share = 0.01; they are listed in" in errors
    assert "Traceback" not in errors
    assert len((tmp_path / "runs" / "quickstart" / "bad_files.txt").read_text().splitlines()) >= 3


KILLED = """
import hashlib, sys
from ijepa_fast.data.dali import TrainLoader
from ijepa_fast.data.sources import open_source
loader = TrainLoader(open_source(sys.argv[1]), batch_size=8, crop=32, seed=3, bad_files=sys.argv[2], max_bad_share=0.1)
for batch in loader:
    print(batch.indices.tolist(), hashlib.sha256(batch.images.numpy()).hexdigest(), flush=True)
"""


@pytest.mark.multi_rank
def test_a_loader_killed_in_mid_epoch_goes_on_with_the_same_samples_and_pixels(tmp_path):
    images, record = broken_folder(tmp_path / "images", 60, 4), tmp_path / "bad_files.txt"

    def take(steps: int, **options) -> list[str]:
        loader = TrainLoader(open_source(images), batch_size=8, crop=32, seed=3, max_bad_share=0.1, **options)
        batches = [next(loader) for _ in range(steps)]
        loader.close()
        digests = [hashlib.sha256(batch.images.numpy()).hexdigest() for batch in batches]
        return [f"{batch.indices.tolist()} {digest}" for batch, digest in zip(batches, digests)]

    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, images, record], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    before = [process.stdout.readline().strip() for _ in range(3)]
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    unbroken = take(16)
    assert before == unbroken[:3]
    assert take(13, bad_files=record, start_step=3) == unbroken[3:]
