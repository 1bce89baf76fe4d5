"""sigreg: kernel and CPU against reference, archive, ranks, gradient, registration, compilation, bad input."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ijepa_fast.kernels.sigreg import reference, sigreg
from tests import oracle
from tests.launch import ROOT

ARCHIVE = ROOT / "tests" / "data" / "lejepa_step.npz"
SHAPES = [(1, 2, 3, 1), (2, 5, 7, 33), (1, 130, 24, 64), (3, 257, 16, 40)]  # (V, N, D, K)


def make(views, samples, dim, count, dtype=torch.float32, device="cpu"):
    embeddings = (torch.randn(views, samples, dim) * 1.5 + 0.3).to(device, dtype)
    return embeddings, F.normalize(torch.randn(dim, count), dim=0).to(device)


def check(embeddings, directions, t_max=3.0, points=17):
    """Value and gradient within the error budget."""

    def of(function):
        return lambda x: function(
            x, directions.to(x.dtype if x.dtype == torch.float64 else directions.dtype), t_max, points
        )

    oracle.check_against_reference(of(sigreg), of(reference.sigreg), (embeddings,), ("embeddings",))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel_matches_reference(triton_everywhere, poisoned, shape, dtype):
    check(*make(*shape, dtype, triton_everywhere))


@pytest.mark.parametrize(("t_max", "points"), [(3.0, 17), (5.0, 21), (0.5, 2)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cpu_matches_reference(poisoned, shape, t_max, points):
    check(*make(*shape), t_max, points)


@pytest.mark.gpu
def test_large_on_gpu(triton_everywhere):
    check(*make(2, 2000, 384, 1024, torch.float32, triton_everywhere))


def test_one_set_is_one_view():
    embeddings, directions = make(1, 9, 4, 5)
    assert torch.equal(sigreg(embeddings[0], directions), sigreg(embeddings, directions))


def test_views_are_sets_of_their_own():
    embeddings, directions = make(3, 9, 4, 5)
    each = torch.stack([sigreg(view, directions) for view in embeddings])
    torch.testing.assert_close(sigreg(embeddings, directions), each.mean())


def test_a_gaussian_has_less_of_it_than_a_point():
    directions = F.normalize(torch.randn(8, 64), dim=0)
    gaussian, point = sigreg(torch.randn(512, 8), directions), sigreg(torch.ones(512, 8), directions)
    assert gaussian < 2 < 100 < point


def test_a_step_down_the_gradient_is_less(triton_everywhere):
    embeddings, directions = make(1, 64, 6, 32, device=triton_everywhere)
    before = sigreg(embeddings.requires_grad_(), directions)
    (gradient,) = torch.autograd.grad(before, embeddings)
    assert sigreg(embeddings - 0.1 * gradient, directions) < before


@pytest.mark.parametrize("variant", range(3))
def test_the_published_statistic(variant):
    """Every direction's statistic, their mean, its gradient: to 1e-5 of the largest."""
    with np.load(ARCHIVE) as archive:
        get = {name: torch.from_numpy(archive[name]) for name in archive.files if archive[name].dtype.kind == "f"}
    t, phi, weights = (get[f"v{variant}/{name}"] for name in ("t", "phi", "weights"))
    for ours, golden in zip(reference.knots(float(t[-1]), len(t)), (t, phi, weights), strict=True):
        torch.testing.assert_close(ours.float(), golden, rtol=1e-6, atol=1e-7)
    embeddings, directions, knots = get["embeddings"].requires_grad_(), get["directions"], (float(t[-1]), len(t))
    slices = torch.stack([sigreg(embeddings, directions[:, k : k + 1].contiguous(), *knots) for k in range(20)])
    value = sigreg(embeddings, directions, *knots)
    (gradient,) = torch.autograd.grad(value, embeddings)
    for ours, name in ((slices, "per_slice"), (value, "value"), (gradient, "grad")):
        golden = get[f"v{variant}/{name}"]
        assert (ours - golden).abs().max() <= 1e-5 * golden.abs().max(), name


def sigreg_of(directions):
    return lambda x: sigreg(x, directions)


def test_gradcheck_of_reference():
    embeddings, directions = make(2, 4, 3, 5, torch.float64)
    oracle.gradcheck(lambda x: reference.sigreg(x, directions.double(), 3.0, 7), embeddings.requires_grad_())
    oracle.gradcheck(lambda x: sigreg(x, directions.double(), 3.0, 7), embeddings)


def test_no_gradient_to_directions():
    embeddings, directions = make(1, 4, 3, 5)
    assert not sigreg(embeddings, directions.requires_grad_()).requires_grad


def test_nothing_of_samples_by_directions_by_knots_is_kept():
    """Forward and backward together allocate less than a third of such a tensor."""
    embeddings, directions = make(1, 512, 8, 64)
    x = (embeddings @ directions).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda t: t):
        sigreg(embeddings.requires_grad_(), directions)
    assert sum(kept) < 2 * x.numel()


def test_deterministic(triton_everywhere):
    embeddings, directions = make(1, 300, 16, 48, device=triton_everywhere)
    results = [oracle.differentiate(sigreg_of(directions), (embeddings,), (torch.ones(()),)) for _ in range(2)]
    assert torch.equal(results[0][0][0], results[1][0][0])
    assert torch.equal(results[0][1][0], results[1][1][0])


def test_opcheck(triton_everywhere):
    x = torch.randn(2, 9, 5, device=triton_everywhere)
    factors = torch.randn(2, 4, 2, 5, device=triton_everywhere)
    oracle.opcheck(torch.ops.ijepa_fast.sigreg_sums, x, 0.2, 4)
    oracle.opcheck(torch.ops.ijepa_fast.sigreg_bwd, x, factors, 0.2)


def test_compiles_once(triton_everywhere):
    calls = [make(1, samples, 6, 8, device=triton_everywhere) for samples in (5, 9, 17)]
    calls = [(embeddings.requires_grad_(), directions) for embeddings, directions in calls]
    assert oracle.count_compiles(sigreg, calls) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embeddings": torch.zeros(4)}, "embeddings: expected shape"),
        ({"embeddings": torch.zeros(4, 3).int()}, "embeddings: expected dtype"),
        ({"embeddings": torch.zeros(3, 4).T}, "embeddings: expected a contiguous"),
        ({"embeddings": torch.zeros(1, 3)}, "embeddings: expected at least 2 samples"),
        ({"directions": torch.zeros(4, 5)}, "directions: expected shape"),
        ({"directions": torch.zeros(3, 0)}, "directions: expected at least one"),
        ({"points": 1}, "points: expected at least 2 knots, got 1"),
        ({"t_max": 0.0}, "t_max: expected more than 0, got 0.0"),
    ],
    ids=str,
)
def test_bad_input_is_named(change, message):
    good = {"embeddings": torch.randn(4, 3), "directions": torch.randn(3, 5), "t_max": 3.0, "points": 17}
    with pytest.raises(ValueError, match=f"sigreg: {message}"):
        sigreg(**good | change)
