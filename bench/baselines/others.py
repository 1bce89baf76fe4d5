"""Contenders of every registered method that needs no word of its own: what the contract says, with published options.

Of those with a plain rendering, the rendering is a contender too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from bench.baselines.case import Case
from bench.baselines.plain_data2vec import PlainData2VecStep
from bench.baselines.plain_dino import PlainDINOStep
from bench.baselines.plain_vit import normalise
from ijepa_fast.data import IMAGENET_MEAN, IMAGENET_STD
from ijepa_fast.methods import data2vec, dino
from ijepa_fast.methods.method import Method, method_class
from ijepa_fast.models.flops import Transformer
from ijepa_fast.models.heads import HeadSizes


@dataclass(frozen=True)
class Plain:
    """A plain rendering.

    step: of a case and this project's method, whose weights it takes. prepare: (images, draw) -> its batch. work: of a
    case and a draw, as published, FLOP a batch.
    """

    step: Callable[[Case, Method], Any]
    prepare: Callable
    work: Callable


def make(case: Case) -> Method:
    """The method of a case, with published options but for `case.head`; tokens, where it wants them, are random."""
    torch.manual_seed(case.seed)
    method = method_class(case.method)(case.setup(case.head))
    if hasattr(method, "tokenizer"):
        method.tokenizer = lambda images: torch.randint(
            method.options.vocabulary, (len(images), *method.encoder.grid), device=images.device
        )
    return method


def sketch(case: Case) -> Method:
    """The same without any numbers in its weights: for its views, its draws and its work."""
    with torch.device("meta"):
        return make(case)


def _dino(case: Case, method: Method) -> PlainDINOStep:
    chosen = method.options
    head = {"hidden": chosen.hidden, "bottleneck": chosen.bottleneck, "prototypes": chosen.prototypes}
    sizes = case.sizes | {"drop_path": chosen.drop_path}
    step = PlainDINOStep(sizes, head, case.device, case.low_precision)
    for network in (step.student, step.teacher):
        network.backbone.load_state_dict(method.encoder.state_dict())
        network.head.load_state_dict(method.head.state_dict())
    return step


def _dino_batch(views, draw):
    return [normalise(view, IMAGENET_MEAN, IMAGENET_STD) for view in views], draw.temperature


def _dino_work(case: Case, method: Method, draw) -> float:
    chosen = method.options
    sizes = {"large_patches": draw.patches, "small_patches": draw.small_patches, "small": draw.small}
    head = HeadSizes(chosen.hidden, chosen.bottleneck, chosen.prototypes)
    sizes |= {"values": 3 * case.patch**2, "images": draw.images}
    return dino.step_work(_stack(case), head, **sizes, used_rows_only=False).total


def _data2vec(case: Case, method: Method) -> PlainData2VecStep:
    chosen = method.options
    sizes = case.sizes | {"drop_path": chosen.drop_path, "layer_scale": chosen.layer_scale}
    step = PlainData2VecStep(sizes, method.target_layers, chosen.beta, case.device, case.low_precision)
    weights = method.encoder.state_dict() | {f"lm_head.{k}": v for k, v in method.head.state_dict().items()}
    weights["mask_token"] = weights.pop("masked_embed")[None]
    for network in (step.network, step.average):
        network.load_state_dict(weights)
    return step


def _data2vec_batch(views, draw):
    return normalise(views[0], IMAGENET_MEAN, IMAGENET_STD), draw.mask.view(draw.images, -1)


def _data2vec_work(case: Case, method: Method, draw) -> float:
    sizes = {"values": 3 * case.patch**2, "patches": draw.patches, "masked": draw.lengths.tolist()}
    return data2vec.step_work(_stack(case), **sizes, used_rows_only=False).total


def _stack(case: Case) -> Transformer:
    sizes = case.sizes
    return Transformer(sizes["dim"], sizes["depth"], sizes["mlp_ratio"])


PLAIN = {
    "dino": Plain(_dino, _dino_batch, _dino_work),
    "data2vec": Plain(_data2vec, _data2vec_batch, _data2vec_work),
}


def work(case: Case) -> tuple[float, float, float]:
    """Tokens, work as published and as executed here, per image, GFLOP; where nothing plain is known, executed both."""
    method = sketch(case)
    draws = [method.draw(case.batch, case.seed, i) for i in range(case.batches)]
    images, plain = case.batch * len(draws), PLAIN.get(case.method)
    executed = sum(method.work(draw).total for draw in draws) / images / 1e9
    published = sum(plain.work(case, method, draw) for draw in draws) / images / 1e9 if plain else executed
    return sum(draw.tokens for draw in draws) / images, published, executed
