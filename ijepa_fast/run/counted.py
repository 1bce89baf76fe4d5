"""What a step keeps for its backward pass, counted in a forward pass of a few images on this machine's CPU."""

from __future__ import annotations

import torch

from ijepa_fast.config import Config
from ijepa_fast.data import size_of
from ijepa_fast.run.build import build_method

IMAGES = 2


def saved_values(config: Config) -> float:
    """Values for each image that autograd keeps, weights left out. Takes the memory of the whole model in fp32."""
    method = build_method(config)
    draw = method.draw(IMAGES, config.seed, 0, 0, IMAGES)
    sides = [view.crop for view in method.views()]
    sizes = [(*size_of(side), config.data.channels) for side in sides or [config.data.size]]
    many = [torch.zeros(IMAGES, *size, dtype=torch.uint8) for size in sizes]
    weights = {p.untyped_storage().data_ptr() for p in method.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if x.is_floating_point() and storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = x  # held, so that no other storage gets its address
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        held = method(many if sides else many[0], draw)
    values = sum(x.untyped_storage().nbytes() / x.itemsize for x in kept.values())
    del held
    return values / IMAGES
