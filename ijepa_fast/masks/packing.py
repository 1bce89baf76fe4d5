"""Masks -> packed index tensors: what every ragged stage of the step reads instead of a mask.

All index arithmetic of a step is done here, on the host, ahead of the step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Self

import numpy as np
import torch

from ijepa_fast.kernels.mask_sampler import random_subset
from ijepa_fast.masks.draw import VARIES, Draw, int32
from ijepa_fast.masks.samplers import Masks
from ijepa_fast.masks.visible import visible_tokens

POLICIES = ("full", "truncate", "budget")


@dataclass(frozen=True)
class MaskDraw(Draw):
    """Index tensors (int32) of a batch of B images of N patches, C contexts and M target blocks of K patches.

    Flat patch rows are image * N + patch; places are patch numbers within an image. Context sequences are ordered
    (c, b), predictor sequences (m, c, b); a predictor sequence is the context tokens of (c, b) followed by the K mask
    tokens of (m, b), so predictions are ordered (m, c, b, k) as in the published code.

    With padding (see `pack`) there are E further context sequences, of which nothing comes: their rows are in
    context_index and, without mask tokens, behind each target block's sequences in the predictor; and the union holds
    a few rows that are no target. E is 0 otherwise.

    With several mask sets an image has S sets of contexts and targets: B images are S*B to the context's and the
    predictor's sequences, set by set, and B to the union of their targets.
    """

    contexts: int  # C
    targets: int  # M
    patches: int  # N
    target_size: int  # K
    context_tokens: int = field(metadata=VARIES)  # of the images' contexts, without padding
    context_index: torch.Tensor  # (T,) flat rows; patch order within a sequence is the mask's, row-major
    context_places: torch.Tensor  # (T,) places of the same
    context_cu_seqlens: torch.Tensor  # (C*B + E + 1,)
    context_max_seqlen: int
    target_index: torch.Tensor  # (M, S*B, K) flat rows
    dense_cu_seqlens: torch.Tensor  # (B + 1,) of whole images: 0, N, 2N, ...
    union_index: torch.Tensor  # (U,) sorted unique flat rows, among them all that are a target of any block
    union_places: torch.Tensor  # (U,) places of the same
    union_lengths: torch.Tensor  # (B,) rows of the union in each image
    union_cu_seqlens: torch.Tensor  # (B + 1,)
    union_max_seqlen: int
    prediction_rows: torch.Tensor  # (M*C*B*K,) the row of the union that each prediction is compared with
    predictor_cu_seqlens: torch.Tensor  # (M*(C*B + E) + 1,)
    predictor_max_seqlen: int
    predictor_query_cu_seqlens: torch.Tensor  # (M*(C*B + E) + 1,) of the mask tokens alone: K a sequence, 0 of padding
    sets: int = field(default=1, kw_only=True)  # S
    directions: torch.Tensor | None = field(default=None, kw_only=True)  # (width, K) fp32, of SIGReg
    channels: torch.Tensor | None = field(default=None, kw_only=True)  # (B, channels) bool, those that contexts see
    features: torch.Tensor | None = field(default=None, kw_only=True)  # (U, D) targets that were computed before
    # Of a loss on visible tokens, see masks/visible.py; T counts padding.
    visible_rows: torch.Tensor | None = field(default=None, kw_only=True)  # (M*T,) rows of the predictor's tokens
    visible_targets: torch.Tensor | None = field(default=None, kw_only=True)  # (M*T,) rows of the union
    visible_weights: torch.Tensor | None = field(default=None, kw_only=True)  # (M*T,) fp32
    visible_scale: torch.Tensor | None = field(default=None, kw_only=True)  # () fp32, of the loss in this step

    @property
    def sequences(self) -> int:
        """Context sequences of the images, C*S*B: those behind them are padding."""
        return self.contexts * self.sets * self.images

    @property
    def by_set(self) -> Self:
        """The same draw as the predictor sees it, where an image with S mask sets is S images."""
        return self if self.sets == 1 else replace(self, images=self.sets * self.images, sets=1)

    @property
    def context_lengths(self) -> torch.Tensor:
        """(C*S*B,) tokens of each context."""
        return self.context_cu_seqlens[: self.sequences + 1].diff()

    @property
    def tokens(self) -> int:
        """Tokens that pass through a network, without padding: target encoder, context encoder, predictor."""
        masked = self.target_index.numel() * self.contexts
        whole = 0 if self.features is not None else self.images * self.patches
        return whole + (1 + self.targets) * self.context_tokens + masked


def whole_groups(first: int, last: int, batch: int, group: int | None) -> tuple[int, int]:
    """The places of the groups that the images `first` to `last` of `batch` are in: from the first's to the last's end.

    group: images of a group, counted from place 0; None: all images of the step are one.
    """
    group = group or batch
    return first // group * group, min(batch, -(-last // group) * group)


def pack(
    masks: Masks | Sequence[Masks],
    policy: str = "full",
    budget: int | None = None,
    padding: bool | tuple[int, int] = False,
    group: int | None = None,
    part: slice = slice(None),  # noqa: B008 (immutable)
    grid: tuple[int, int] | None = None,
) -> MaskDraw:
    """Pack masks under a context policy.

    full      every context patch is kept
    truncate  each context keeps its first patches, as many as the group's shortest context has (the published collator,
              whose group is a rank's batch)
    budget    each context keeps `budget` patches chosen at random. A context that has fewer keeps all it has, and what
              is missing goes to contexts of the group with patches to spare, so a group always has budget tokens a
              context: static shapes (K still takes the few sizes of the sampler) where groups divide a micro-batch. The
              choice is a function of the masks' key, so a resumed run makes it again.

    group: images that are compared with each other, None: all of `masks`, which begin with a group. part: the images
    that are packed. So a rank's part of a step is the same whatever the number of ranks (see whole_groups).

    With `padding` token counts are rounded up to padding buckets, at most by 0.8 % where they cost much, or by 15
    tokens, and greatest lengths to a multiple of LENGTHS. Few different shapes occur then: a caching allocator finds
    every size again after the first steps, oneDNN every product, and a CUDA graph is captured once for many batches. No
    loss and no gradient changes. A pair for `padding` are other buckets than TOKEN_BITS, UNION_BITS.

    Several masks are as many mask sets of the same images, whose contexts the policy compares set by set.

    grid: rows and columns of patches, for a loss on visible tokens: they are targets too then (masks/visible.py).

    Raises ValueError for an unknown policy, a missing budget, and a group of fewer than `budget` patches a context.
    """
    if policy not in POLICIES:
        raise ValueError(f"mask.policy: expected one of {', '.join(POLICIES)}, got {policy!r}")
    if (budget is not None) != (policy == "budget"):
        raise ValueError(
            f"mask.budget: expected a number of patches with mask.policy=budget and nothing otherwise, "
            f"got {budget} with mask.policy={policy}"
        )
    sets = [masks] if isinstance(masks, Masks) else masks
    context = np.concatenate([_kept(each, policy, budget, group)[:, part] for each in sets], axis=1)
    target = np.concatenate([each.target.numpy()[:, part] for each in sets], axis=1)
    contexts, images, patches = context.shape
    rows = np.flatnonzero(context).astype(np.int32)
    if contexts > 1:
        rows %= images * patches
    bits = None
    if padding:
        tokens, unions = padding if isinstance(padding, tuple) else (TOKEN_BITS, UNION_BITS)
        static = budget is not None and len(rows) == contexts * images * budget
        bits = 0 if static else tokens, unions
    return assemble(rows, np.count_nonzero(context, axis=-1), target, patches, bits, len(sets), grid)


def _kept(masks: Masks, policy: str, budget: int | None, group: int | None) -> np.ndarray:
    """(C, B, N) bool: what the policy keeps of the contexts."""
    context = masks.context.numpy()
    lengths = np.count_nonzero(context, axis=-1)
    if policy == "truncate":
        shortest = _by_group(lambda lengths: np.full_like(lengths, lengths.min()), lengths, group)
        return context & (np.cumsum(context, axis=-1, dtype=np.int32) <= shortest[..., None])
    if budget is not None:
        return _choose(masks, _by_group(partial(_shares, budget=budget), lengths, group))
    return context


# Padding buckets: significant bits of the context's and the union's size. The target encoder's last block alone sees
# the union, so that its buckets may be wider.
TOKEN_BITS, UNION_BITS = 8, 5
# Each size is a CUDA graph: of 128 images and full contexts 112 in 3,000 steps, instead of 288, for 1.1 % more context.
GRAPH_BITS = 6, 4
LEAST_STEP = 16  # rows of a tile: fewer cost as much
LENGTHS = 64  # a multiple of the kernels' tiles


def bucket_of(tokens: int, bits: int = TOKEN_BITS) -> int:
    """`tokens` rounded up to that many significant bits: with eight, by less than one in 128; and to LEAST_STEP."""
    return _round_up(tokens, _step(tokens, bits))


def _step(tokens: int, bits: int) -> int:
    return max(LEAST_STEP, 1 << max(0, tokens.bit_length() - bits)) if bits else 1


def _by_group(rule: Callable[[np.ndarray], np.ndarray], lengths: np.ndarray, group: int | None) -> np.ndarray:
    """What `rule` makes of the lengths (C, G) of the contexts of each group, side by side again: (C, B)."""
    group = group or lengths.shape[1]
    starts = range(0, lengths.shape[1], group)
    return np.concatenate([rule(lengths[:, start : start + group]) for start in starts], axis=1)


def _shares(available: np.ndarray, budget: int) -> np.ndarray:
    """Patches to keep of those `available` (C, G): `budget` in each context that has them, C * G * budget in all."""
    if budget < 1 or available.sum() < budget * available.size:
        raise ValueError(
            f"mask.budget: expected between 1 and the group's {available.mean():.1f} context patches per image, got "
            f"{budget}; lower mask.budget"
        )
    count = np.minimum(available, budget)
    while missing := budget * count.size - count.sum():
        spare = np.flatnonzero(available > count)[:missing]
        count.flat[spare] += 1
    return count


def _choose(masks: Masks, count: np.ndarray) -> np.ndarray:
    """(C, B, N) bool: `count` (C, B) of each context's patches, at random."""
    counts = torch.from_numpy(count.astype(np.int32))
    chosen = [random_subset(masks.key, of, counts[c], c).numpy() for c, of in enumerate(masks.context)]
    return np.stack(chosen)


def assemble(
    context_rows: np.ndarray,
    lengths: np.ndarray,
    target: np.ndarray,
    patches: int,
    bits: tuple[int, int] | None = None,
    sets: int = 1,
    grid: tuple[int, int] | None = None,
) -> MaskDraw:
    """The draw of explicit patches.

    Args:
        context_rows: (T,) int32 flat rows in (c, b) order.
        lengths: (C, B) their number in each sequence.
        target: (M, B, K) patch numbers of the target blocks.
        patches: N.
        bits: significant bits (0: all) of the context's and of the union's size; without them nothing is padded.
        sets: S, mask sets of an image; its sequences lie B apart in the arguments, and so do its rows.
        grid: see `pack`.
    """
    contexts, parts = lengths.shape
    images = parts // sets
    targets, _, size = target.shape
    target_rows = (target + np.arange(parts, dtype=np.int32)[:, None] % images * patches).astype(np.int32)
    if sets > 1:
        context_rows = context_rows % (images * patches)
    in_union = np.zeros(images * patches, dtype=bool)
    in_union[target_rows] = True
    if grid is not None:
        in_union[context_rows] = True
    visible, longest, tokens, padding = context_rows, int(lengths.max()), len(context_rows), np.zeros(0, dtype=int)
    if bits is not None:
        longest = min(_round_up(longest, LENGTHS), patches)
        _widen(in_union, bits[1])
        padding = _padding(tokens, longest, bits[0])
        context_rows = np.pad(context_rows, (0, padding.sum()))
    union_rows = np.flatnonzero(in_union)
    union_lengths = np.count_nonzero(in_union.reshape(images, patches), axis=1)
    union_longest = int(union_lengths.max())
    position = np.cumsum(in_union, dtype=np.int32) - 1
    predictions = np.broadcast_to(position[target_rows][:, None], (targets, contexts, parts, size))
    queries = np.concatenate([np.full(contexts * parts, size), np.zeros_like(padding)])
    more = {}
    if grid is not None:
        more = visible_tokens(visible, lengths, target, position, int(padding.sum()), grid)
    return MaskDraw(
        images=images,
        contexts=contexts,
        targets=targets,
        patches=patches,
        target_size=size,
        sets=sets,
        context_tokens=tokens,
        context_index=torch.from_numpy(context_rows),
        context_places=int32(context_rows % patches),
        context_cu_seqlens=cu_seqlens(np.concatenate([lengths.ravel(), padding])),
        context_max_seqlen=longest,
        target_index=torch.from_numpy(target_rows),
        dense_cu_seqlens=cu_seqlens(np.full(images, patches)),
        union_index=int32(union_rows),
        union_places=int32(union_rows % patches),
        union_lengths=int32(union_lengths),
        union_cu_seqlens=cu_seqlens(union_lengths),
        union_max_seqlen=union_longest if bits is None else min(_round_up(union_longest, LENGTHS), patches),
        prediction_rows=int32(predictions.reshape(-1)),
        predictor_cu_seqlens=cu_seqlens(np.tile(np.concatenate([lengths.ravel() + size, padding]), targets)),
        predictor_max_seqlen=longest + size,
        predictor_query_cu_seqlens=cu_seqlens(np.tile(queries, targets)),
        **more,
    )


def cu_seqlens(lengths: np.ndarray) -> torch.Tensor:
    """Where sequences of `lengths` begin and end: (n + 1,) int32, 0 first."""
    ends = np.zeros(lengths.size + 1, dtype=np.int32)
    np.cumsum(lengths.ravel(), out=ends[1:])
    return torch.from_numpy(ends)


def _round_up(length: int, step: int) -> int:
    return -(-length // step) * step


def _padding(tokens: int, longest: int, bits: int) -> np.ndarray:
    """(E,) lengths, some 0, of sequences that fill the bucket of `tokens`; E is the same for all of one bucket."""
    total = bucket_of(tokens, bits)
    most = _step(total, bits) - 1
    ends = np.minimum(np.arange(-(-most // longest) + 1) * longest, total - tokens)
    return np.diff(ends)


def _widen(in_union: np.ndarray, bits: int) -> None:
    """Add rows from all over the batch until their number fills a bucket."""
    size = int(np.count_nonzero(in_union))
    others = np.flatnonzero(~in_union)
    missing = min(bucket_of(size, bits) - size, len(others))
    in_union[others[np.arange(missing) * len(others) // max(missing, 1)]] = True
