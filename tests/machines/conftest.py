"""Tests of several machines are skipped by name where there can be none; the long ones run in `make test-machines`."""

import os
from pathlib import Path

import pytest

from tests.machines import network


def pytest_collection_modifyitems(items):
    mine = [item for item in items if Path(__file__).parent in Path(item.path).parents]
    why = network.missing() if mine else ""
    for item in mine:
        item.add_marker(pytest.mark.multi_machine)
        if why:
            item.add_marker(pytest.mark.skip(reason=why))
        elif "slow" in item.keywords and os.environ.get("MACHINES") != "all":
            item.add_marker(pytest.mark.skip(reason="part of make test-machines"))


@pytest.fixture
def two(tmp_path):
    """Two machines, and the folder where their keys and hostfiles are."""
    folder = tmp_path / "network"
    folder.mkdir()
    with network.machines(folder) as made:
        yield made, folder
