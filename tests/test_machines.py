"""Ranks that meet: what they compare, what each of them says, and that a hanging one says where it is."""

import json
import os
import signal
import socket
import threading
import time

import pytest
import torch

pytest.importorskip("yaml")
pytest.importorskip("deepspeed")

from ijepa_fast.config import load_config
from ijepa_fast.engine import engine, interface
from ijepa_fast.run import machines, pulse
from tests.faults.run import LONG, logged, wait_for
from tests.launch import ROOT, TINY, finish, start


def record(host="a", error="", **same):
    return {"host": host, "error": error, "same": same}


@pytest.mark.parametrize(
    ("records", "expected"),
    [
        ([record(), record("b")], ""),
        ([record(**{"x=": 1}), record("b", **{"x=": 1})], ""),
        ([record(**{"x=": 1}), record("b", **{"x=": 2})], "b has x=2, where a has x=1; start the same on all machines"),
        (
            [record(**{"x=": 1}), record(**{"x=": 2})],
            "rank 1 has x=2, where rank 0 has x=1; start the same on all machines",
        ),
        (
            [record(), record("b", **{"new=": 2})],
            "b has new=2, where a has new=not set; start the same on all machines",
        ),
        ([record(), record("b", "no GPU")], "b: no GPU"),
        ([record(error="no key"), record("b", "no key")], "no key"),
        ([record(error="no key"), record("b", "no GPU")], "a: no key; b: no GPU"),
    ],
)
def test_what_is_wrong_is_one_sentence(records, expected):
    assert machines._wrong(dict(enumerate(records)), len(records)) == expected


def test_ranks_are_named_in_ranges():
    assert machines._numbers([3]) == "rank 3"
    assert machines._numbers([0, 1, 2, 5, 7, 8]) == "ranks 0 to 2, 5, 7 to 8"
    absent = machines._absent({0: record(), 1: record(), 2: record("b")}, 5)
    assert absent == "ranks 3 to 4 have not come (ranks 0 to 1 of a; rank 2 of b there)"


def test_a_message_has_the_machine_where_there_are_several(monkeypatch):
    monkeypatch.setattr(pulse, "_hosts", ["a", "a", "b"])
    assert pulse.name(2) == "rank 2 on b"
    monkeypatch.setattr(pulse, "_hosts", ["a", "a"])
    assert pulse.name(1) == "rank 1"


def meet(ranks, configs, hosts, monkeypatch, late=()):
    """What each rank of a meeting gets, in threads that share a store: Met, or the error."""
    store = torch.distributed.HashStore()
    found, local = {}, threading.local()
    monkeypatch.setattr(machines, "_store", lambda rank, seconds: store)
    monkeypatch.setattr(machines.socket, "gethostname", lambda: hosts[local.rank])
    environment = {"WORLD_SIZE": str(ranks)}

    class Environment(dict):
        def get(self, name, default=None):
            return str(local.rank) if name == "RANK" else super().get(name, default)

    monkeypatch.setattr(machines.os, "environ", Environment(os.environ | environment))

    def one(rank):
        local.rank = rank
        try:
            found[rank] = machines.meet(configs[rank], "cpu")
        except Exception as error:
            found[rank] = error

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(ranks) if rank not in late]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return found


def tiny(*more):
    return load_config(ROOT / "configs" / "quickstart.yaml", [*TINY, *more])


def test_ranks_that_are_alike_know_each_others_machines(monkeypatch):
    configs = [tiny(), tiny(), tiny("data.source=scenes", "runs=elsewhere")]  # which a machine may have its own of
    found = meet(3, configs, ["a", "a", "b"], monkeypatch)
    assert [met.hosts for met in found.values()] == [["a", "a", "b"]] * 3


def test_another_setting_ends_all_ranks_with_one_sentence(monkeypatch):
    found = meet(2, [tiny(), tiny("optim.lr=0.5")], ["a", "b"], monkeypatch)
    assert {type(error) for error in found.values()} == {machines.NotAlike}
    assert {str(error)[:21] for error in found.values()} == {"b has optim.lr=0.5, w"}


def test_who_does_not_come_is_named(monkeypatch):
    monkeypatch.setattr(engine, "RENDEZVOUS", 1)
    monkeypatch.setattr(machines, "GRACE", 0.1)
    monkeypatch.setenv("MASTER_ADDR", "a")
    monkeypatch.setenv("MASTER_PORT", "1")
    found = meet(3, [tiny("engine.timeout=1")] * 3, ["a", "b", "c"], monkeypatch, late=(1,))
    expected = "waited in vain for all 3 ranks to start: rank 1 has not come (rank 0 of a; rank 2 of c there) after 1 s"
    assert str(found[0]).startswith(expected)
    assert str(found[2]) == str(found[0])


def test_another_clock_is_said(monkeypatch, capfd):
    store = torch.distributed.HashStore()
    store.set("verdict", json.dumps({"error": "", "hosts": ["a", "b"], "time": time.time() - 3600}))
    machines._hear(store, 5)
    assert f"{socket.gethostname()}: its clock is 3600 s ahead of that of a" in capfd.readouterr().err
    store.set("verdict", json.dumps({"error": "", "hosts": ["a", "b"], "time": time.time()}))
    machines._hear(store, 5)
    assert capfd.readouterr().err == ""


def test_an_interface_is_named_only_where_the_machine_has_no_address_of_its_own(monkeypatch):
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    names = {"own": "127.0.1.1", "other": "10.0.0.2", "127.0.0.1": "127.0.0.1"}
    monkeypatch.setattr(interface.socket, "gethostbyname", names.__getitem__)
    monkeypatch.setattr(interface.socket, "gethostname", lambda: "own")
    assert interface.facing("127.0.0.1") is None  # all ranks here
    monkeypatch.setattr(interface.socket, "gethostname", lambda: "other")
    assert interface.facing("other") is None
    assert interface._address("lo") == "127.0.0.1"
    assert interface._address("nothing") is None


@pytest.mark.multi_rank
def test_a_quit_signal_says_what_a_rank_is_doing_and_it_goes_on(tmp_path):
    (process,) = start(tmp_path, *LONG)
    folder = tmp_path / "quickstart"
    wait_for(lambda: logged(folder) >= 2 or process.poll() is not None)
    process.send_signal(signal.SIGQUIT)
    before = logged(folder)
    wait_for(lambda: logged(folder) > before + 2 or process.poll() is not None)
    process.send_signal(signal.SIGKILL)
    _, said = finish([process])
    lines = [line for line in said.splitlines() if line.startswith("rank 0 | ")]
    assert any("(most recent call first): " in line and "after step" in line for line in lines), said[-2000:]
    assert any("ijepa_fast/train.py" in line and "in train" in line for line in lines)
