"""What tests of several methods ask of a step: loss and gradients, its work, and that graphs hold it."""

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ijepa_fast import kernels
from ijepa_fast.engine.graphs import Graphs
from tests.emulated_graphs import EmulatedRecorder


def loss_and_gradients(model, images, draw):
    """The loss, and the gradient to each of the model's weights."""
    loss, _ = model(images, draw)
    return [loss, *torch.autograd.grad(loss, [*model.parameters()])]


def unpadded(model, images):
    """Masks of so many images, without the rows that padding adds: a method does not count them."""
    model.policy["padding"] = False
    return model.draw(images, 0, 0)


def counted_work(model, images, draw):
    """Operations of a step by torch's own counter, which sees into the references alone."""
    kernels.use("reference")
    try:
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            model(images, draw)[0].backward()
    finally:
        kernels.use("auto")
    return counter.get_total_flops()


def assert_graphs_hold(model, eager, batch, images_of):
    """Four steps captured and replayed, emulated on a CPU, give `eager`'s losses and gradients."""
    said, gradients = [], [torch.zeros_like(p) for p in model.parameters()]
    graphs = Graphs(model, gradients, 1.0, said.append, EmulatedRecorder())
    model.use_graphs()
    for step in range(4):
        draw, images = model.draw(batch, 0, step % 2), images_of()
        found = [graphs(images, draw)[0], *gradients]
        for a, b in zip(found, loss_and_gradients(eager, images, draw), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert graphs.captured
    assert not said
