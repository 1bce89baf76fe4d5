"""Block masks and random subsets of patches, drawn from counter-based random numbers."""

from ijepa_fast.kernels.mask_sampler.ops import random_subset, sample_blocks
from ijepa_fast.kernels.mask_sampler.reference import BATCH, Key, below, words

__all__ = ["BATCH", "Key", "below", "random_subset", "sample_blocks", "words"]
