"""What a loss on visible tokens reads of a step (V-JEPA 2.1): their rows, their targets, and what each weighs.

A visible token weighs 1 / sqrt(d), d the distance in patches to the nearest target of its image, over the tokens of its
context: so every context weighs the same, and the loss is the same on any number of ranks.
Shapes: M target blocks of K patches, C contexts, B images, N patches, T context tokens.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

FAR = 1 << 20  # squared patches, more than any grid has


def visible_tokens(
    rows: np.ndarray, lengths: np.ndarray, target: np.ndarray, union: np.ndarray, padding: int, grid: tuple[int, int]
) -> dict[str, Any]:
    """Fields of a MaskDraw, each for M times the context tokens and `padding` more, which weigh nothing.

    rows: (T,) int32 flat rows of the context tokens. lengths: (C, B) of the contexts. target: (M, B, K) patch numbers.
    union: (rows of all images,) the row of the union that each is. grid: rows and columns of patches.
    """
    contexts, images = lengths.shape
    targets, _, size = target.shape
    tokens, sequences = len(rows) + padding, contexts * images
    sequence = np.repeat(np.arange(sequences + 1), [*lengths.ravel(), padding])
    in_block = np.arange(tokens) + sequence * size
    apart = nearest(target, grid)[sequence[: len(rows)] % images, rows % (grid[0] * grid[1])]
    # target_loss takes the mean over all rows, those of the padding too.
    share = tokens / (sequences * np.repeat(lengths.ravel(), lengths.ravel()))
    weights = np.pad((share / np.sqrt(apart)).astype(np.float32), (0, padding))
    blocks = np.arange(targets)[:, None] * (tokens + sequences * size)
    return {
        "visible_rows": torch.from_numpy((blocks + in_block).reshape(-1).astype(np.int32)),
        "visible_targets": torch.from_numpy(np.tile(np.pad(union[rows], (0, padding)), targets).astype(np.int32)),
        "visible_weights": torch.from_numpy(np.tile(weights, targets)),
    }


def nearest(target: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """(B, N) distance of each patch to the nearest of its image's targets (M, B, K), in patches; 1 at least."""
    images = target.shape[1]
    hit = np.zeros((images, grid[0] * grid[1]), dtype=bool)
    hit[np.arange(images)[:, None], target] = True
    by_row, by_column = (np.subtract.outer(np.arange(n), np.arange(n)).astype(np.int32) ** 2 for n in grid)
    # The nearest target of each row of patches, then the nearest of these.
    along = np.where(hit.reshape(images, grid[0], 1, grid[1]), by_column, FAR).min(3)
    square = (along[:, None] + by_row[:, :, None]).min(2)
    distance: np.ndarray = np.sqrt(np.maximum(square, 1)).reshape(images, -1)
    return distance


def scale_in(step: int, weight: float, grows: float) -> torch.Tensor:
    """What the loss weighs in `step`, a scalar fp32 tensor: `weight`, to which it grows in the first `grows` steps."""
    return torch.tensor(weight * (min(1.0, (step + 1) / grows) if grows else 1.0))
