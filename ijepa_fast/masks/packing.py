"""Masks -> packed index tensors: what every ragged stage of the step reads instead of a mask."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np
import torch

from ijepa_fast.kernels.mask_sampler import random_subset
from ijepa_fast.masks.samplers import Masks

POLICIES = ("full", "truncate", "budget")


@dataclass(frozen=True)
class PackedBatch:
    """Index tensors (int32) of a batch of B images of N patches, C contexts and M target blocks of K patches.

    Flat patch rows are image * N + patch. Context sequences are ordered (c, b), predictor sequences (m, c, b); a
    predictor sequence is the context tokens of (c, b) followed by the K mask tokens of (m, b), so predictions are
    ordered (m, c, b, k) as in the published code.

    On the ladder (see `pack`) there are E further context sequences, of which nothing comes: their rows are in
    context_index and, without mask tokens, behind each target block's sequences in the predictor; and the union holds
    a few rows that are no target. E is 0 otherwise.
    """

    images: int
    contexts: int
    targets: int
    patches: int
    target_size: int
    context_tokens: int  # of the images' contexts, without padding
    context_index: torch.Tensor  # (T,) flat rows; patch order within a sequence is the mask's, row-major
    context_cu_seqlens: torch.Tensor  # (C*B + E + 1,)
    context_max_seqlen: int
    target_index: torch.Tensor  # (M, B, K) flat rows
    union_index: torch.Tensor  # (U,) sorted unique flat rows, among them all that are a target of any block
    union_cu_seqlens: torch.Tensor  # (B + 1,)
    union_max_seqlen: int
    target_in_union: torch.Tensor  # (M, B, K) position of each target row in union_index
    predictor_cu_seqlens: torch.Tensor  # (M*(C*B + E) + 1,)
    predictor_max_seqlen: int

    @property
    def sequences(self) -> int:
        """Context sequences of the images, C*B: those behind them are padding."""
        return self.contexts * self.images

    @property
    def context_lengths(self) -> torch.Tensor:
        """(C*B,) tokens of each context."""
        return self.context_cu_seqlens[: self.sequences + 1].diff()

    @property
    def tokens(self) -> int:
        """Tokens that pass through a network, without padding: target encoder, context encoder, predictor."""
        masked = self.target_index.numel() * self.contexts
        return self.images * self.patches + (1 + self.targets) * self.context_tokens + masked

    @property
    def shape(self) -> tuple:
        """All that the step's kernels are launched with, apart from values in tensors."""
        values = (getattr(self, f.name) for f in fields(self) if f.name != "context_tokens")
        return tuple(x.shape if isinstance(x, torch.Tensor) else x for x in values)

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The index tensors by name."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}

    def map(self, change) -> PackedBatch:
        """The same batch with `change` made to every tensor."""
        return replace(self, **{name: change(tensor) for name, tensor in self.tensors.items()})

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedBatch:
        """The same batch with its tensors on `device`."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PackedBatch:
        """The same batch with its tensors in pinned host memory."""
        return self.map(torch.Tensor.pin_memory)


def pack(masks: Masks, policy: str = "full", budget: int | None = None, ladder: bool = False) -> PackedBatch:
    """Pack a batch's masks under a context policy.

    full      every context patch is kept
    truncate  each context keeps its first patches, as many as the batch's shortest context has (the published collator)
    budget    each context keeps `budget` patches chosen at random. A context that has fewer keeps all it has, and what
              is missing goes to contexts with patches to spare, so the batch always has C * B * budget context tokens:
              static shapes (K still takes the few sizes of the sampler). The choice is a function of the masks' key, so
              a resumed run makes it again.

    With `ladder` token counts are rounded up, at most by 0.8 % where they cost much, and greatest lengths to a multiple
    of LENGTHS, so that few different shapes occur: a caching allocator finds every size again after the first steps,
    and a CUDA graph is captured once for many batches. No loss and no gradient changes.

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
    rungs = None
    if ladder:
        rungs = (0 if policy == "budget" else TOKEN_BITS), UNION_BITS
    return _assemble(rows, np.count_nonzero(context, axis=-1), masks.target.numpy(), patches, rungs)


# The ladder: significant bits of the context's and the union's size. The target encoder's last block alone sees the
# union, so that its rungs may be wider.
TOKEN_BITS, UNION_BITS = 8, 5
LENGTHS = 64  # a multiple of the kernels' tiles


def rung(tokens: int, bits: int = TOKEN_BITS) -> int:
    """`tokens` rounded up to that many significant bits: with eight, by less than one in 128."""
    step = _step(tokens, bits)
    return -(-tokens // step) * step


def _step(tokens: int, bits: int) -> int:
    return 1 << max(0, tokens.bit_length() - bits) if bits else 1


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


def _assemble(context_rows, lengths, target, patches: int, rungs: tuple[int, int] | None = None) -> PackedBatch:
    """Flat context rows (T,) int32 in (c, b) order, their number a sequence (C, B), targets (M, B, K) patch numbers.

    rungs: significant bits (0: all) of the context's and of the union's size; without them nothing is padded.
    """
    contexts, images = lengths.shape
    targets, _, size = target.shape
    target_rows = (target + np.arange(images, dtype=np.int32)[:, None] * patches).astype(np.int32)
    in_union = np.zeros(images * patches, dtype=bool)
    in_union[target_rows] = True
    longest, tokens, padding = int(lengths.max()), len(context_rows), np.zeros(0, dtype=int)
    if rungs is not None:
        longest = min(_round_up(longest), patches)
        _widen(in_union, rungs[1])
        padding = _padding(tokens, longest, rungs[0])
        context_rows = np.pad(context_rows, (0, padding.sum()))
    union_lengths = np.count_nonzero(in_union.reshape(images, patches), axis=1)
    union_longest = int(union_lengths.max())
    position = np.cumsum(in_union, dtype=np.int32) - 1
    return PackedBatch(
        images=images,
        contexts=contexts,
        targets=targets,
        patches=patches,
        target_size=size,
        context_tokens=tokens,
        context_index=torch.from_numpy(context_rows),
        context_cu_seqlens=_cu_seqlens(np.concatenate([lengths.ravel(), padding])),
        context_max_seqlen=longest,
        target_index=torch.from_numpy(target_rows),
        union_index=torch.from_numpy(np.flatnonzero(in_union).astype(np.int32)),
        union_cu_seqlens=_cu_seqlens(union_lengths),
        union_max_seqlen=union_longest if rungs is None else min(_round_up(union_longest), patches),
        target_in_union=torch.from_numpy(position[target_rows]),
        predictor_cu_seqlens=_cu_seqlens(np.tile(np.concatenate([lengths.ravel() + size, padding]), targets)),
        predictor_max_seqlen=longest + size,
    )


def _round_up(length: int) -> int:
    return -(-length // LENGTHS) * LENGTHS


def _padding(tokens: int, longest: int, bits: int) -> np.ndarray:
    """(E,) lengths, some 0, of sequences that bring `tokens` to their rung; E is the same for all of one rung."""
    total = rung(tokens, bits)
    most = _step(total, bits) - 1
    ends = np.minimum(np.arange(-(-most // longest) + 1) * longest, total - tokens)
    return np.diff(ends)


def _widen(in_union: np.ndarray, bits: int) -> None:
    """Add rows from all over the batch until there are a rung's number of them."""
    size = int(np.count_nonzero(in_union))
    others = np.flatnonzero(~in_union)
    missing = min(rung(size, bits) - size, len(others))
    in_union[others[np.arange(missing) * len(others) // max(missing, 1)]] = True


def _cu_seqlens(lengths: np.ndarray) -> torch.Tensor:
    ends = np.zeros(lengths.size + 1, dtype=np.int32)
    np.cumsum(lengths.ravel(), out=ends[1:])
    return torch.from_numpy(ends)
