"""Initialisations of networks: the published I-JEPA's, and those that several methods share."""

from __future__ import annotations

import math

import torch
from torch import nn

from ijepa_fast.models.blocks import Block
from ijepa_fast.models.vit import Encoder

INIT_STD = 0.02


def init_weights(module: nn.Module) -> None:
    """Published initialisation: truncated normal .02 for every weight matrix, biases 0, LayerNorm 1 and 0."""
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        nn.init.trunc_normal_(module.weight, std=INIT_STD)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)


def init_cut(module: nn.Module) -> None:
    """BEiT's and SimMIM's initialisation of all of `module`, whose `encoder` it has.

    Matrices, class and mask tokens and learned positions are normal .02, cut off at one standard deviation; the two
    matrices that a block adds to the stream are divided by the root of twice its number; biases 0, LayerNorm 1 and 0.
    """
    for part in module.modules():
        if isinstance(part, (nn.Linear, nn.Conv2d)):
            nn.init.trunc_normal_(part.weight, std=INIT_STD, a=-INIT_STD, b=INIT_STD)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, Encoder):
            for token in (part.cls_token, part.masked_embed, part.pos_embed):
                if token is not None:
                    nn.init.trunc_normal_(token, std=INIT_STD, a=-INIT_STD, b=INIT_STD)
    with torch.no_grad():
        for part in module.modules():
            stack = part.blocks if isinstance(part, Encoder) else ()
            for number, block in enumerate((b for b in stack if isinstance(b, Block)), start=1):
                for matrix in (block.attn.proj.weight, block.mlp.fc2.weight):
                    matrix.div_(math.sqrt(2 * number))


def init_xavier(module: nn.Module) -> None:
    """MAE's initialisation, to be applied to every module: Xavier uniform for matrices, biases 0, LayerNorm 1 and 0."""
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        nn.init.xavier_uniform_(module.weight.view(len(module.weight), -1))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)
