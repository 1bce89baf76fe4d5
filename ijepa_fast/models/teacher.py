"""A frozen encoder as the teacher of another one: what it must have, and what tells it from others."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import chain

import torch

from ijepa_fast.config import ConfigError, Data
from ijepa_fast.models import flops
from ijepa_fast.models.flops import Transformer
from ijepa_fast.models.vit import Encoder, mean_of_normal


def check_teacher(
    path: str | None,
    teacher: Encoder,
    normalisation: tuple[Sequence[float], ...],
    student: Encoder,
    data: Data,
    layers: int = 0,
) -> None:
    """ConfigError unless the teacher's features can be the student's targets, patch by patch.

    path: where it is from. normalisation: mean and std of the images it was trained on. layers: `target_layers`.
    """
    prefix = f"objective.options.teacher_from: {path}"
    channels = len(normalisation[0])
    if channels != data.channels:
        raise ConfigError(
            f"{prefix}: expected a teacher of images of data.channels={data.channels} channels, got one of {channels}"
        )
    if (teacher.grid, teacher.patch) != (student.grid, student.patch):
        grids = [f"{e.grid[0]} x {e.grid[1]} patches of {e.patch} pixels" for e in (student, teacher)]
        raise ConfigError(f"{prefix}: expected {grids[0]}, as data.crop and model.patch say, got {grids[1]}")
    if teacher.dim != student.dim:
        raise ConfigError(f"{prefix}: expected features of width model.dim={student.dim}, got {teacher.dim}")
    for name, theirs in zip(("mean", "std"), normalisation, strict=True):
        own = getattr(data, name)
        if len(own) != len(theirs) or any(abs(a - b) > 1e-4 for a, b in zip(own, theirs)):
            raise ConfigError(f"{prefix}: expected data.{name}={list(own)}, as this run has, got {list(theirs)}")
    if layers > len(teacher.blocks):
        raise ConfigError(
            f"objective.options.target_layers={layers}: expected at most the {len(teacher.blocks)} blocks of the "
            f"teacher {path}"
        )


def fingerprint(encoder: Encoder) -> int:
    """The first 61 bits of the SHA-256 of all parameters and position tables, as fp32: a carried int64 holds them."""
    digest = hashlib.sha256()
    for tensor in chain(encoder.parameters(), encoder.buffers()):
        digest.update(tensor.detach().float().cpu().contiguous().numpy().data)
    return int.from_bytes(digest.digest()[:8], "big") >> 3


def former_fingerprint(encoder: Encoder) -> int:
    """What `fingerprint` was in earlier versions: a sum, which values that change places within a tensor leave."""
    total = 0
    for place, param in enumerate(encoder.parameters(), start=1):
        total += place * int(param.detach().float().contiguous().view(torch.int32).long().sum())
    return total % 2**61


def check_same(path: str | None, known: Sequence[int], begun: int) -> None:
    """ConfigError unless the run was begun with the teacher that is there now.

    path: where it is from; None: it is the encoder's random start. known: the fingerprints it may have been noted by.
    """
    if begun not in known:
        raise ConfigError(
            f"objective.options.teacher_from: {path} holds other weights than when the run was begun; put them back, "
            f"or begin a run under another name"
            if path
            else "objective.options.teacher=random: seed and model give other weights here than when the run was "
            "begun, as another version of torch may; begin a run under another name"
        )


def teacher_work(teacher: Encoder, images: int, unions: list[int]) -> int:
    """Work of a pass of the teacher over whole images, `unions` rows of each wanted; with a class token it does all."""
    first: int = int(teacher.cls_token is not None)
    hidden = teacher.get_parameter("blocks.0.mlp.fc1.weight").shape[0]
    sizes = Transformer(teacher.dim, len(teacher.blocks), hidden / teacher.dim)
    embedding = flops.linear(images * teacher.patches, teacher.patch_embed.proj.weight[0].numel(), teacher.dim)
    return embedding + sizes.forward([first + teacher.patches] * images, None if first else unions)


def whole_targets(teacher: Encoder, patches: torch.Tensor, images: int, layers: int) -> torch.Tensor:
    """Targets of all patches, `patches` (B*N, W) -> (B, N, D): what Encoder.targets gives of some, up to rounding."""
    if layers == 1:
        features = teacher(patches, images, "patches")
    else:
        features = mean_of_normal(teacher.layers(patches, images, layers))
    return features.view(images, -1, features.shape[1])
