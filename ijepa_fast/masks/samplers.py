"""Mask strategies: which patches of an image are context and which are target blocks.

`make_sampler(strategy, grid, **options)` gives a sampler; `sampler(batch, seed, step, first)` gives the masks of the
images that have the places `first` to `first + batch` among all images of a step, over all ranks and micro-batches. The
masks of an image are a function of (seed, step, its place); sizes of blocks of (seed, step), as the published collator
draws the same on all ranks, so that targets are a rectangular array.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

from ijepa_fast.config import ConfigError

if TYPE_CHECKING:  # masks that do not fit are to be said before torch is imported, which what draws them needs
    import torch

    from ijepa_fast.kernels.mask_sampler import Key

POLICY = ("policy", "budget", "padding", "group")  # keys of the section `mask` that no sampler has
HIDDEN_SHARE = 0.5  # of the channels, under strategy=channels
Range = tuple[float, float]
Size = tuple[int, int]


@dataclass(frozen=True)
class Masks:
    """The masks of one batch, on the CPU, and the key they are a function of."""

    context: torch.Tensor  # (C, B, N) bool: the patches of each context, before any policy of packing.pack
    target: torch.Tensor  # (M, B, K) int32: patch numbers of each target block, row-major
    key: Key


def make_sampler(strategy: str, grid: Size, **options: Any) -> Sampler:
    """The sampler of a strategy for a grid of (rows, columns) patches; an option that is None takes its default.

    multiblock-reference  the published sampler's distribution: one number sets a block's scale and aspect, and no block
                          touches the last row or column
    multiblock            scale and aspect independent, every patch reachable
    rasterized            quadrants: one is the context, three are targets
    block                 one large target block, the context is its complement
    random                a random set of patches is the target, the context is its complement
    channels              multiblock; and the method hides channels of each image from the context

    Three of them are the paper's ablations (table 6). module:function is somebody else's, see foreign.py. Raises
    ValueError, naming the config key, for a strategy or an option that does not exist and for masks that cannot be
    drawn on the grid.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if ":" in strategy:
        from ijepa_fast.masks.foreign import Foreign  # which is held to what is here

        return Foreign(strategy, grid, given)
    if strategy not in STRATEGIES:
        raise ValueError(f"mask.strategy: expected one of {', '.join(STRATEGIES)}, got {strategy!r}")
    cls, fixed = STRATEGIES[strategy]
    known = {f.name for f in fields(cls)} - {"grid"} - set(fixed)
    for name in given:
        if name not in known:
            raise ValueError(
                f"mask.{name}: has no meaning for mask.strategy={strategy}; remove it "
                f"(the options are {', '.join(sorted(known)) or 'none'})"
            )
    return cls(grid=(int(grid[0]), int(grid[1])), **given, **fixed)


@dataclass(frozen=True)
class MultiBlock:
    """`targets` blocks, and `contexts` large blocks less all targets (I-JEPA, section 3 and figure 4).

    Scales are shares of the image's patches, aspects are height over width, both ranges; a context's aspect is in units
    of the grid's, for it covers most of the image, whatever its shape. A context keeps more than
    `min_keep` patches; kernels.mask_sampler.sample_blocks says what happens when a draw does not. `published` gives the
    published code's distribution instead of the paper's.
    """

    grid: Size
    targets: int = 4
    target_scale: Range = (0.15, 0.2)
    target_aspect: Range = (0.75, 1.5)
    contexts: int = 1
    context_scale: Range = (0.85, 1.0)
    context_aspect: Range = (1.0, 1.0)
    min_keep: int = 10
    published: bool = False

    def __post_init__(self) -> None:
        _check_grid(self.grid)
        _check_count("targets", self.targets, 1)
        _check_count("contexts", self.contexts, 1)
        _check_count("min_keep", self.min_keep, 0)
        for kind in ("target", "context"):
            sizes = self._sizes(kind)
            for h, w in sizes:
                _check_block(kind, h, w, self.grid)
            smallest = min(h * w for h, w in sizes)
            # The published sampler also asks this of its targets, and would draw them for ever.
            if (kind == "context" or self.published) and smallest <= self.min_keep:
                raise ValueError(
                    f"mask.min_keep: expected less than the {smallest} patches of the smallest {kind} block on the "
                    f"{_name(self.grid)} grid, got {self.min_keep}; lower mask.min_keep, or raise mask.{kind}_scale or "
                    "data.crop"
                )

    @property
    def target_sizes(self) -> list[Size]:
        """Every (height, width) a target block can have."""
        return self._sizes("target")

    def __call__(self, batch: int, seed: int, step: int, first: int = 0) -> Masks:
        """Masks of `batch` images."""
        key = _key(batch, seed, step, first)
        numbers = _batch_numbers(key)
        from ijepa_fast.kernels.mask_sampler import sample_blocks

        context, target = sample_blocks(
            key,
            batch,
            self.grid,
            self.targets,
            self._size("target", *numbers[:2]),
            self.contexts,
            self._size("context", *numbers[2:]),
            self.min_keep,
            self.published,
        )
        return Masks(context, target, key)

    def _size(self, kind: str, for_scale: float, for_aspect: float) -> Size:
        """Two numbers in [0, 1] -> the block's (height, width); the published sampler uses the first for both."""
        if self.published:
            for_aspect = for_scale
        scale, aspect = (
            _between(getattr(self, f"{kind}_{what}"), u) for what, u in (("scale", for_scale), ("aspect", for_aspect))
        )
        if kind == "context":
            aspect *= self.grid[0] / self.grid[1]
        h, w = _block_size(self.grid, scale, aspect)
        if self.published:
            h, w = min(h, self.grid[0] - 1), min(w, self.grid[1] - 1)
        return h, w

    def _sizes(self, kind: str) -> list[Size]:
        _check_range(f"{kind}_scale", getattr(self, f"{kind}_scale"), 1.0)
        _check_range(f"{kind}_aspect", getattr(self, f"{kind}_aspect"), math.inf)
        steps = _steps(2048 if self.published else 128)
        return sorted({self._size(kind, u, v) for u in steps for v in (steps[:1] if self.published else steps)})


@dataclass(frozen=True)
class Block:
    """One target block of `target_scale` x `target_aspect`; the context is its complement (I-JEPA, table 6)."""

    grid: Size
    target_scale: Range = (0.6, 0.6)
    target_aspect: Range = (0.75, 1.5)

    def __post_init__(self) -> None:
        _check_grid(self.grid)
        _check_range("target_scale", self.target_scale, 1.0)
        _check_range("target_aspect", self.target_aspect, math.inf)
        for h, w in self.target_sizes:
            _check_block("target", h, w, self.grid)
            if (h, w) == self.grid:
                raise ValueError(
                    f"mask.target_scale: expected target blocks smaller than the {_name(self.grid)} grid, "
                    f"got up to {self.target_scale[1]}; lower it"
                )

    @property
    def target_sizes(self) -> list[Size]:
        """Every (height, width) a target block can have."""
        steps = _steps(128)
        return sorted(
            {
                _block_size(self.grid, _between(self.target_scale, u), _between(self.target_aspect, v))
                for u in steps
                for v in steps
            }
        )

    def __call__(self, batch: int, seed: int, step: int, first: int = 0) -> Masks:
        """Masks of `batch` images: M = C = 1."""
        key = _key(batch, seed, step, first)
        numbers = _batch_numbers(key)
        size = _block_size(self.grid, _between(self.target_scale, numbers[0]), _between(self.target_aspect, numbers[1]))
        from ijepa_fast.kernels.mask_sampler import sample_blocks

        context, target = sample_blocks(key, batch, self.grid, 1, size, 1, self.grid, 0, False)
        return Masks(context, target, key)


@dataclass(frozen=True)
class Rasterized:
    """Quadrants: one, at random per image, is the context, the other three are targets (I-JEPA, table 6)."""

    grid: Size

    def __post_init__(self) -> None:
        _check_grid(self.grid)
        if self.grid[0] % 2 or self.grid[1] % 2:
            raise ValueError(
                f"mask.strategy: rasterized needs an even number of patches along a side, got the "
                f"{_name(self.grid)} grid; change data.crop or the patch size"
            )

    def __call__(self, batch: int, seed: int, step: int, first: int = 0) -> Masks:
        """Masks of `batch` images: M = 3, C = 1, a quarter of the patches each."""
        key = _key(batch, seed, step, first)
        import numpy as np
        import torch

        from ijepa_fast.kernels.mask_sampler import below, words

        height, width = self.grid
        patch = np.arange(height * width, dtype=np.int32).reshape(2, height // 2, 2, width // 2)
        quadrants = patch.transpose(0, 2, 1, 3).reshape(4, -1)
        chosen = below(words(key, np.arange(batch), 0)[0], 4)
        context = np.zeros((1, batch, height * width), dtype=bool)
        context[0, np.arange(batch)[:, None], quadrants[chosen]] = True
        return Masks(
            torch.from_numpy(context), torch.from_numpy(quadrants[(chosen + np.arange(1, 4)[:, None]) % 4]), key
        )


@dataclass(frozen=True)
class Random:
    """A random share of the patches, of `target_scale`, is the target, the rest the context (I-JEPA, table 6)."""

    grid: Size
    target_scale: Range = (0.6, 0.6)

    def __post_init__(self) -> None:
        _check_grid(self.grid)
        _check_range("target_scale", self.target_scale, 1.0)
        if self._count(0) == 0 or self._count(1) == self.grid[0] * self.grid[1]:
            raise ValueError(
                f"mask.target_scale: expected shares that leave target and context patches on the "
                f"{_name(self.grid)} grid, got {list(self.target_scale)}"
            )

    def _count(self, u: float) -> int:
        """Target patches per image, the same for all images of a step, for a number in [0, 1]."""
        return round(self.grid[0] * self.grid[1] * _between(self.target_scale, u))

    def __call__(self, batch: int, seed: int, step: int, first: int = 0) -> Masks:
        """Masks of `batch` images: M = C = 1."""
        key = _key(batch, seed, step, first)
        import numpy as np
        import torch

        from ijepa_fast.kernels.mask_sampler import random_subset

        patches, count = self.grid[0] * self.grid[1], self._count(_batch_numbers(key)[0])
        everything = torch.ones(batch, patches, dtype=torch.bool)
        target = random_subset(key, everything, torch.full((batch,), count, dtype=torch.int32))
        numbers = (np.flatnonzero(target.numpy()) % patches).astype(np.int32).reshape(1, batch, count)
        return Masks(~target[None], torch.from_numpy(numbers), key)


Own = MultiBlock | Block | Rasterized | Random
Sampler = Callable[..., Masks]  # (images, seed, step, first) -> Masks
STRATEGIES: dict[str, tuple[type[Own], dict[str, Any]]] = {
    "multiblock-reference": (MultiBlock, {"published": True}),
    "multiblock": (MultiBlock, {"published": False}),
    "rasterized": (Rasterized, {}),
    "block": (Block, {}),
    "random": (Random, {}),
    "channels": (MultiBlock, {"published": False}),
}


def _key(batch: int, seed: int, step: int, first: int) -> Key:
    for name, value, bits in (("seed", seed, 63), ("step", step, 32), ("first", first, 32)):
        if not 0 <= value < 2**bits:
            raise ValueError(f"{name}: expected an integer of {bits} bits, not negative, got {value}")
    if batch < 1:
        raise ValueError(f"batch: expected at least one image, got {batch}")
    from ijepa_fast.kernels.mask_sampler import Key

    return Key(int(seed), int(step), int(first))


def _batch_numbers(key: Key) -> list[float]:
    """Four numbers in [0, 1) shared by all images of the step."""
    from ijepa_fast.kernels.mask_sampler import BATCH, words

    return [int(word) / 2**32 for word in words(replace(key, first=0), 0, BATCH)]


def _steps(count: int) -> list[float]:
    """0 to 1 in so many steps."""
    return [step / count for step in range(count + 1)]


def _between(ends: Range, u: float) -> float:
    return ends[0] + u * (ends[1] - ends[0])


def _block_size(grid: Size, scale: float, aspect: float) -> Size:
    keep = int(grid[0] * grid[1] * scale)
    return round(math.sqrt(keep * aspect)), round(math.sqrt(keep / aspect))


def _name(grid: Size) -> str:
    return f"{grid[0]}x{grid[1]}"


def _check_grid(grid: Size) -> None:
    if min(grid) < 2:
        raise ValueError(
            f"data.crop: expected at least 2x2 patches to mask, got the {_name(grid)} grid; "
            "raise data.crop or lower the patch size"
        )


def _check_count(name: str, value: int, least: int) -> None:
    if not isinstance(value, Integral) or value < least:
        raise ValueError(f"mask.{name}: expected a whole number of at least {least}, got {value!r}")


def _check_range(name: str, ends: Range, highest: float) -> None:
    numbers = isinstance(ends, (list, tuple)) and all(isinstance(end, Real) for end in ends)
    if not numbers or len(ends) != 2 or not 0 < ends[0] <= ends[1] <= highest:
        got = list(ends) if isinstance(ends, tuple) else ends
        raise ValueError(f"mask.{name}: expected a range [low, high] with 0 < low <= high <= {highest:g}, got {got!r}")


def _check_block(kind: str, h: int, w: int, grid: Size) -> None:
    if min(h, w) < 1:
        raise ValueError(
            f"mask.{kind}_scale: a {kind} block of {h}x{w} patches on the {_name(grid)} grid is empty; "
            f"raise mask.{kind}_scale or data.crop"
        )
    if h > grid[0] or w > grid[1]:
        raise ValueError(
            f"mask.{kind}_scale: a {kind} block of {h}x{w} patches does not fit the {_name(grid)} grid; "
            f"lower mask.{kind}_scale or bring mask.{kind}_aspect nearer to 1"
        )


def hidden_channels(mask: dict[str, Any], channels: int, foreign: bool) -> int:
    """How many channels of an image its contexts do not see. Takes the option out of `mask`. Raises ConfigError."""
    if not foreign and ":" in mask["strategy"]:
        raise ConfigError(f"mask.strategy={mask['strategy']}: only strategies of this package are imported here")
    if mask["strategy"] != "channels":
        if mask["hidden_channels"] is None:  # else the sampler refuses it
            mask.pop("hidden_channels")
        return 0
    share = mask.pop("hidden_channels") or HIDDEN_SHARE
    if channels < 2:
        raise ConfigError(f"mask.strategy=channels: expected images of several channels, got data.channels={channels}")
    return min(channels - 1, max(1, round(share * channels)))


def sampler_of(mask: dict[str, Any], grid: Size) -> Sampler:
    """The sampler of the section `mask`, whose `hidden_channels` were taken out. Raises ConfigError."""
    options = {name: value for name, value in mask.items() if name not in (*POLICY, "strategy")}
    try:
        return make_sampler(mask["strategy"], grid, **options)
    except ValueError as error:
        raise ConfigError(str(error)) from None
