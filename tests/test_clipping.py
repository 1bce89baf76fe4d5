"""Each parameter's gradient is clipped by itself, wherever its shares lie."""

import copy

import torch

from ijepa_fast.engine.clipping import ClipEach
from ijepa_fast.engine.partitions import Fragment, Partition


def test_whole_parameters_are_clipped_as_torch_does():
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((3, 4), (5,), (2, 2))]
    for scale, param in zip((10.0, 0.1, 3.0), params):
        param.grad = scale * torch.randn_like(param)
    expected = copy.deepcopy(params)
    for one, param in zip(expected, params):
        one.grad = param.grad.clone()
        torch.nn.utils.clip_grad_norm_(one, 1.0)
    parts = [Partition(p, [Fragment(str(i), 0, p.numel(), 0)], False) for i, p in enumerate(params)]
    ClipEach(parts, True, 1.0, ["0", "1", "2"])(params)
    for param, one in zip(params, expected):
        torch.testing.assert_close(param.grad, one.grad)
    assert params[1].grad.norm() < 1


def test_a_flat_slice_is_clipped_by_its_fragments():
    """Padding behind them is left alone."""
    flat = torch.nn.Parameter(torch.zeros(12))
    flat.grad = torch.tensor([3.0, 4, 0, 0, 0.1, 0.1, 0.1, 0.1, 6, 8, 9, 9])
    fragments = [Fragment("a", 0, 4, 0), Fragment("b", 2, 6, 4), Fragment("c", 0, 2, 8)]
    ClipEach([Partition(flat, fragments, False)], True, 1.0, ["a", "b", "c"])([flat])
    expected = torch.tensor([0.6, 0.8, 0, 0, 0.1, 0.1, 0.1, 0.1, 0.6, 0.8, 9, 9])
    torch.testing.assert_close(flat.grad, expected)


def test_parameters_without_a_gradient_are_passed_over():
    with_one, without = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(2))
    with_one.grad = torch.tensor([0.0, 2.0])
    parts = [Partition(p, [Fragment(n, 0, 2, 0)], False) for n, p in (("a", without), ("b", with_one))]
    ClipEach(parts, True, 1.0, ["a", "b"])([without, with_one])
    torch.testing.assert_close(with_one.grad, torch.tensor([0.0, 1.0]))
