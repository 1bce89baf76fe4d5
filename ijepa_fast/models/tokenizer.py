"""Tokenizers by their path: images in, a token number for every patch out. Frozen; no part of a method's networks.

    python -m ijepa_fast tokenizer --source FOLDER --patch 8 --vocabulary 8192 --out patches.safetensors

fits this project's own: k-means on the normalised pixels of patches. It is no published tokenizer, and a method that is
trained with it is not the published one in this. A published one, DALL-E's dVAE say, is given as what
torch.export.save writes (.pt2) of a module from images float32 (B, 3, S, S) in 0..1 to tokens int64 (B, n, n), or to
their scores (B, V, n, n).
Shapes: B images of side S, n tokens along one, V tokens in all, W numbers in a patch.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

PATCH_EPS = 1e-2  # beside a patch's variance: flat patches are alike, whatever their noise
KIND = "patch_centres"  # of the header of a file of patches


class PatchTokenizer:
    """The nearest of V centres (V, W) by the normalised pixels of a patch."""

    def __init__(self, centres: torch.Tensor, patch: int):
        self.centres, self.patch, self.vocabulary = centres.float(), patch, len(centres)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 (B, H, W, 3) -> int64 (B, rows, columns)."""
        self.centres = self.centres.to(images.device)
        rows, columns = images.shape[1] // self.patch, images.shape[2] // self.patch
        found = nearest(normalised_patches(images, self.patch), self.centres)
        return found.view(len(images), rows, columns)


class ExportedTokenizer:
    """What torch.export.save wrote of a published tokenizer."""

    def __init__(self, path: str, vocabulary: int):
        self.path, self.vocabulary = path, vocabulary
        try:
            self.module = torch.export.load(path).module()
        except Exception as error:  # whatever a damaged archive makes it raise
            why = (str(error).splitlines() or [""])[0] or type(error).__name__
            raise ValueError(f"tokenizer {path}: expected a file of torch.export.save, got: {why}") from None

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 (B, S, S, 3) -> int64 (B, n, n). ValueError for tokens beyond the vocabulary."""
        self.module = self.module.to(images.device)
        found = self.module(images.permute(0, 3, 1, 2).float() / 255)
        if found.dim() == 4:
            self._check(found.shape[1])
            found = found.argmax(1)
        return found.long()

    def _check(self, vocabulary: int) -> None:
        if vocabulary != self.vocabulary:
            raise ValueError(
                f"tokenizer {self.path}: it has {vocabulary} tokens and the head {self.vocabulary}; "
                f"set objective.options.vocabulary={vocabulary}"
            )


Tokenizer = Callable[[torch.Tensor], torch.Tensor]


def load_tokenizer(path: str | None, vocabulary: int, patch: int | None = None) -> Tokenizer:
    """The tokenizer at `path` for a head of `vocabulary` outputs.

    patch: pixels of the image that it sees to a token. ValueError, in one sentence, where there is none, it is no
    tokenizer, or does not go with the head.
    """
    if path is None:
        raise ValueError(
            "objective.options.tokenizer is not set: this method's targets are tokens; give the path of a tokenizer, "
            "or fit one to your images with: python -m ijepa_fast tokenizer"
        )
    if not Path(path).is_file():
        raise ValueError(
            f"objective.options.tokenizer={path}: there is no such file; give the path of a tokenizer, or fit one to "
            f"your images with: python -m ijepa_fast tokenizer"
        )
    if Path(path).suffix == ".pt2":
        return ExportedTokenizer(path, vocabulary)
    found = load_patches(path)
    if found.vocabulary != vocabulary:
        raise ValueError(
            f"tokenizer {path}: it has {found.vocabulary} tokens and the head {vocabulary}; "
            f"set objective.options.vocabulary={found.vocabulary}"
        )
    if patch is not None and found.patch != patch:
        raise ValueError(
            f"tokenizer {path}: its patches have {found.patch} pixels, and objective.options.token_patch is {patch}; "
            f"set objective.options.token_patch={found.patch}"
        )
    return found


def load_patches(path: str) -> PatchTokenizer:
    """A tokenizer that `save_patches` wrote; ValueError for another file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            header: dict[str, Any] = file.metadata() or {}
            centres = file.get_tensor(KIND) if KIND in file.keys() else None  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"tokenizer {path}: expected a .pt2 or .safetensors file, got: {error}") from None
    if centres is None or not str(header.get("patch", "")).isdigit():
        raise ValueError(f"tokenizer {path}: expected a file of python -m ijepa_fast tokenizer, which this is not")
    patch = int(header["patch"])
    if centres.dim() != 2 or centres.shape[1] != 3 * patch**2:
        raise ValueError(f"tokenizer {path}: expected centres (V, {3 * patch**2}), got {tuple(centres.shape)}")
    return PatchTokenizer(centres, patch)


def save_patches(path: str | Path, centres: torch.Tensor, patch: int) -> None:
    """Write centres (V, W) of patches of `patch` pixels."""
    from safetensors.torch import save_file

    save_file({KIND: centres.contiguous()}, path, metadata={"format": "pt", "patch": str(patch)})


def normalised_patches(images: torch.Tensor, patch: int) -> torch.Tensor:
    """uint8 (B, S, S, 3) -> (B*n*n, W) fp32: every patch with mean 0 and variance about 1."""
    x = images.float().div(255).unflatten(2, (-1, patch)).unflatten(1, (-1, patch))
    x = x.permute(0, 1, 3, 5, 2, 4).flatten(3).flatten(0, 2)
    variance, mean = torch.var_mean(x, 1, keepdim=True)
    return (x - mean) / (variance + PATCH_EPS).sqrt()


def nearest(rows: torch.Tensor, centres: torch.Tensor, at_once: int = 8192) -> torch.Tensor:
    """The number (R,) int64 of the centre (V, W) that is nearest to each of `rows` (R, W)."""
    half = centres.square().sum(1) / 2
    return torch.cat([(half - part @ centres.t()).argmin(1) for part in rows.split(at_once)])


def fit_patches(rows: torch.Tensor, vocabulary: int, rounds: int = 20, seed: int = 0) -> torch.Tensor:
    """k-means: centres (V, W) of `rows` (R, W). A centre that nothing is nearest to moves to a row drawn anew.

    ValueError for fewer rows than centres.
    """
    if len(rows) < vocabulary:
        raise ValueError(f"--vocabulary: expected at most {len(rows)}, the patches that were drawn, got {vocabulary}")
    generator = torch.Generator().manual_seed(seed)
    centres = rows[torch.randperm(len(rows), generator=generator)[:vocabulary]].clone()
    for _ in range(rounds):
        found = nearest(rows, centres)
        counts = torch.bincount(found, minlength=vocabulary)
        sums = torch.zeros_like(centres).index_add_(0, found, rows)
        centres = torch.where(counts[:, None] > 0, sums / counts.clamp_min(1)[:, None], centres)
        empty = (counts == 0).nonzero()[:, 0]
        centres[empty] = rows[torch.randint(len(rows), (len(empty),), generator=generator)]
    return centres
