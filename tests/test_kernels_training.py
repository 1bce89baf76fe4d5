"""Training with the Triton kernels and with the references, from one seed, step by step; `kernels` in the config."""

import inspect
from importlib import import_module

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("omegaconf")

from ijepa_fast import kernels
from ijepa_fast.config import load_config
from ijepa_fast.kernels.common import dispatch
from ijepa_fast.masks.packing import pack
from ijepa_fast.masks.samplers import make_sampler
from ijepa_fast.run.build import build_method
from tests.launch import PUBLISHED_MASKS, ROOT, TINY
from tests.small import loss_of, optimizer_of, to

# An odd batch, head dims 16 and 8, patch rows of 75 values padded to 80: every op runs in every step.
SMALL = ["data.crop=20", "model.patch=5", "batch_size=3", "model.predictor_depth=1", *PUBLISHED_MASKS]
RATES = [(1e-2, 0.04, 0.9), (2e-2, 0.1, 0.95), (1e-2, 0.4, 0.99)]  # learning rate, weight decay, momentum of each step


@pytest.fixture(autouse=True)
def _settings():
    before = {op: dispatch.choice(op) for op in dispatch.OPS}
    yield
    dispatch.use(before)


def config_with(*overrides):
    return load_config(ROOT / "configs" / "quickstart.yaml", [*TINY, *SMALL, *overrides])


def train(config):
    """Yields, at the start with no loss and then after each step, (loss, weights of encoder, predictor, target)."""
    kernels.use(config.kernels)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    method = to(build_method(config), device)
    # With a tiny eps, Adam would make steps of full size out of gradients that are nothing but rounding.
    optimizer = optimizer_of(method, eps=1e-4)
    sampler = make_sampler("multiblock", method.encoder.grid, min_keep=1, target_scale=(0.2, 0.3))
    generator = torch.Generator().manual_seed(1)

    def weights():
        networks = method.networks.items()
        return {f"{k}.{n}": p.detach().cpu().clone() for k, net in networks for n, p in net.named_parameters()}

    yield None, weights()
    for step, (lr, weight_decay, momentum) in enumerate(RATES):
        side = config.data.crop
        images = torch.randint(256, (config.batch_size, side, side, 3), dtype=torch.uint8, generator=generator)
        loss = loss_of(method, images.to(device), pack(sampler(config.batch_size, config.seed, step)).to(device))
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group.update(lr=lr, momentum=momentum, weight_decay=weight_decay if group["decay"] else 0.0)
        optimizer.step()
        yield loss.item(), weights()


RANDOM = ("words", "philox")  # numbers of a step, which the host draws


def forbid_references(monkeypatch):
    """Whoever calls a reference from now on fails."""

    def forbidden(*args, **kwargs):
        raise AssertionError("a reference runs in place of a kernel")

    for op in dispatch.TRITON:
        module = import_module(f"ijepa_fast.kernels.{op}.reference")
        for name, _ in inspect.getmembers(module, inspect.isfunction):
            if name in RANDOM:
                continue
            monkeypatch.setattr(module, name, forbidden)


@pytest.mark.slow
def test_kernels_and_references_agree_step_by_step(monkeypatch):
    """fp32: losses to 1e-6, every weight to rounding and a ten-thousandth of what training has moved its tensor."""
    (_, first), *expected = train(config_with("kernels=reference"))
    forbid_references(monkeypatch)
    _, *actual = train(config_with("kernels=triton"))
    assert len(actual) == len(expected) == len(RATES)
    for (loss, weights), (expected_loss, expected_weights) in zip(actual, expected):
        assert loss == pytest.approx(expected_loss, rel=1e-6)
        assert weights.keys() == expected_weights.keys()
        for name, value in expected_weights.items():
            moved = (value - first[name]).abs().max()
            assert moved > 0, name
            error = (weights[name] - value).abs().max()
            assert error <= 1e-4 * moved + 2**-22 * value.abs().max(), f"{name}: error {error:.3g}, moved {moved:.3g}"


def test_each_op_is_set_by_the_config():
    kernels.use(config_with().kernels)
    assert {kernels.choice(op) for op in dispatch.OPS} == {"auto"}
    kernels.use(config_with("kernels.layer_norm=reference", "kernels.patchify=triton").kernels)
    assert (kernels.choice("layer_norm"), kernels.choice("patchify")) == ("reference", "triton")
    assert kernels.choice("target_loss") == "auto"
    kernels.use(config_with("kernels=reference").kernels)
    assert {kernels.choice(op) for op in dispatch.OPS} == {"reference"}
    kernels.use(config_with("kernels=triton").kernels)
    assert {kernels.choice(op) for op in dispatch.TRITON} == {"triton"}
    assert {kernels.choice(op) for op in set(dispatch.OPS) - set(dispatch.TRITON)} == {"auto"}


def test_mistakes_name_the_op():
    with pytest.raises(ValueError, match="there is no op 'layernorm'; the ops are patchify, masked_gather"):
        kernels.use(config_with("kernels.layernorm=triton").kernels)
    with pytest.raises(ValueError, match=r"kernels\.layer_norm: expected one of auto, triton, reference, got 'cuda'"):
        kernels.use(config_with("kernels.layer_norm=cuda").kernels)
    with pytest.raises(ValueError, match=r"kernels\.linear: expected one of auto, reference, got 'triton'"):
        kernels.use(config_with("kernels.linear=triton").kernels)
    with pytest.raises(ValueError, match=r"kernels: expected one of auto, triton, reference, .*, got 'fast'"):
        kernels.use(config_with("kernels=fast").kernels)


def test_triton_without_a_gpu_or_the_interpreter_is_an_error(monkeypatch):
    """An explicit choice raises with the reason; it never falls back."""
    kernels.use("triton")
    x = torch.randn(3, 8)
    monkeypatch.setattr(dispatch, "_INTERPRETED", False)
    with pytest.raises(RuntimeError, match=r"kernels\.layer_norm: 'triton' was asked for a tensor on cpu; set TRITON"):
        dispatch.runs_triton("layer_norm", x)
    monkeypatch.setattr(dispatch, "_HAS_TRITON", False)
    with pytest.raises(RuntimeError, match="needs the package triton, which is not installed"):
        dispatch.runs_triton("layer_norm", x)
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match="the Triton kernel computes in fp32, got a float64 tensor"):
        dispatch.runs_triton("layer_norm", x.double())
