"""Masks -> packed index tensors: what every ragged stage of the step reads instead of a mask."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np
import torch

from ijepa_fast.kernels.mask_sampler import random_subset
from ijepa_fast.masks import Masks

POLICIES = ("full", "truncate", "budget")


@dataclass(frozen=True)
class PackedBatch:
    """Index tensors (int32) of a batch of B images of N patches, C contexts and M target blocks of K patches.

    Flat patch rows are image * N + patch. Context sequences are ordered (c, b), predictor sequences (m, c, b); a
    predictor sequence is the context tokens of (c, b) followed by the K mask tokens of (m, b), so predictions are
    ordered (m, c, b, k) as in the published code.
    """

    images: int
    contexts: int
    targets: int
    patches: int
    target_size: int
    context_index: torch.Tensor  # (T,) flat rows; patch order within a sequence is the mask's, row-major
    context_cu_seqlens: torch.Tensor  # (C*B + 1,)
    context_max_seqlen: int
    target_index: torch.Tensor  # (M, B, K) flat rows
    union_index: torch.Tensor  # (U,) sorted unique flat rows that are a target of any block
    union_cu_seqlens: torch.Tensor  # (B + 1,)
    union_max_seqlen: int
    target_in_union: torch.Tensor  # (M, B, K) position of each target row in union_index
    predictor_cu_seqlens: torch.Tensor  # (M*C*B + 1,)
    predictor_max_seqlen: int
    ladder: bool = False  # the networks pad their token counts up to a rung, see `climb`

    @property
    def tokens(self) -> int:
        """Tokens that pass through a network: target encoder, context encoder, predictor."""
        context = self.context_index.numel()
        masked = self.target_index.numel() * self.contexts
        return self.images * self.patches + context + self.targets * context + masked

    def _map(self, change) -> PackedBatch:
        tensors = {
            f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), torch.Tensor)
        }
        return replace(self, **{name: change(tensor) for name, tensor in tensors.items()})

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedBatch:
        """The same batch with its tensors on `device`."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PackedBatch:
        """The same batch with its tensors in pinned host memory."""
        return self._map(torch.Tensor.pin_memory)


def pack(masks: Masks, policy: str = "full", budget: int | None = None, ladder: bool = False) -> PackedBatch:
    """Pack a batch's masks under a context policy.

    full      every context patch is kept
    truncate  each context keeps its first patches, as many as the batch's shortest context has (the published collator)
    budget    each context keeps `budget` patches chosen at random. A context that has fewer keeps all it has, and what
              is missing goes to contexts with patches to spare, so the batch always has C * B * budget context tokens:
              static shapes (K still takes the few sizes of the sampler). The choice is a function of the masks' key, so
              a resumed run makes it again.

    With `ladder` the networks round their token counts up, at most by 0.8 %, so that few different ones occur and a
    caching allocator finds every size again after the first steps. Nothing else changes.

    Raises ValueError for an unknown policy, a missing budget, and a batch of fewer than C * B * budget context patches.
    """
    if policy not in POLICIES:
        raise ValueError(f"mask.policy: expected one of {', '.join(POLICIES)}, got {policy!r}")
    if (budget is not None) != (policy == "budget"):
        raise ValueError(
            f"mask.budget: expected a number of patches with mask.policy=budget and nothing otherwise, "
            f"got {budget} with mask.policy={policy}"
        )
    context = masks.context.numpy()
    if policy == "truncate":
        context = context & (np.cumsum(context, axis=-1, dtype=np.int32) <= context.sum(-1).min())
    elif policy == "budget":
        context = _budget(masks, context, budget)
    contexts, images, patches = context.shape
    rows = np.flatnonzero(context).astype(np.int32)
    if contexts > 1:
        rows %= images * patches
    packed = _assemble(rows, np.count_nonzero(context, axis=-1), masks.target.numpy(), patches)
    return replace(packed, ladder=ladder)


def rung(tokens: int) -> int:
    """`tokens` rounded up to eight significant bits, so by less than one in 128; there are 128 rungs a doubling."""
    step = 1 << max(0, tokens.bit_length() - 8)
    return -(-tokens // step) * step


def climb(cu_seqlens: torch.Tensor, tokens: int, max_seqlen: int) -> tuple[torch.Tensor, int]:
    """What brings `tokens` packed rows up to their rung: cu_seqlens with further sequences, and how many rows to add.

    The sequences are none longer than `max_seqlen`. No row of the others attends to them, so their content is free and
    what comes of them is dropped. Made from host integers alone: nothing waits for the device.
    """
    missing = rung(tokens) - tokens
    ends = torch.arange(1, -(-missing // max_seqlen) + 1, dtype=torch.int32, device=cu_seqlens.device)
    return torch.cat([cu_seqlens, tokens + (ends * max_seqlen).clamp_(max=missing)]), missing


def from_masks(context: torch.Tensor | np.ndarray, target: torch.Tensor | np.ndarray, patches: int) -> PackedBatch:
    """Pack explicit patch numbers in the published layout, context (C, B, Kc) and target (M, B, K), `patches` an image.

    The order of the patches within a context and a target is kept. Raises ValueError for a wrong shape and for a patch
    outside the image.
    """
    context, target = np.asarray(context), np.asarray(target)
    for name, mask in (("context", context), ("target", target)):
        if mask.ndim != 3 or mask.size == 0:
            raise ValueError(
                f"{name}: expected patch numbers of shape (masks, images, patches kept), got shape {mask.shape}"
            )
        if mask.min() < 0 or mask.max() >= patches:
            raise ValueError(f"{name}: expected patch numbers in [0, {patches}), got [{mask.min()}, {mask.max()}]")
    if context.shape[1] != target.shape[1]:
        raise ValueError(
            f"target: expected as many images as the context has, {context.shape[1]}, got {target.shape[1]}"
        )
    contexts, images, kept = context.shape
    rows = (context + np.arange(images)[:, None] * patches).astype(np.int32).ravel()
    return _assemble(rows, np.full((contexts, images), kept), target, patches)


def _budget(masks: Masks, context: np.ndarray, budget: int) -> np.ndarray:
    """Context (C, B, N) bool -> the same with C * B * budget patches kept, `budget` a context where it has them."""
    contexts, images, _ = context.shape
    available = np.count_nonzero(context, axis=-1).ravel()
    if budget < 1 or available.sum() < budget * available.size:
        raise ValueError(
            f"mask.budget: expected between 1 and the {available.mean():.1f} context patches an image has on average "
            f"in this batch, got {budget}; lower mask.budget"
        )
    count = np.minimum(available, budget)
    while missing := budget * count.size - count.sum():
        spare = np.flatnonzero(available > count)[:missing]
        count[spare] += 1
    counts = torch.from_numpy(count.astype(np.int32)).view(contexts, images)
    return np.stack([random_subset(masks.key, masks.context[c], counts[c], c).numpy() for c in range(contexts)])


def _assemble(context_rows: np.ndarray, lengths: np.ndarray, target: np.ndarray, patches: int) -> PackedBatch:
    """Flat context rows (T,) int32 in (c, b) order, their number a sequence (C, B), targets (M, B, K) patch numbers."""
    contexts, images = lengths.shape
    targets, _, size = target.shape
    target_rows = (target + np.arange(images, dtype=np.int32)[:, None] * patches).astype(np.int32)
    in_union = np.zeros(images * patches, dtype=bool)
    in_union[target_rows] = True
    union_lengths = np.count_nonzero(in_union.reshape(images, patches), axis=1)
    position = np.cumsum(in_union, dtype=np.int32) - 1
    sequences = np.tile(lengths.ravel() + size, targets)
    return PackedBatch(
        images=images,
        contexts=contexts,
        targets=targets,
        patches=patches,
        target_size=size,
        context_index=torch.from_numpy(context_rows),
        context_cu_seqlens=_cu_seqlens(lengths),
        context_max_seqlen=int(lengths.max()),
        target_index=torch.from_numpy(target_rows),
        union_index=torch.from_numpy(np.flatnonzero(in_union).astype(np.int32)),
        union_cu_seqlens=_cu_seqlens(union_lengths),
        union_max_seqlen=int(union_lengths.max()),
        target_in_union=torch.from_numpy(position[target_rows]),
        predictor_cu_seqlens=_cu_seqlens(sequences),
        predictor_max_seqlen=int(sequences.max()),
    )


def _cu_seqlens(lengths: np.ndarray) -> torch.Tensor:
    ends = np.zeros(lengths.size + 1, dtype=np.int32)
    np.cumsum(lengths.ravel(), out=ends[1:])
    return torch.from_numpy(ends)
