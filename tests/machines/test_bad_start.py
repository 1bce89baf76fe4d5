"""What is wrong with one machine ends the job before training, on all machines, in one sentence with its name."""

import shutil
import time

import pytest

pytest.importorskip("deepspeed")
pytest.importorskip("nvidia.dali")

from tests.launch import ROOT
from tests.machines import network
from tests.machines.network import by_hand, machines, outcome, said

pytestmark = pytest.mark.slow

PHOTOS = ("data.mean=[0.5,0.5,0.5]", "data.std=[0.2,0.2,0.2]")


def other_code(tmp_path):
    changed = tmp_path / "__init__.py"
    changed.write_text((ROOT / "ijepa_fast" / "__init__.py").read_text() + "\n# another one\n")
    return {ROOT / "ijepa_fast" / "__init__.py": changed}


def fewer_images(tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(tmp_path / "photos", copy)
    (copy / "red" / "3.jpg").unlink()
    return {tmp_path / "photos": copy}


def no_images(tmp_path):
    (tmp_path / "empty").mkdir()
    return {tmp_path / "photos": tmp_path / "empty"}


def own_runs(tmp_path):
    (tmp_path / "own").mkdir()
    (tmp_path / "runs").mkdir()
    return {tmp_path / "runs": tmp_path / "own"}


# what: (what machine-b sees instead, its own settings, what is said)
CASES = {
    "configuration": (None, ("batch_size=16",), "machine-b has batch_size=16, where machine-a has batch_size=8"),
    "time-out": (None, ("engine.timeout=99",), "machine-b has engine.timeout=99, where machine-a has engine.timeout="),
    "code": (other_code, (), "machine-b has ijepa_fast "),
    "data set": (fewer_images, (), "rank 1 on machine-b has 23 images, where rank 0 on machine-a has 24 images"),
    "no images": (no_images, (), "rank 1 on machine-b: data.source: "),
    "no folder": (None, ("data.source=/nowhere",), "machine-b: data.source: data path '/nowhere' does not exist"),
    "runs of its own": (own_runs, (), "runs: rank 1 on machine-b does not see "),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_said_with_the_machine(red_and_blue, tmp_path, case):
    shutil.copytree(red_and_blue, tmp_path / "photos")
    make, own, expected = CASES[case]
    bind = make(tmp_path) if make else {}
    (tmp_path / "network").mkdir()
    options = (f"data.source={tmp_path / 'photos'}", *PHOTOS, "optim.steps=3")
    with machines(tmp_path / "network", {}, bind) as made:
        statuses, text = outcome(by_hand(made, tmp_path / "runs", *options, others={1: own}))
    assert statuses == [1, 1], text[-3000:]
    (error,) = said(text)
    assert error.startswith(expected) or expected in error
    assert "Traceback" not in text
    assert "loss=" not in text


def test_a_machine_that_does_not_come_is_named_by_its_ranks(two, tmp_path):
    made, _ = two
    first = "from ijepa_fast.engine import engine; engine.RENDEZVOUS = 5"
    ranks = by_hand([made[0], made[1]], tmp_path, "engine.timeout=5", first=first)
    ranks[1].kill()
    made[1].kill()
    statuses, text = outcome(ranks[:1])
    assert statuses == [1]
    (error,) = said(text)
    assert "waited in vain for all 2 ranks to start: rank 1 has not come (rank 0 of machine-a there)" in error


def test_a_port_in_use_is_said(two, tmp_path):
    made, _ = two
    code = f"import socket, time; s = socket.create_server(('', {network.PORT})); time.sleep(100)"
    holder = made[0].start("python", "-c", code)
    time.sleep(1)
    ranks = by_hand(made, tmp_path, first="from ijepa_fast.engine import engine; engine.RENDEZVOUS = 5")
    statuses, text = outcome(ranks[:1])
    ranks[1].kill()
    holder.kill()
    assert statuses == [1]
    assert f"MASTER_PORT={network.PORT}: another program has this port" in text
    assert "machine-a" in text
    assert "Traceback" not in text


def test_a_machine_whose_name_is_a_loopback_address_trains(tmp_path):
    """As Debian's installer writes it: 127.0.1.1 and the machine's own name."""
    (tmp_path / "network").mkdir()
    binds = []
    for name in network.NAMES:
        hosts = tmp_path / f"hosts-{name}"
        hosts.write_text(f"127.0.0.1 localhost\n127.0.1.1 {name}\n")
        binds.append({network.Path("/etc/hosts"): hosts})
    with machines(tmp_path / "network", *binds) as made:
        statuses, text = outcome(by_hand(made, tmp_path, "optim.steps=2"))
    assert statuses == [0, 0], text[-3000:]
