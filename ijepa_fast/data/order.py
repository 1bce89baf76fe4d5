"""The order of samples: an endless stream, the concatenation of one seeded permutation an epoch.

Position p of the stream is sample `permutation(p // n)[p % n]`. Step s of a run with global batch G takes positions
s*G to (s+1)*G, rank r the r-th part of them. So every epoch visits every sample exactly once whatever the number of
ranks, none is left out at an epoch's end, and the place to resume at is one number: the images seen.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

SHARDS_MIXED = 16


class SampleStream:
    """Sample ids by stream position, for `count` samples.

    groups: (count,) the shard of each sample, or None. With shards the shuffle has two levels: the shards are
    permuted, and samples mix within SHARDS_MIXED consecutive shards of that order, so that reading stays within few
    files at a time.
    """

    def __init__(self, count: int, seed: int, groups: np.ndarray | None = None):
        self.count, self.seed, self.groups = count, seed, groups
        self.permutation = lru_cache(maxsize=2)(self._permutation)

    def _permutation(self, epoch: int) -> np.ndarray:
        """(count,) the samples in the order of `epoch`."""
        rng = np.random.Generator(np.random.Philox(key=[self.seed % 2**64, epoch]))
        if self.groups is None:
            return rng.permutation(self.count)
        place = (rng.permutation(int(self.groups.max()) + 1) // SHARDS_MIXED).astype(np.uint64)
        # One stable sort: how an unstable one breaks ties depends on the CPU, and ranks must agree.
        key = place[self.groups] << np.uint64(44) | rng.integers(1 << 44, size=self.count, dtype=np.uint64)
        return np.argsort(key, kind="stable")

    def __getitem__(self, positions: np.ndarray) -> np.ndarray:
        """(B,) int64 sample ids at stream `positions` (B,)."""
        epochs, offsets = np.divmod(positions, self.count)
        ids = np.empty(len(positions), np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            ids[here] = self.permutation(int(epoch))[offsets[here]]
        return ids
