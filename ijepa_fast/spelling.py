"""What a person may have meant: names of the field, short names, near misses; and types of keys in words."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any

# Names of the field, and of the published recipes: this project's key.
ALIASES = {
    "img_size": "data.crop",
    "image_size": "data.crop",
    "input_size": "data.crop",
    "crop_size": "data.crop",
    "resolution": "data.crop",
    "crop_scale": "data.scale",
    "dataset": "data.source",
    "data_path": "data.source",
    "data_dir": "data.source",
    "root_path": "data.source",
    "image_folder": "data.source",
    "workers": "data.threads",
    "num_workers": "data.threads",
    "patch_size": "model.patch",
    "embed_dim": "model.dim",
    "hidden_size": "model.dim",
    "num_heads": "model.heads",
    "num_layers": "model.depth",
    "model_name": "model.arch",
    "pred_depth": "model.predictor_depth",
    "pred_emb_dim": "model.predictor_dim",
    "use_bfloat16": "engine.precision",
    "dtype": "engine.precision",
    "amp": "engine.precision",
    "zero_stage": "engine.zero",
    "grad_accum": "engine.accumulation",
    "gradient_accumulation_steps": "engine.accumulation",
    "accum_iter": "engine.accumulation",
    "grad_clip": "optim.clip",
    "clip_grad": "optim.clip",
    "max_grad_norm": "optim.clip",
    "learning_rate": "optim.lr",
    "base_lr": "optim.lr",
    "blr": "optim.lr",
    "min_lr": "optim.final_lr",
    "wd": "optim.weight_decay",
    "warmup": "optim.warmup_epochs",
    "max_steps": "optim.steps",
    "ipe_scale": "optim.horizon",
    "momentum": "optim.ema",
    "enc_mask_scale": "mask.context_scale",
    "pred_mask_scale": "mask.target_scale",
    "num_enc_masks": "mask.contexts",
    "num_pred_masks": "mask.targets",
    "aspect_ratio": "mask.target_aspect",
    "bs": "batch_size",
    "batch": "batch_size",
    "output_dir": "runs",
    "out_dir": "runs",
    "run_name": "name",
    "save_every": "log.checkpoint_every",
    "save_freq": "log.checkpoint_every",
    "log_every": "log.every",
    "log_freq": "log.every",
    "resume_from": "resume",
    "pretrained": "init",
    "project": "log.wandb",
}
# What is meant where a section is given a value.
SECTIONS = {"data": "data.source", "model": "model.arch", "objective": "objective.method", "engine": "engine.device"}


def meant(name: str, known: Sequence[str]) -> str | None:
    """The key among the dotted keys `known` that `name` stands for, or None.

    In this order: an alias of the field, a key whose last part is the same, a near miss in the same section,
    of the whole, of the last part of any.
    """
    if named := known_as(name, known):
        return named
    last = name.rpartition(".")[2]
    own = {key.rpartition(".")[2]: key for key in known if key.rpartition(".")[0] == name.rpartition(".")[0]}
    if near := close(last, own):
        return own[near]
    if whole := next(iter(difflib.get_close_matches(name, known, n=1, cutoff=0.85)), None):
        return whole
    lasts = {key.rpartition(".")[2]: key for key in reversed(known)} | {a: k for a, k in ALIASES.items() if k in known}
    near = close(last, lasts)
    return lasts[near] if near else None


def known_as(name: str, known: Sequence[str]) -> str | None:
    """The key among `known` that has the alias `name`, or whose last part it is; None where there is none."""
    section, _, last = name.replace("-", "_").lower().rpartition(".")
    if last in ALIASES and ALIASES[last] in known:
        return ALIASES[last]
    if section == "" and last in SECTIONS:
        return SECTIONS[last]
    same = [key for key in known if key.rpartition(".")[2] == last]
    return next((key for key in same if key.startswith(f"{section}.")), same[0] if same else None)


def close(name: str, known: Iterable[str]) -> str | None:
    """The one of `known` that `name` is a near miss of, or None."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1)), None)


def in_words(annotation: str) -> str:
    """The type of a key, as it is written in a dataclass, for a person: "a whole number, or null"."""
    words = {
        "int": "a whole number",
        "float": "a number",
        "str": "a word",
        "bool": "true or false",
        "list[str]": "names in brackets, such as [one, two]",
        "list[int]": "whole numbers in brackets, such as [3, 2, 1]",
        "list[float]": "numbers in brackets, such as [0.3, 1.0]",
        "dict[str, Any]": "names with values",
    }
    kinds = [part.strip() for part in annotation.split("|")]
    named = [words.get(kind, kind) for kind in kinds if kind != "None"]
    return " or ".join(named) + (", or null" if "None" in kinds else "")


def shown(value: Any) -> str:
    """A value as YAML writes it."""
    plain = {None: "null", True: "true", False: "false"}
    return plain[value] if value is None or isinstance(value, bool) else repr(value)
