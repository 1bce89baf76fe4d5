"""The order of samples: an endless stream, which is one seeded permutation per epoch after the other.

Position p of the stream is the sample `permutation(p // n)[p % n]`, where n is the number of samples. Step s of a run
with global batch G takes the positions s*G to (s+1)*G, and rank r takes the r-th part of them. So every epoch visits
every sample exactly once on any number of ranks, no sample is left out at the end of an epoch, and one number says
where to resume: how many images have been seen.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

SHARDS_MIXED = 16


class SampleStream:
    """The stream of `count` samples, by position.

    groups: (count,) integers, the shard of each sample; None for loose files. With shards, the shuffle has two levels:
    the shards are permuted, and samples are mixed within SHARDS_MIXED shards that follow each other in that order. So
    few files are read at a time.
    """

    def __init__(self, count: int, seed: int, groups: np.ndarray | None = None):
        self.count, self.seed, self.groups = count, seed, groups
        self.permutation = lru_cache(maxsize=2)(self._permutation)

    def _permutation(self, epoch: int) -> np.ndarray:
        """The samples in the order of `epoch`: int64 (count,)."""
        rng = np.random.Generator(np.random.Philox(key=[self.seed % 2**64, epoch]))
        if self.groups is None:
            return rng.permutation(self.count)
        place = (rng.permutation(int(self.groups.max()) + 1) // SHARDS_MIXED).astype(np.uint64)
        # A stable sort: how an unstable one orders equal keys depends on the CPU, and all ranks must agree.
        key = place[self.groups] << np.uint64(44) | rng.integers(1 << 44, size=self.count, dtype=np.uint64)
        return np.argsort(key, kind="stable")

    def __getitem__(self, positions: np.ndarray) -> np.ndarray:
        """Sample ids, int64 (B,), at these positions of the stream, (B,)."""
        epochs, offsets = np.divmod(positions, self.count)
        ids = np.empty(len(positions), np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            ids[here] = self.permutation(int(epoch))[offsets[here]]
        return ids
