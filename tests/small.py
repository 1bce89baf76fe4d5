"""Small methods, explicit masks and tied averages for tests."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn

from ijepa_fast.config import Data, Mask, Model
from ijepa_fast.engine.optim import AdamWEMA, parameter_groups
from ijepa_fast.masks.packing import MaskDraw, assemble
from ijepa_fast.methods import ibot, ijepa, mae
from ijepa_fast.methods.method import Method, Setup
from ijepa_fast.models.vit import Encoder

MEAN, STD = (0.5,) * 3, (0.25,) * 3
BATCH = 6  # of `images_of`


def setup_of(
    crop: int,
    patch: int,
    dim: int = 32,
    depth: int = 2,
    heads: int = 2,
    predictor_dim: int = 16,
    predictor_depth: int = 2,
    options: object = None,
    mean=MEAN,
    std=STD,
    min_keep: int | None = None,
    **model,
) -> Setup:
    """What a method of these sizes is made from; min_keep: of I-JEPA's masks."""
    sizes = {"dim": dim, "depth": depth, "heads": heads, "patch": patch, "mlp_ratio": 4.0}
    narrow = {"predictor_dim": predictor_dim, "predictor_depth": predictor_depth}
    data = Data(source="synthetic", crop=crop, mean=list(mean), std=list(std))
    return Setup(Model(**sizes, **narrow, **model), data, Mask(min_keep=min_keep), options or {})


def small_ijepa(crop: int = 64, patch: int = 8, seed: int = 0, options: ijepa.Options | None = None, **sizes):
    """An I-JEPA whose weights are drawn from `seed`."""
    torch.manual_seed(seed)
    return ijepa.IJEPA(setup_of(crop, patch, options=options or ijepa.Options(), min_keep=3, **sizes))


def small_mae(crop: int = 32, patch: int = 8, options: mae.Options | None = None, **sizes):
    """An MAE; its decoder has heads of width 32."""
    return mae.MAE(setup_of(crop, patch, options=options or mae.Options(), **{"predictor_dim": 32} | sizes))


def small_ibot(crop: int = 32, patch: int = 8, options: ibot.Options | None = None, **sizes):
    """An iBOT without stochastic depth."""
    options = options or ibot.Options(hidden=32, bottleneck=16, prototypes=48, drop_path=0.0)
    return ibot.IBOT(setup_of(crop, patch, options=options, **sizes))


def watched(places: int = 16, averaged: bool = True, frozen: bool = False, **options) -> Any:
    """What a probe while training reads of a method, which computes nothing: features are given to its `watch`."""
    encoder: Any = nn.Linear(1, 1)
    encoder.patches = places
    method = SimpleNamespace(watch=None, encoder=encoder, probed=encoder, options=SimpleNamespace(**options), wanted={})
    method.averaged, method.frozen = {"encoder": encoder} if averaged else {}, {"teacher": encoder} if frozen else {}
    return method


def to(method: Method, *where) -> Method:
    """The method and its averages on another device, or in another dtype."""
    for network in method.networks.values():
        network.to(*where)
    return method


def loss_of(method: Method, images, draw) -> torch.Tensor:
    """The loss alone."""
    return method(images, draw)[0]


def optimizer_of(method: Method, **options) -> AdamWEMA:
    """The engine's optimiser on the whole parameters of `method`, whose averages hold the optimiser's."""
    groups = parameter_groups(method.trained, method.averaged, method.undecayed, method.unclipped)
    optimizer = AdamWEMA(groups, **options)
    for name, average in method.averaged.items():
        for param, target in zip(method.trained[name].parameters(), average.parameters(), strict=True):
            optimizer.tie(param, target)
    return optimizer


def from_masks(context, target, patches: int) -> MaskDraw:
    """Pack patch numbers in the published layout, context (C, B, Kc) and target (M, B, K), `patches` per image."""
    context, target = np.asarray(context), np.asarray(target)
    contexts, images, kept = context.shape
    rows = (context + np.arange(images)[:, None] * patches).astype(np.int32).ravel()
    return assemble(rows, np.full((contexts, images), kept), target, patches)


def images_of(count: int = BATCH, side: int = 64) -> torch.Tensor:
    """Random images for `model_of`, uint8 (count, side, side, 3)."""
    return torch.randint(256, (count, side, side, 3), dtype=torch.uint8)


def model_of(**options: Any) -> ijepa.IJEPA:
    """A small I-JEPA with these options."""
    return small_ijepa(options=ijepa.Options(**options))


def teacher_of(depth: int = 2, **kind: Any) -> Encoder:
    """A frozen encoder of random weights whose features can be its targets."""
    encoder = Encoder(64, 8, 32, depth, 2, **kind).requires_grad_(False).eval()
    for param in encoder.parameters():
        torch.nn.init.normal_(param, std=0.1)
    return encoder


def frozen(teacher: Encoder, **options: Any) -> ijepa.IJEPA:
    """A small I-JEPA behind this teacher."""
    model = model_of(teacher="frozen", teacher_from="somewhere", **options)
    model.give("teacher", teacher, model.setup.data.mean, model.setup.data.std)
    return model
