"""The order of samples: an endless stream, the concatenation of one seeded permutation an epoch.

Position p of the stream is sample `permutation(epoch p // n)[p % n]`. Step s of a run with global batch G takes the
positions s*G to (s+1)*G, rank r the r-th part of them. So every epoch visits every sample exactly once whatever the
number of ranks, no sample is left out at an epoch's end, and the place to resume at is one number: the images seen.
"""

from __future__ import annotations

import numpy as np


class SampleStream:
    """Sample ids by stream position, for `count` samples."""

    def __init__(self, count: int, seed: int):
        self.count, self.seed = count, seed
        self._epochs: dict[int, np.ndarray] = {}

    def permutation(self, epoch: int) -> np.ndarray:
        """(count,) the samples in the order of `epoch`; the last two asked for are kept."""
        if epoch not in self._epochs:
            while len(self._epochs) > 1:
                del self._epochs[min(self._epochs)]
            rng = np.random.Generator(np.random.Philox(key=[self.seed % 2**64, epoch]))
            self._epochs[epoch] = rng.permutation(self.count)
        return self._epochs[epoch]

    def __getitem__(self, positions: np.ndarray) -> np.ndarray:
        """(B,) int64 sample ids of increasing stream `positions` (B,)."""
        epochs, offsets = np.divmod(positions, self.count)
        ids = np.empty(len(positions), np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            ids[here] = self.permutation(int(epoch))[offsets[here]]
        return ids
