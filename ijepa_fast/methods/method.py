"""What a method is: the contract between it and everything else, and the registry of methods.

A method is one file that defines one subclass of `Method`. Nothing else of the package names a method: the trainer, the
engine, checkpoints, the forecast, probes, exports and the report ask the contract. Adding one takes a file here, a YAML
in configs/ and a golden test; somebody else's stays where it is, and its import path is its name
(`objective.method=my_package.my_method`).
"""

from __future__ import annotations

import copy
import inspect
import os
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import is_dataclass, replace
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
import torch
from torch import nn

from ijepa_fast.agree import CAPABILITIES, NoOptions, Setup, check_method
from ijepa_fast.config import ConfigError
from ijepa_fast.data import crop_of
from ijepa_fast.data.crops import View
from ijepa_fast.data.importing import import_module
from ijepa_fast.masks.draw import Draw
from ijepa_fast.models.flops import Work
from ijepa_fast.models.tokenizer import Tokenizer, load_tokenizer
from ijepa_fast.models.vit import Encoder

# Registered are the files of this folder, by their names.
METHODS = sorted(found.name for found in pkgutil.iter_modules([os.path.dirname(__file__)]) if found.name != "method")
D = TypeVar("D", bound=Draw)


class Method(nn.Module, Generic[D]):
    """A method's networks and its loss. A subclass sets the class attributes and builds its networks in `__init__`.

    D is the kind of its draw: `class Mine(Method[MyDraw])`.
    Every child module is trained; its parameters are named "<child>.<parameter>" in checkpoints. One of them is
    `encoder`, which is what a run leaves: it is probed, loaded and exported, by its average where there is one.

    Attributes:
        Options: a dataclass of the method's own settings, published values as defaults; `check` says what they may be.
        capabilities: which of CAPABILITIES it has. graphs: forward and backward can be captured as CUDA graphs, as they
            read nothing from the device and change nothing that stays; `use_graphs` and `largest` may be of use. fp8:
            `use_fp8`. target_stream: `target_stream` is used. forecast: `saved_values`.
        reads_mask: whether the section `mask` of the configuration means something to it.
        undecayed: names "<child>.<parameter>" that weight decay leaves, besides biases and vectors.
        unclipped: names "<child>.<parameter>" whose gradients clipping neither counts nor scales.
        former_names: prefixes of parameter names in checkpoints of earlier versions, and what they are today.
        averaged: the EMA of a child module by the child's name, kept outside of the module tree by `keep_average`;
            empty where the method has none, and then the engine keeps none.
        carried: tensors that `forward` moves in place beside the weights, by name, equal on all ranks (iBOT's centres);
            they lie in checkpoints. They are on the device of the networks and keep their dtype.
        frozen: networks that stay as they are, outside of the module tree and of checkpoints, by name.
        wanted: paths of encoders that are to be frozen, by the name under which `give` will get them.
        kept_in: where set, the option that names a folder, and the folder: what `keep` gives of every crop of every
            image is computed once, before training, kept there, and handed to `recall` in every step.
            `data.crops_per_image` says how many crops there are.
        kept_shape: of what is kept of a crop.
        exchanges: whether `forward` adds anything up over ranks, which a graph of several ranks could not.
        watch: where set, a method whose targets are features calls it in every step with them (U, D) and its draw.
        target_stream: where set, a CUDA stream for what needs no gradient.
        inside: where set, how much of each patch lies where `data.where` says: float (B, N) in 0..1, for positions (B,)
            of the stream of samples. A method that draws target blocks holds them to it.
    """

    Options: ClassVar[type] = NoOptions
    capabilities: frozenset[str] = frozenset()
    reads_mask: ClassVar[bool] = False
    undecayed: ClassVar[frozenset[str]] = frozenset()
    unclipped: ClassVar[frozenset[str]] = frozenset()
    former_names: ClassVar[dict[str, str]] = {}
    encoder: Encoder

    def __init__(self, setup: Setup):
        super().__init__()
        self.setup, self.options = setup, self.parse(setup)
        self.averaged: dict[str, Any] = {}
        self.carried: dict[str, torch.Tensor] = {}
        self.frozen: dict[str, Any] = {}
        self.wanted: dict[str, str] = {}
        self.kept_in: tuple[str, str] | None = None
        self.kept_shape: tuple[int, ...] = ()
        self.exchanges = False
        self.watch: Callable[[torch.Tensor, Draw], object] | None = None
        self.target_stream: torch.cuda.Stream | None = None
        self.inside: Callable[[np.ndarray], np.ndarray] | None = None

    @classmethod
    def parse(cls, setup: Setup) -> Any:
        """The checked options. Raises ConfigError, naming the key."""
        name = cls.__module__.rpartition(".")[2]
        return check_method(name, setup, cls.Options, cls.reads_mask, cls.check)

    @classmethod
    def check(cls, options: Any, setup: Setup) -> None:
        """Raise ConfigError, naming `objective.options.<key>`, for options that cannot be."""

    def ready(self) -> None:
        """Called once before training: load what training alone needs. Raises ConfigError."""

    def give(self, name: str, encoder: Encoder, mean: Sequence[float], std: Sequence[float]) -> None:
        """Called once before training with each encoder of `wanted`, and how its images were normalised.

        It is to become `frozen[name]`. Raises ConfigError for one that cannot.
        """
        raise NotImplementedError

    def keep(self, images: torch.Tensor) -> torch.Tensor:
        """What is kept of images (B, H, W, C), without gradient: (B, *kept_shape); see `kept_in`."""
        raise NotImplementedError

    def keeps(self) -> dict[str, Any]:
        """What that depends on beside the images, the network's dtype and `model.patch`, by what messages call it."""
        raise NotImplementedError

    def recall(self, draw: D, kept: torch.Tensor, keys: torch.Tensor) -> D:
        """The draw with what it needs of `kept` (crops, ...), whose rows `keys` (B,) are its images; on the host."""
        raise NotImplementedError

    def views(self) -> list[View]:
        """How an image is seen, where it is seen several times; none: one crop, as the section `data` says."""
        return []

    def draw(self, images: int, seed: int, step: int, first: int = 0, batch: int | None = None) -> D:
        """What a micro-batch of `images` needs beside them, on the host: a function of the arguments alone.

        Its images have the places `first` to `first + images` among all of the step, `batch` of them over all ranks and
        micro-batches (None: no more). What is drawn for an image must follow from (seed, step, its place), and what is
        drawn once from (seed, step): then the run is the same on any number of ranks.
        Called ahead of the step, in another thread.
        """
        raise NotImplementedError

    def forward(self, images: Any, draw: D) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss, an fp32 scalar, and its named terms for the log, detached; {} where there is but one.

        images: (B, H, W, C), uint8, uint16 or float32, on the device; of several views a list of them.
        """
        raise NotImplementedError

    def work(self, draw: D) -> Work:
        """The work of a step on `draw`, as it is executed here."""
        raise NotImplementedError

    def saved_values(self, draw: D) -> int:
        """Values that a step keeps for its backward pass (capability "forecast")."""
        raise NotImplementedError

    def use_fp8(self) -> None:
        """Run what needs no gradient in fp8 from now on (capability "fp8"); its weights lie where they will."""
        raise NotImplementedError

    def use_graphs(self) -> None:
        """Draw batches of few shapes from now on, as each one takes a CUDA graph (capability "graphs")."""

    def largest(self, draw: D) -> D | None:
        """A draw like `draw` that no later one of this run exceeds by much, in host memory (capability "graphs").

        None where all are of one size.
        """
        return None

    def average_changed(self) -> None:
        """Called whenever the weights of `averaged` were written."""

    def resumed(self) -> None:
        """Called when a checkpoint, or the weights of `init`, were written into the networks and `carried`.

        Raises ConfigError where `frozen` has become another.
        """

    # What all methods share.

    @property
    def trained(self) -> dict[str, nn.Module]:
        """The networks that the optimiser updates, by name."""
        return dict(self.named_children())

    @property
    def networks(self) -> dict[str, nn.Module]:
        """All networks by name; averages are "target_<name>"."""
        return self.trained | {f"target_{name}": network for name, network in self.averaged.items()}

    @property
    def probed(self) -> Encoder:
        """The encoder that a run leaves: the average where there is one."""
        return self.averaged.get("encoder", self.encoder)

    def keep_average(self, *names: str) -> None:
        """Keep averages of these child modules, equal to them at first."""
        self.averaged = {name: copy.deepcopy(getattr(self, name)).requires_grad_(False).eval() for name in names}

    def patchify(self, images: torch.Tensor) -> torch.Tensor:
        """`images` (B, H, W, C) uint8, uint16 or float32 -> normalised patches (B*N, W) in the encoder's dtype."""
        return self.setup.data.pixels.patches(images, self.encoder.patch, self.encoder.norm.weight.dtype)


class TokenMethod(Method[D]):
    """A method whose targets are the tokens that a frozen tokenizer gives to the patches of an image.

    Its Options have `tokenizer`, `vocabulary`, `token_patch` and `jitter`, as BEiT's.
    """

    tokenizer: Tokenizer | None = None

    def ready(self) -> None:
        """Load the tokenizer."""
        chosen, data = self.options, self.setup.data
        if data.channels != 3:
            raise ConfigError(f"data.channels={data.channels}: a tokenizer reads images of 3 channels")
        try:
            self.tokenizer = load_tokenizer(chosen.tokenizer, chosen.vocabulary, chosen.token_patch)
        except ValueError as error:
            raise ConfigError(str(error)) from None

    def views(self) -> list[View]:
        """One crop, its colours jittered; and the same window at the tokenizer's size.

        Both are resized alike (published: the second by another filter).
        """
        data, chosen, (rows, columns) = self.setup.data, self.options, self.setup.grid
        strengths = (chosen.jitter, chosen.jitter, chosen.jitter, 0.0)
        scale, size = (data.scale[0], data.scale[1]), (rows * chosen.token_patch, columns * chosen.token_patch)
        view = View(crop_of(data.size), scale, jitter=float(chosen.jitter > 0), strengths=strengths, grey=0.0)
        return [view, replace(view, crop=crop_of(size), like=0)]

    def tokens(self, images: torch.Tensor) -> torch.Tensor:
        """Tokens (B*N,) int64 of the tokenizer's view, uint8 (B, S, S, 3). ConfigError where they do not fit."""
        if self.tokenizer is None:
            self.ready()
        assert self.tokenizer is not None
        return tokens_of(self.tokenizer, images, self.setup.grid, self.options.vocabulary)


@torch.no_grad()
def tokens_of(tokenizer: Tokenizer, images: torch.Tensor, grid: tuple[int, int], vocabulary: int) -> torch.Tensor:
    """Tokens (B*N,) int64 of `images` uint8 (B, S, S, 3). ConfigError for another grid, or a token beyond the head."""
    tokens = tokenizer(images)
    if tokens.shape != (len(images), *grid):
        raise ConfigError(
            f"objective.options.tokenizer: it gives tokens of shape {tuple(tokens.shape)} and the grid of patches has "
            f"{(len(images), *grid)}; set objective.options.token_patch to its pixels to a token"
        )
    if not tokens.is_cuda and int(tokens.max()) >= vocabulary:
        raise ConfigError(
            f"objective.options.tokenizer: it gave token {int(tokens.max())} and the head has {vocabulary}; set "
            f"objective.options.vocabulary to its number of tokens"
        )
    return tokens.flatten()


def method_class(name: str, foreign: bool = True) -> type[Method]:
    """The class of the method `name`: a name of METHODS, or the import path of a module that defines one Method.

    The path is looked for in the working folder too. foreign: whether a module that is not registered may be imported;
    commands that only read a run must not run code that its configuration names. Raises ConfigError.
    """
    if name not in METHODS and not foreign:
        raise ConfigError(
            f"objective.method={name}: only registered methods are imported here, which are {', '.join(METHODS)}"
        )
    try:
        module = import_module(f"ijepa_fast.methods.{name}" if name in METHODS else name)
    except Exception as error:  # whatever a module raises while it is imported
        raise ConfigError(
            f"objective.method: expected one of {', '.join(METHODS)}, or the import path of a module that defines a "
            f"Method, got {name!r} ({type(error).__name__}: {error})"
        ) from error
    kinds = [value for value in vars(module).values() if inspect.isclass(value) and issubclass(value, Method)]
    found = [kind for kind in kinds if kind.__module__ == module.__name__]
    found = found or [kind for kind in kinds if kind is not Method]  # a package that hands on its method
    if len(found) != 1:
        raise ConfigError(
            f"objective.method={name}: expected a module that defines one subclass of ijepa_fast.methods.method.Method,"
            f" found {len(found)}"
        )
    _check_contract(name, found[0])
    return found[0]


def _check_contract(name: str, method: type[Method]) -> None:
    needed = ["draw", "forward", "work"]
    needed += [part for part, what in (("saved_values", "forecast"), ("use_fp8", "fp8")) if what in method.capabilities]
    if missing := [part for part in needed if getattr(method, part) is getattr(Method, part)]:
        raise ConfigError(f"objective.method={name}: {method.__name__} lacks {', '.join(missing)} of the contract")
    try:
        inspect.signature(method.draw).bind(None, 1, 0, 0, 0, 1)
    except TypeError:
        raise ConfigError(
            f"objective.method={name}: {method.__name__}.draw: expected (images, seed, step, first, batch), got "
            f"{inspect.signature(method.draw)}"
        ) from None
    if not (inspect.isclass(method.Options) and is_dataclass(method.Options)):
        raise ConfigError(f"objective.method={name}: {method.__name__}.Options: expected a dataclass")
    if unknown := set(method.capabilities) - set(CAPABILITIES):
        raise ConfigError(
            f"objective.method={name}: {method.__name__}.capabilities: expected of {', '.join(CAPABILITIES)}, got "
            f"{', '.join(sorted(unknown))}"
        )
