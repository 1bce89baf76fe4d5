"""Statistics of a batch that lies on two ranks: values and gradients of the whole batch on one."""

import pytest
import torch
import torch.nn.functional as F

from ijepa_fast import kernels
from ijepa_fast.kernels.common.over_ranks import gathered, summed
from ijepa_fast.kernels.sigreg import sigreg
from tests.launch import on_two_ranks


def _embeddings():
    generator = torch.Generator().manual_seed(1)
    directions = F.normalize(torch.randn(5, 7, generator=generator), dim=0)
    return torch.randn(2, 10, 5, generator=generator), directions


def _squares(rows):
    """A function of sums over all rows: of their squares, times themselves."""
    return summed(rows.square().sum(0)).square().sum()


def _products(rows):
    """A function of all rows: of their pairs."""
    rows = gathered(rows)
    return (rows @ rows.T).square().mean()


def _losses(x, directions):
    """Each loss of the embeddings x (V, N, D) of this rank."""
    found = {"summed": _squares(x[0]), "gathered": _products(x[0])}
    for implementation in ("auto", "reference"):
        kernels.use({"sigreg": implementation})
        found[f"sigreg {implementation}"] = sigreg(x, directions)
    kernels.use({"sigreg": "auto"})
    return found


def _differentiated(x, directions):
    """{loss: (value, gradient)}."""
    x.requires_grad_()
    return {name: (loss.detach(), *torch.autograd.grad(loss, x)) for name, loss in _losses(x, directions).items()}


def _share(rank, folder):
    x, directions = _embeddings()
    torch.save(_differentiated(x[:, rank * 5 : rank * 5 + 5].contiguous(), directions), folder / f"{rank}.pt")


@pytest.mark.multi_rank
def test_two_ranks_are_one_batch(tmp_path):
    """Both have the whole batch's value; their gradients, averaged as the engine averages them, are the whole's."""
    parts = on_two_ranks(_share, tmp_path)
    whole = _differentiated(*_embeddings())
    assert len(whole) == 4
    for name, (value, gradient) in whole.items():
        for part in parts:
            torch.testing.assert_close(part[name][0], value, msg=name)
        both = torch.cat([part[name][1] for part in parts], dim=1) / 2
        torch.testing.assert_close(both, gradient, rtol=1e-4, atol=1e-6, msg=name)
    torch.testing.assert_close(whole["sigreg auto"], whole["sigreg reference"], rtol=1e-4, atol=1e-6)
