"""A pytest plugin for bench/gpu_suite.py: outcomes are written as they come, and a test that hangs ends its process.

TEST_LOG names the file that gets one JSON line a test; TEST_SECONDS is the time one test may take; with TEST_SHARD=i/n
every n-th test runs, from the i-th. A kernel that never ends cannot be interrupted from Python, so the process prints
where it stands and exits; its test is then the one of the file that has no line.
"""

from __future__ import annotations

import faulthandler
import json
import os

import pytest

# Where the process's messages go, before pytest takes the descriptor for itself.
STDERR = os.fdopen(os.dup(2), "w")


def _write(nodeid: str, outcome: str, seconds: float) -> None:
    line = {"file": nodeid.partition("::")[0], "test": nodeid, "outcome": outcome, "seconds": round(seconds, 3)}
    line["shard"] = os.environ["TEST_SHARD"]
    with open(os.environ["TEST_LOG"], "a") as file:
        file.write(json.dumps(line) + "\n")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """Keep this process's share."""
    shard, shards = map(int, os.environ["TEST_SHARD"].split("/"))
    items[:] = items[shard::shards]


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item):
    """One test, with what its fixtures do."""
    faulthandler.dump_traceback_later(float(os.environ["TEST_SECONDS"]), exit=True, file=STDERR)
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


def pytest_runtest_logreport(report):
    """The outcome of the test, or of the fixture that kept it from running."""
    if report.when == "call" or report.outcome != "passed":
        _write(report.nodeid, report.outcome, report.duration)
