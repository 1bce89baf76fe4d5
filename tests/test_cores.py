"""How many cores a process takes: its affinity, its container's quota, OMP_NUM_THREADS."""

import os

import pytest

from ijepa_fast import cores


@pytest.fixture
def sixteen(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


def grouped(monkeypatch, *found):
    monkeypatch.setattr(cores, "_groups", lambda: list(found))


@pytest.mark.parametrize(("text", "wanted"), [("150000 100000", 2), ("max 100000", 16), ("50000 100000", 1), ("", 16)])
def test_the_quota_of_cgroup_2(tmp_path, monkeypatch, sixteen, text, wanted):
    grouped(monkeypatch, (2, "/job/step"))
    (tmp_path / "job" / "step").mkdir(parents=True)
    (tmp_path / "job" / "cpu.max").write_text(text)
    assert cores.cores(tmp_path) == wanted


def test_the_tightest_group_holds(tmp_path, monkeypatch, sixteen):
    grouped(monkeypatch, (2, "/job/step"))
    for path, text in (("job", "800000 100000"), ("job/step", "400000 100000"), (".", "900000 100000")):
        (tmp_path / path).mkdir(exist_ok=True)
        (tmp_path / path / "cpu.max").write_text(text)
    assert cores.cores(tmp_path) == 4


def test_the_quota_of_cgroup_1_whose_path_is_the_hosts(tmp_path, monkeypatch, sixteen):
    grouped(monkeypatch, (1, "/docker/0123"))
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("300000\n")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert cores.cores(tmp_path) == 3
    assert cores.threads(2, tmp_path) == 1


def test_omp_num_threads_is_kept(tmp_path, monkeypatch, sixteen):
    assert cores.threads(4, tmp_path) == 4
    for asked, wanted in (("3", 3), ("2,1", 2), ("0", 4), ("x", 4)):
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
        assert cores.threads(4, tmp_path) == wanted


def test_this_machine():
    assert 1 <= cores.cores() <= len(os.sched_getaffinity(0))
