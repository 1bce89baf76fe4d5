"""Masks as a user writes them, for tests: functions that `mask.strategy=tests.my_masks:<name>` names."""

import numpy as np
import torch


def halves(grid, targets=1):
    """The left half is the context; a random row of the right half is the target, by an image's place."""
    rows, columns = grid
    context = np.zeros((rows, columns), bool)
    context[:, : columns // 2] = True

    def draw(images, seed, step, first):
        chosen = np.array([np.random.default_rng([seed, step, first + i]).integers(rows) for i in range(images)])
        target = chosen[:, None] * columns + np.arange(columns // 2, columns)
        return np.tile(context.ravel(), (1, images, 1)), target[None].astype(np.int32)

    return draw


def by_batch(grid):
    """Wrong: an image's masks depend on the images beside it."""

    def draw(images, seed, step, first):
        target = torch.full((1, images, 2), images, dtype=torch.int32)
        return torch.ones(1, images, grid[0] * grid[1], dtype=torch.bool), target

    return draw


def outside(grid):
    """Wrong: a patch that there is not."""
    patches = grid[0] * grid[1]

    def draw(images, seed, step, first):
        return torch.ones(1, images, patches, dtype=torch.bool), torch.full((1, images, 1), patches, dtype=torch.int32)

    return draw


def nothing(grid):
    """Wrong: no sampler."""


def empty(grid):
    """Wrong: contexts without a patch."""

    def draw(images, seed, step, first):
        none = torch.zeros(1, images, grid[0] * grid[1], dtype=torch.bool)
        return none, torch.zeros(1, images, 1, dtype=torch.int32)

    return draw
