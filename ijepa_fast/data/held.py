"""Data sets that a program hands over as objects: each gets a name, as a configuration can only hold names."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np


class Arrays:
    """An array of images, the first axis counting them, as a data set. One label for each may be given."""

    thread_safe = True

    def __init__(self, images: Any, targets: Any = None):
        self.images = images
        if targets is not None:
            self.targets = targets

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        return self.images[index]


def hold(dataset: Any, name: str = "data") -> str:
    """The name, for `data.source`, under which this process finds `dataset`: an array (N, ...) or what datasets.py
    says.

    The same name for another data set replaces what was there.
    """
    setattr(sys.modules[__name__], name, Arrays(dataset) if isinstance(dataset, np.ndarray) else dataset)
    return f"{__name__}:{name}"
