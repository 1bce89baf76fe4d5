"""Photographs of solar cells by electroluminescence: 2,624 of 300 x 300 pixels, grey, with the share that is defective.

    pip install elpv-dataset
    ijepa-fast train --config examples/elpv.yaml

The photographs (Buerhop-Lutz et al. 2018, Deitsch et al. 2019) are CC BY-NC-SA and no part of this project. The
configuration names the two functions below as its images, and as those of its probes: every fifth cell is a test cell,
and a cell counts as defective from one half on.
"""

from __future__ import annotations

import numpy as np
from elpv_dataset.utils import load_dataset

from ijepa_fast.data.held import Arrays

EVERY = 5


def _cells(test: bool) -> Arrays:
    images, share, _ = load_dataset()
    chosen = (np.arange(len(images)) % EVERY == 0) == test
    cells = Arrays(images[chosen], (share[chosen] >= 0.5).astype(int))
    cells.classes = ["sound", "defective"]
    return cells


def train() -> Arrays:
    """Four fifths of the cells: uint8 (300, 300) each."""
    return _cells(test=False)


def test() -> Arrays:
    """The others."""
    return _cells(test=True)
