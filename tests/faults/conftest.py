"""The long part of the campaign runs where it is asked for: FAULTS=all, as `make test-faults` sets it."""

import os
from pathlib import Path

import pytest


def pytest_collection_modifyitems(items):
    if os.environ.get("FAULTS") == "all":
        return
    skip = pytest.mark.skip(reason="part of make test-faults")
    for item in items:
        if Path(__file__).parent in Path(item.path).parents and "slow" in item.keywords:
            item.add_marker(skip)
