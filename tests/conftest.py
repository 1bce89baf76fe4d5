"""Shared by all tests: Triton's interpreter without a GPU, GPU tests skipped by name, seeds, poisoned memory."""

import os

import pytest
import torch

# Triton reads this when it is imported, and the op folders when they are: so before either.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def poisoned():
    """Memory of torch.empty and its kin is NaN (the largest value, for integers) before anything is written to it."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture
def triton_everywhere():
    """Every op runs its Triton kernel: on the GPU if there is one, in the interpreter otherwise. Gives the device."""
    pytest.importorskip("triton")
    from ijepa_fast.kernels.common import dispatch

    before = {op: dispatch.choice(op) for op in dispatch.OPS}
    dispatch.use("triton")
    yield torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dispatch.use(before)
