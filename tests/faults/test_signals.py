"""A signal loses no step: all ranks save after the same one, the exit status says which, and nothing lives on."""

import os
import signal
import time
from itertools import chain

import pytest

from tests.faults.run import LONG, launch, logged, saved, tree, wait_for
from tests.launch import finish, losses, run, start

pytest.importorskip("deepspeed")
pytest.importorskip("nvidia.dali")


@pytest.mark.parametrize(
    "name", ["SIGTERM", "SIGUSR1", "SIGINT", "SIGHUP", pytest.param("SIGUSR2", marks=pytest.mark.slow)]
)
def test_one_rank_without_a_launcher(tmp_path, name):
    folder, number = tmp_path / "quickstart", getattr(signal, name)
    processes = start(tmp_path, *LONG)
    wait_for(lambda: logged(folder) >= 2)
    processes[0].send_signal(number)
    statuses, errors = finish(processes, timeout=60)
    (step,) = saved(folder)
    assert statuses == [128 + number]
    assert errors.strip().splitlines()[-1] == f"stopped by {name} after step {step}, saved; the same command continues"
    assert logged(folder) == step
    assert "Traceback" not in errors


@pytest.mark.multi_rank
def test_a_signal_to_one_rank_saves_on_all_and_loses_nothing(tmp_path):
    folder = tmp_path / "quickstart"
    processes = start(tmp_path, *LONG, ranks=2)
    wait_for(lambda: logged(folder) >= 2)
    processes[1].send_signal(signal.SIGTERM)
    statuses, errors = finish(processes, timeout=60)
    assert statuses == [143, 143]
    assert errors.count("stopped by SIGTERM") == 1
    assert "Traceback" not in errors
    (step,) = saved(folder)
    end = (f"optim.steps={step + 2}", "optim.epochs=1000")
    unbroken = run(tmp_path, *end, "name=unbroken", ranks=2)
    assert losses(run(tmp_path, *end, ranks=2)) == losses(unbroken)


def test_a_second_signal_stops_at_once(tmp_path):
    """The main thread is in a step that takes for ever: the first signal waits for its end, the second does not."""
    (process,) = start(tmp_path, *LONG, "batch_size=4096", "model.depth=12", "log.every=1000")
    log = tmp_path / "quickstart" / "log.jsonl"
    wait_for(log.exists)
    time.sleep(3)
    process.send_signal(signal.SIGTERM)
    time.sleep(2.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    statuses, errors = finish([process], timeout=5)
    assert statuses == [143]
    assert "stopped at once: a second signal, SIGTERM" in errors
    assert not saved(tmp_path / "quickstart")


def test_checkpoints_by_the_clock(tmp_path):
    folder = tmp_path / "quickstart"
    processes = start(tmp_path, *LONG, "log.checkpoint_minutes=0.01", "log.keep_every=1", "log.keep=1")
    wait_for(lambda: len(saved(folder)) >= 3)
    processes[0].send_signal(signal.SIGTERM)
    assert finish(processes, timeout=60)[0] == [143]


@pytest.mark.multi_rank
@pytest.mark.parametrize(
    ("whom", "name"),
    [
        ("deepspeed", "SIGTERM"),
        ("deepspeed", "SIGKILL"),
        pytest.param("deepspeed", "SIGINT", marks=pytest.mark.slow),
        pytest.param("deepspeed", "SIGUSR1", marks=pytest.mark.slow),
        ("launch.py", "SIGKILL"),
        pytest.param("launch.py", "SIGTERM", marks=pytest.mark.slow),
        pytest.param("ranks", "SIGUSR1", marks=pytest.mark.slow),
        ("all", "SIGINT"),
        pytest.param("all", "SIGTERM", marks=pytest.mark.slow),
    ],
)
def test_a_signal_to_part_of_a_launch_saves_and_leaves_no_process(tmp_path, whom, name):
    folder = tmp_path / "quickstart"
    launcher = launch(tmp_path, *LONG, ranks=2)
    try:
        wait_for(lambda: logged(folder) >= 2)
        processes = tree(launcher.pid)
        assert [len(group) for group in processes.values()] == [1, 1, 2]
        chosen = [*chain(*processes.values())] if whom == "all" else processes[whom][:1]
        for process in chosen:
            os.kill(process, getattr(signal, name))
        launcher.wait(timeout=60)
        wait_for(lambda: not any(tree(launcher.pid).values()), seconds=20)
    finally:
        for process in chain(*tree(launcher.pid).values()):
            os.kill(process, signal.SIGKILL)
    errors = (tmp_path / "stderr").read_text()
    (step,) = saved(folder)
    assert logged(folder) == step
    assert f"after step {step}, saved; the same command continues" in errors
    assert "ijepa_fast" not in "".join(part for part in errors.split("Traceback")[1:]), errors
