"""PNG pictures at the end of a run: the loss curve, and the masks drawn over sample images."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ijepa_fast.masks.packing import MaskDraw

Indices = Sequence[int] | np.ndarray  # of patches in an image, row by row

# Okabe and Ito's palette: told apart by colour-blind readers, on white and on black.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")


def parse_log(path: str | Path) -> tuple[list[dict[str, Any]], list[int]]:
    """The records of a run's log.jsonl, and the numbers of the lines that are none, which are left out.

    A record is a mapping with a number of its step; a kill cuts a last line short, and a disk may garble any.
    """
    records, broken = [], []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8", errors="surrogateescape").splitlines(), 1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
        else:
            broken.append(number)
    return records, broken


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """The records of a run's log.jsonl, a list of dicts, without lines that are none."""
    return parse_log(path)[0]


def plot_loss(records: list[dict[str, Any]], path: Path) -> None:
    """Draw loss over steps as a PNG, on a logarithmic axis where every loss is positive.

    records: dicts with `step` and `loss` (lines without them are passed over); path: of the PNG to write.
    """
    points = [(r["step"], r["loss"]) for r in records if "loss" in r and "step" in r]
    if not points:
        raise ValueError("records: expected at least one with `step` and `loss`, got none; log at least one step")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps, losses = np.array(points, dtype=np.float64).T
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(steps, losses, color=COLOURS[0], linewidth=2 if len(points) < 200 else 1)
    axes.set(xlabel="step", ylabel="loss", yscale="log" if (losses > 0).all() else "linear")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def _rgb(colour: str) -> np.ndarray:
    return np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)], dtype=np.float32)


def _enlarge(image: np.ndarray, patch: int, least: int) -> tuple[np.ndarray, int]:
    """Nearest-neighbour enlargement by a whole factor, so that a side has at least `least` pixels."""
    factor = max(1, -(-least // image.shape[0]))
    return image.repeat(factor, 0).repeat(factor, 1), patch * factor


def _patch_mask(indices: Indices, grid: tuple[int, int], patch: int) -> np.ndarray:
    """Flat patch indices -> boolean pixel mask."""
    mask = np.zeros(grid[0] * grid[1], dtype=bool)
    mask[np.asarray(indices, dtype=np.int64)] = True
    return mask.reshape(grid).repeat(patch, 0).repeat(patch, 1)


def _border(mask: np.ndarray, width: int) -> np.ndarray:
    """The rim of a boolean pixel mask, `width` pixels inside it."""
    inside = np.pad(mask, width)
    shrunk = inside.copy()
    for axis in (0, 1):
        for shift in range(1, width + 1):
            shrunk &= np.roll(inside, shift, axis) & np.roll(inside, -shift, axis)
    return mask & ~shrunk[width:-width, width:-width]


def as_rgb(images: torch.Tensor) -> torch.Tensor:
    """Images (n, H, W, C) of any depth as uint8 (n, H, W, 3) to look at.

    RGB of eight bits stays as it is. Of others the first three channels, or the first in grey, are stretched between
    the 2nd and 98th percentile of each.
    """
    if images.dtype == torch.uint8 and images.shape[3] == 3:
        return images
    channels = [0, 1, 2] if images.shape[3] >= 3 else [0, 0, 0]
    values = images[..., channels].numpy().astype(np.float32)
    low, high = np.percentile(values, (2, 98), axis=(0, 1, 2))
    return torch.from_numpy((255 * (values - low) / np.maximum(high - low, 1e-12)).clip(0, 255).astype(np.uint8))


def mask_views(
    image: np.ndarray, context: Indices, targets: Iterable[Indices], patch: int, least: int = 160
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One image, what the context encoder sees of it, and the blocks to predict.

    image: uint8 (H, W, 3). context: patch indices (row-major over the grid). targets: M sequences of patch indices.
    Returns three uint8 (h, w, 3), enlarged: image, context patches on grey, target blocks each in a colour.
    """
    height, width = image.shape[:2]
    if height % patch or width % patch:
        raise ValueError(f"image: expected sides divisible by patch {patch}, got {height}x{width}")
    grid = (height // patch, width // patch)
    big, size = _enlarge(np.asarray(image), patch, least)
    seen = np.where(_patch_mask(context, grid, size)[..., None], big, 228)
    blocks = big * 0.35 + 255 * 0.65
    for number, target in enumerate(targets):
        colour = _rgb(COLOURS[number % len(COLOURS)])
        mask = _patch_mask(target, grid, size)
        blocks[mask] = 0.6 * big[mask] + 0.4 * colour
        blocks[_border(mask, max(1, big.shape[0] // 80))] = colour
    return big, seen.astype(np.uint8), blocks.astype(np.uint8)


def mask_tiles(
    image: np.ndarray, context: Indices, targets: Iterable[Indices], patch: int, least: int = 160
) -> np.ndarray:
    """The three of mask_views side by side: uint8 (h, 3*w + 2*gap, 3)."""
    image, seen, blocks = mask_views(image, context, targets, patch, least)
    gap = np.full((image.shape[0], max(4, image.shape[0] // 24), 3), 255, dtype=np.uint8)
    return np.concatenate([image, gap, seen, gap, blocks], axis=1)


def batch_masks(packed: MaskDraw) -> tuple[list[np.ndarray], np.ndarray]:
    """Patch indices within each image of a masks.packing.MaskDraw.

    Returns (the first context, a list of B arrays; the target blocks, (M, B, K)), int64.
    """
    ends = packed.context_cu_seqlens.numpy()[: packed.images + 1]
    context = packed.context_index.numpy()[: ends[-1]] % packed.patches
    return np.split(context, ends[1:-1]), packed.target_index.numpy() % packed.patches


def plot_masks(images: torch.Tensor, packed: MaskDraw, patch: int, path: Path, columns: int = 2) -> None:
    """Draw masks over images as a PNG: for each image the image, its (first) context, its target blocks.

    images: (b, H, W, C), the first b of the batch that packed, a MaskDraw, belongs to. patch: side of a patch, pixels.
    path: of the PNG to write. columns: images side by side.
    """
    from PIL import Image

    contexts, targets = batch_masks(packed)
    tiles = [mask_tiles(np.asarray(image), contexts[i], targets[:, i], patch) for i, image in enumerate(as_rgb(images))]
    height, width = tiles[0].shape[:2]
    columns = min(columns, len(tiles))
    rows = -(-len(tiles) // columns)
    margin = height // 8
    sheet = np.full((rows * (height + margin) + margin, columns * (width + 2 * margin), 3), 255, dtype=np.uint8)
    for i, tile in enumerate(tiles):
        top = margin + (i // columns) * (height + margin)
        left = margin + (i % columns) * (width + 2 * margin)
        sheet[top : top + height, left : left + width] = tile
    Image.fromarray(sheet).save(path)


def outlined(image: np.ndarray, mask: np.ndarray, colour: str, width: int) -> np.ndarray:
    """A copy of uint8 (h, w, 3) with the rim of a mask, bool (h, w), in a colour, "#rrggbb", `width` pixels."""
    framed = image.copy()
    framed[_border(mask, width)] = _rgb(colour).astype(np.uint8)
    return framed
