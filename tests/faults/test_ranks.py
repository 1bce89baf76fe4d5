"""Ranks that are killed, that stop, or that meet an error alone."""

import re
import signal
import time

import pytest
import torch

pytest.importorskip("deepspeed")
pytest.importorskip("nvidia.dali")

from ijepa_fast.config import load_config
from ijepa_fast.eval.evaluate import evaluate
from ijepa_fast.eval.figures import figures_of
from ijepa_fast.interop.load import load
from ijepa_fast.report.summary import read_summary
from ijepa_fast.run.sources import evaluation, probe_folders
from tests.faults.run import LONG, logged, saved, wait_for
from tests.launch import finish, losses, run, start

END = ("optim.steps=60", "optim.epochs=9", "log.checkpoint_every=5")


def whole(folder):
    return (folder / "checkpoints" / "step-00000060" / "weights.safetensors").read_bytes()


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """Runs on one and on two ranks that nobody ended."""
    return {ranks: run(tmp_path_factory.mktemp("unbroken"), *END, ranks=ranks) for ranks in (1, 2)}


@pytest.mark.slow
@pytest.mark.multi_rank
@pytest.mark.parametrize("moment", range(12))
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_kill_at_any_moment(unbroken, tmp_path, ranks, moment):
    folder = tmp_path / "quickstart"
    processes = start(tmp_path, *END, ranks=ranks)
    wait_for(lambda: logged(folder) >= 1 or processes[0].poll() is not None)
    time.sleep(0.07 * moment)
    for process in processes:
        process.send_signal(signal.SIGKILL)
    finish(processes)
    assert run(tmp_path, *END, ranks=ranks) == folder
    assert losses(folder) == losses(unbroken[ranks])
    assert whole(folder) == whole(unbroken[ranks])


KILL = """
import os, shutil, signal

calls = []

def counted(function):
    def call(*args):
        calls.append(None)
        if len(calls) == {moment}:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args)
    return call

os.fsync, os.replace, os.rename, shutil.rmtree = map(counted, (os.fsync, os.replace, os.rename, shutil.rmtree))
"""


@pytest.mark.slow
@pytest.mark.parametrize("moment", range(1, 25, 2))
def test_a_kill_at_any_moment_of_a_write(unbroken, tmp_path, moment):
    """At the flushes, renames and removals of the first checkpoints, of which one is kept."""
    options = (*END, "log.keep=1")
    statuses, _ = finish(start(tmp_path, *options, first=KILL.format(moment=moment)))
    assert statuses == [-signal.SIGKILL]
    folder = run(tmp_path, *options)
    assert losses(folder) == losses(unbroken[1])
    assert whole(folder) == whole(unbroken[1])
    assert [path.name for path in (folder / "checkpoints").iterdir() if path.name != ".lock"] == ["step-00000060"]


@pytest.mark.multi_rank
@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_rank_that_stops_ends_the_run_after_the_timeout_and_is_named(tmp_path, rank):
    processes = start(tmp_path, *LONG, "engine.timeout=8", ranks=2)
    wait_for(lambda: logged(tmp_path / "quickstart") >= 2)
    processes[rank].send_signal(signal.SIGSTOP)
    began = time.time()
    statuses, errors = finish([processes[1 - rank]], timeout=90)
    processes[rank].kill()
    processes[rank].communicate()
    assert time.time() - began > 6
    assert statuses == [1]
    assert f"rank {1 - rank} lost another rank, which ended or was silent for engine.timeout seconds" in errors
    if rank == 0:
        assert "rank 0, which knows of all ranks, does not answer" in errors
    else:
        (ago,) = re.findall(r"last heard of: rank 1 (\d+) s ago, [a-z ]+ after step \d+; rank 0 [0-4] s ago", errors)
        assert int(ago) >= 5
    assert "Traceback" not in errors


ALONE = """
import os
from ijepa_fast.engine.engine import Engine

step, calls = Engine.step, []

def fails(self, *rates, **more):
    calls.append(None)
    if os.environ["RANK"] == "1" and len(calls) == 3:
        raise ValueError("something that this rank alone has met")
    return step(self, *rates, **more)

Engine.step = fails
"""


@pytest.mark.multi_rank
def test_an_error_that_one_rank_meets_is_said_with_its_number(tmp_path):
    statuses, errors = finish(start(tmp_path, *LONG, ranks=2, first=ALONE))
    assert statuses == [1, 1]
    assert "error: rank 1: something that this rank alone has met" in errors
    assert "error: rank 0 lost another rank" in errors
    assert "Traceback" not in errors


SLOW_WRITER = """
import os, resource
if os.environ["RANK"] == "1":
    from ijepa_fast.run import checkpoint
    write = checkpoint._write_fragments

    def fails(draft, taken):
        if taken.step == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        return write(draft, taken)

    checkpoint._write_fragments = fails
"""


@pytest.mark.multi_rank
def test_a_checkpoint_that_one_rank_cannot_write_ends_the_run_on_all(tmp_path):
    """In the writer's thread, while the steps go on: said once, with the rank."""
    statuses, errors = finish(start(tmp_path, *LONG, "log.checkpoint_every=2", ranks=2, first=SLOW_WRITER))
    assert statuses == [1, 1]
    (error,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert "step-00000004 cannot be written by rank 1: File too large" in error
    assert saved(tmp_path / "quickstart") == [2]
    assert not list((tmp_path / "quickstart" / "checkpoints").glob(".step-*"))
    assert "Traceback" not in errors


def test_a_rank_that_does_not_start_is_said(tmp_path):
    code = "from ijepa_fast.engine import engine; engine.RENDEZVOUS = 4"
    processes = start(tmp_path, *LONG, "engine.timeout=4", ranks=2, first=code)
    processes[1].kill()
    processes[1].communicate()
    statuses, errors = finish(processes[:1], timeout=120)
    assert statuses == [1]
    assert "error: waited in vain for all 2 ranks to start: rank 1 has not come (rank 0 of " in errors
    assert "Traceback" not in errors


SLOW_END = """
import time
from ijepa_fast import train
from ijepa_fast.run import machines

finish = train.finish

def late(*given):
    time.sleep(14)
    return finish(*given)

train.finish = late
"""


@pytest.mark.multi_rank
def test_the_end_on_rank_0_may_take_longer_than_a_step(tmp_path):
    """And at ZeRO 3, where a network is in parts on both ranks, it evaluates the whole one."""
    probed = ("data.source=scenes", "probe.enabled=true", "probe.test=null", "probe.images=40", "model.dim=192")
    options = (*probed, "model.heads=3", "optim.steps=2", "engine.zero=3", "engine.timeout=8", "mask.min_keep=null")
    statuses, errors = finish(start(tmp_path, *options, ranks=2, config="mae_cifar10", first=SLOW_END))
    assert statuses == [0, 0], errors
    folder = tmp_path / "mae_cifar10"
    found = {figure.key: figure.value for figure in figures_of(read_summary(folder))}
    config = load_config(folder / "config.yaml")
    again = evaluate(load(folder), *evaluation(config, probe_folders(config), torch.device("cpu")))
    assert {figure.key: figure.value for figure in again} == found
    assert len(found) > 2


FAILS_AT_THE_END = """
from ijepa_fast import train

def fails(*given):
    raise OSError(28, "No space left on device", "summary.json")

train.finish = fails
"""


@pytest.mark.multi_rank
def test_an_error_at_the_end_is_said_once(tmp_path):
    statuses, errors = finish(start(tmp_path, "optim.steps=1", ranks=2, first=FAILS_AT_THE_END))
    assert statuses == [1, 1]
    assert errors.count("No space left on device") == 1
    assert "lost" not in errors
