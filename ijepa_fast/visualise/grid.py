"""The picture: images, what the context encoder sees of them, and samples for a block and for another one."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageDraw

from ijepa_fast.report.plots import COLOURS, outlined
from ijepa_fast.visualise.checks import Samples
from ijepa_fast.visualise.conditions import Conditions

ROWS = 8
SIDE = 96  # pixels of a picture in the sheet, about
GAP, HEAD = 4, 16  # pixels between pictures, and of the words above them


def draw(conditions: Conditions, samples: Samples, kind: str) -> Image.Image:
    """The sheet: a row for each of the first images, at most ROWS. A frame is the block that a sample was drawn for."""
    height, width = conditions.images.shape[1:3]
    factor = max(1, round(SIDE / min(height, width)))
    groups = [("image", 1), ("context", 1), (f"{kind} of a block, other noises", samples.own.shape[1])]
    if samples.moved is not None:
        groups.append(("of another block, the same noises", samples.moved.shape[1]))
    rows = [_row(conditions, samples, row, factor) for row in range(min(ROWS, len(samples.own)))]
    sheet = Image.fromarray(np.concatenate(rows, 0))
    page = Image.new("RGB", (sheet.width, sheet.height + HEAD), "white")
    page.paste(sheet, (0, HEAD))
    pen, left = ImageDraw.Draw(page), 0
    for words, count in groups:
        pen.text((left + 1, 2), words, fill="black")
        left += count * (width * factor + GAP) + GAP
    return page


def _row(conditions: Conditions, samples: Samples, row: int, factor: int) -> np.ndarray:
    """uint8 (height, width, 3): the pictures of one image side by side, each with its gap."""
    image = conditions.images[row]
    seen = torch.where(conditions.pixels(conditions.context[row])[..., None], image, 228)
    own, other = (
        conditions.pixels(conditions.blocks[row, int(blocks[row])]) for blocks in (samples.blocks, samples.others)
    )
    groups: list[list[np.ndarray]] = [[_enlarged(image, factor)], [_framed(seen, factor, own, 0)]]
    groups.append([_framed(_bytes(sample), factor, own, 0) for sample in samples.own[row]])
    if samples.moved is not None:
        groups[1] = [outlined(groups[1][0], _enlarged(other, factor), COLOURS[1], 1)]
        groups.append([_framed(_bytes(sample), factor, other, 1) for sample in samples.moved[row]])
    gap = np.full((factor * image.shape[0] + GAP, GAP, 3), 255, np.uint8)
    parts = []
    for group in groups:
        parts += [*(np.pad(tile, ((0, GAP), (0, GAP), (0, 0)), constant_values=255) for tile in group), gap]
    return np.concatenate(parts, 1)


def _bytes(sample: torch.Tensor) -> torch.Tensor:
    """fp32 (3, h, w) in 0..1 -> uint8 (h, w, 3)."""
    return (255 * sample).round().byte().permute(1, 2, 0)


def _enlarged(array: torch.Tensor, factor: int) -> np.ndarray:
    return array.numpy().repeat(factor, 0).repeat(factor, 1)


def _framed(image: torch.Tensor, factor: int, mask: torch.Tensor, colour: int) -> np.ndarray:
    """The image enlarged, with the rim of a mask in a colour."""
    return outlined(_enlarged(image, factor), _enlarged(mask, factor), COLOURS[colour], 1)
