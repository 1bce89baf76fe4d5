"""mask_sampler: checks, dispatch and registration. csrc implements both schemas for the CPU, Triton for CUDA."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ijepa_fast.kernels.common import checks, native
from ijepa_fast.kernels.common.checks import check_tensor
from ijepa_fast.kernels.common.dispatch import choice, interpreted
from ijepa_fast.kernels.common.library import triton_launcher
from ijepa_fast.kernels.mask_sampler import cpu
from ijepa_fast.kernels.mask_sampler.reference import Key, Size

_KEY = "int seed, int step, int first"
native.register(
    f"sample_blocks_(Tensor(a!) context, Tensor(b!) target, {_KEY}, int[] grid, int[] target_size, int[] context_size, "
    "int min_keep, bool skip_last) -> ()",
    cpu,
)
native.register(
    f"random_subset_(Tensor(a!) subset, Tensor kept, Tensor count, {_KEY}, int draw) -> ()",
    cpu,
)


def sample_blocks(
    key: Key,
    batch: int,
    grid: Size,
    targets: int,
    target_size: Size,
    contexts: int,
    context_size: Size,
    min_keep: int,
    skip_last: bool,
    device: torch.device | str = "cpu",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Target blocks, and context blocks minus the union of the targets, for a batch of images (I-JEPA, section 3).

    Args:
        key: seed, step and first place, of which the masks are a function: the same on every device, bit for bit.
        batch: images, B.
        grid: patches of an image, (rows, columns).
        targets: target blocks per image, M.
        target_size: (height, width) of every target block, K patches.
        contexts: contexts per image, C.
        context_size: (height, width) of every context block.
        min_keep: a context keeps more patches than this: until it does, its block is drawn again, and after every 20
            failures one target fewer, from the last, is cut out of it.
        skip_last: leave out the last possible row and column of corners, as the published sampler does.
        device: where the masks are made.

    Returns:
        context (C, B, N) bool, the patches kept; target (M, B, K) int32, patch numbers in row-major order.

    Raises:
        ValueError: for a block that does not fit the grid, and a context block without more than min_keep patches.
    """
    for name, (h, w) in (("target_size", target_size), ("context_size", context_size)):
        if not (0 < h <= grid[0] - skip_last and 0 < w <= grid[1] - skip_last):
            limit = f"{grid[0] - skip_last}x{grid[1] - skip_last}"
            raise ValueError(f"sample_blocks: {name}: expected between 1x1 and {limit}, got {h}x{w}")
    if context_size[0] * context_size[1] <= min_keep:
        raise ValueError(
            f"sample_blocks: min_keep: expected less than the {context_size[0] * context_size[1]} patches of a context "
            f"block, got {min_keep}"
        )
    context = torch.empty(contexts, batch, grid[0] * grid[1], dtype=torch.bool, device=device)
    target = torch.empty(targets, batch, target_size[0] * target_size[1], dtype=torch.int32, device=device)
    _choose("sample_blocks_", context)(
        context, target, key.seed, key.step, key.first, grid, target_size, context_size, min_keep, skip_last
    )
    return context, target


def random_subset(key: Key, kept: torch.Tensor, count: torch.Tensor, draw: int = 0) -> torch.Tensor:
    """A random choice of each image's patches, all choices equally likely.

    Args:
        key: seed, step and first place, as for sample_blocks.
        kept: (B, N) bool, the patches to choose from.
        count: (B,) int32, how many of them, at most as many as there are.
        draw: numbers the independent choices of one batch.

    Returns:
        (B, N) bool.

    Raises:
        ValueError: for a wrong dtype, shape, device or layout; on the CPU and in debug mode for a count of more patches
            than there are.
    """
    check_tensor("random_subset", "kept", kept, (None, None), torch.bool)
    check_tensor("random_subset", "count", count, (kept.shape[0],), torch.int32, kept.device)
    _check_count(kept, count)
    subset = torch.empty_like(kept)
    _choose("random_subset_", kept)(subset, kept, count, key.seed, key.step, key.first, draw)
    return subset


def _check_count(kept: torch.Tensor, count: torch.Tensor) -> None:
    if not checks.debug and kept.device.type != "cpu":
        return
    available = kept.sum(1)
    wrong = ((count < 0) | (count > available)).nonzero()
    if len(wrong):
        image = int(wrong[0])
        raise ValueError(
            f"random_subset: count[{image}]: expected between 0 and the {int(available[image])} patches kept, "
            f"got {int(count[image])}"
        )


def _choose(name: str, tensor: torch.Tensor) -> Callable:
    """CUDA tensors are Triton's; so are the CPU's where 'triton' was asked for and its interpreter is on.

    Masks of a GPU run are made on the CPU as well, so 'triton' is no error there: csrc or NumPy serves them.
    """
    setting = choice("mask_sampler")
    if not tensor.is_cuda and setting == "triton" and interpreted():
        return triton_launcher(cpu, name)
    return getattr(cpu if setting == "reference" and not tensor.is_cuda else torch.ops.ijepa_fast, name)
