"""A machine that goes, in start-up, in a step, in a save: the others end within engine.timeout, and name it.

What is left goes on from the last checkpoint, and is the unbroken run.
"""

import time

import pytest

pytest.importorskip("deepspeed")
pytest.importorskip("nvidia.dali")

from tests.faults.run import wait_for
from tests.launch import losses, run
from tests.machines.network import by_hand, outcome, said

pytestmark = pytest.mark.slow

TIMEOUT = 8
MORE = 20  # seconds that a loaded machine takes to say it and to end, beside the time-out
OPTIONS = ("optim.epochs=9", "log.keep=9", "log.checkpoint_every=4")
LONG = (*OPTIONS, "optim.steps=100000", f"engine.timeout={TIMEOUT}")

# Ranks stop at the moment that is wanted, say so, and go on when the machine of one is gone.
HOLD = """
import os, time
from pathlib import Path

def hold(function, when=lambda *arguments: True):
    def call(*arguments, **more):
        if when(*arguments) and not Path("{marks}/go").exists():
            Path("{marks}/here-" + os.environ["RANK"]).touch()
            while not Path("{marks}/go").exists():
                time.sleep(0.05)
        return function(*arguments, **more)
    return call
"""
MOMENTS = {
    "start-up": "from ijepa_fast import train\ntrain.start = hold(train.start)",
    "step": "from ijepa_fast.engine.engine import Engine\n"
    "seen = []\nEngine.step = hold(Engine.step, lambda *a: seen.append(0) or len(seen) > 6)",
    "save": "from ijepa_fast.run import checkpoint\n"
    "checkpoint._write_fragments = hold(checkpoint._write_fragments, lambda draft, taken: taken.step == 8)",
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run of one process."""
    return run(tmp_path_factory.mktemp("alone"), *OPTIONS, "optim.steps=10")


def goes_on(runs, alone):
    """What is left, one process, goes on and is the unbroken run."""
    folder = run(runs, *OPTIONS, "optim.steps=10")
    assert losses(folder) == pytest.approx(losses(alone), rel=1e-5)


@pytest.mark.parametrize("how", ["cut", "kill"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_machine_that_goes_is_named_and_what_is_left_goes_on(two, alone, tmp_path, moment, how, record_property):
    made, _ = two
    ranks = by_hand(made, tmp_path, *LONG, first=f"{HOLD.format(marks=tmp_path)}\n{MOMENTS[moment]}")
    wait_for(lambda: len(list(tmp_path.glob("here-*"))) == 2 or ranks[0].poll() is not None)
    getattr(made[1], how)()
    (tmp_path / "go").touch()
    began = time.time()
    statuses, text = outcome(ranks[:1])
    seconds = time.time() - began
    record_property("seconds to the end", round(seconds, 1))  # with --junitxml, for docs/several-machines.md
    assert statuses == [1], text[-3000:]
    assert seconds < TIMEOUT + MORE
    (error,) = said(text)
    assert "machine-b" in error, error
    assert "Traceback" not in text
    made[1].kill()
    goes_on(tmp_path, alone)
