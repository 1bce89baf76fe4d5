"""Shared by all tests: Triton's interpreter, marks of tests, seeds, poisoned memory, and a finished run."""

import os

import numpy as np
import pytest
import torch

# Triton reads this when it is imported, and the op folders when they are: so before either.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items):
    for item in items:
        if "finished_run" in item.fixturenames:
            item.add_marker(pytest.mark.slow)
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


@pytest.fixture
def ops_as_on_a_gpu(monkeypatch):
    """On a CPU, ops are called as on a GPU, and inside they do what a CPU is fastest at: for emulated graphs."""
    if torch.cuda.is_available():
        yield
        return
    pytest.importorskip("triton")
    from ijepa_fast.kernels.common import dispatch, library
    from ijepa_fast.kernels.predictor_tokens import ops as predictor_ops
    from ijepa_fast.kernels.varlen_attention import ops as attention_ops

    for module in (predictor_ops, attention_ops):  # what the CPU alone checks
        monkeypatch.setattr(module, "check_sequences", lambda *arguments: None)
    monkeypatch.setattr(library, "interpreted", lambda: False)
    before = {op: dispatch.choice(op) for op in dispatch.OPS}
    dispatch.use({op: "triton" for op in dispatch.TRITON if op not in ("adamw_ema", "mask_sampler")})
    yield
    dispatch.use(before)


def write_red_and_blue(folder, seed):
    """24 images in two class folders, red ones and blue ones, drawn by `seed`."""
    image, generator = pytest.importorskip("PIL.Image"), np.random.default_rng(seed)
    for name, channel in (("red", 0), ("blue", 2)):
        (folder / name).mkdir()
        for i in range(12):
            pixels = generator.integers(0, 60, (40, 48, 3), dtype=np.uint8)
            pixels[..., channel] += 180
            image.fromarray(pixels).save(folder / name / f"{i}.jpg", quality=95)
    return folder


@pytest.fixture(scope="session")
def red_and_blue(tmp_path_factory):
    """24 images in two class folders: red ones and blue ones."""
    return write_red_and_blue(tmp_path_factory.mktemp("photos"), 0)


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory, red_and_blue):
    """The folder of a run of 24 steps on `red_and_blue`, with probes along it and the evaluation at its end."""
    for name in ("deepspeed", "nvidia.dali", "omegaconf"):
        pytest.importorskip(name)
    from tests.launch import run

    test = write_red_and_blue(tmp_path_factory.mktemp("test"), 1)
    data = (f"data.source={red_and_blue}", f"probe.test={test}", "optim.epochs=8")
    return run(tmp_path_factory.mktemp("runs"), "name=tiny <run>", *data, "probe.enabled=true", "probe.every=6")
