"""Work of a step that predicts features of masked patches from a context, here and as published."""

from __future__ import annotations

from collections.abc import Sequence

from ijepa_fast.masks.packing import MaskDraw
from ijepa_fast.models import flops
from ijepa_fast.models.flops import Transformer, Work


def step_work(
    encoder: Transformer,
    predictor: Transformer,
    *,
    patch: int,
    patches: int,
    context: Sequence[int],
    targets: int,
    target_size: int,
    images: int,
    unions: Sequence[int] | None = None,
    embed_all: bool = False,
    pixels: bool = False,
    channels: int = 3,
    visible: bool = False,
) -> Work:
    """Work of an I-JEPA step.

    Args:
        encoder: of both encoders.
        predictor: the narrow one.
        patch: side of a patch, pixels.
        patches: patches per image, N.
        context: tokens of each context, C*B of them in order (c, b).
        targets: blocks per image, M.
        target_size: patches of a block, K.
        images: B.
        unions: distinct target patches of each image. Where given, the last blocks of target encoder and predictor
            compute only the rows that are used, as this engine does; None counts the published computation.
        embed_all: the context side embeds all patches, as the published code does.
        pixels: they are predicted, so there is no target encoder.
        channels: of an image.
        visible: visible tokens are predicted, too.
    """
    row, kept = channels * patch**2, images * patches if embed_all else sum(context)
    embedding = flops.linear(kept, row, encoder.dim)
    teacher = flops.linear(images * patches, row, encoder.dim) + encoder.forward([patches] * images, unions)
    sequences = targets * [length + target_size for length in context]
    predicted = targets * (len(context) * target_size + (sum(context) if visible else 0))
    some = unions is not None and not visible
    narrow = predictor.forward(sequences, [target_size] * len(sequences) if some else None)
    narrow += flops.linear(sum(context), encoder.dim, predictor.dim)
    narrow += flops.linear(predicted, predictor.dim, row if pixels else encoder.dim)
    return Work(
        0 if pixels else teacher, {"context": embedding + encoder.forward(context), "predictor": narrow}, embedding
    )


def step_saved(
    encoder: Transformer, predictor: Transformer, draw: MaskDraw, values: int, *, recompute: bool, visible: bool
) -> int:
    """Values that an I-JEPA step keeps for its backward pass: context encoder, predictor, loss.

    values: of a patch. recompute: blocks are run again in the backward pass. visible: visible tokens are predicted
    too.
    """
    context, blocks = draw.context_index.numel(), draw.targets * draw.sequences * draw.target_size
    tokens = draw.targets * context + blocks
    rows = tokens if visible else blocks
    stacks = encoder.saved_values(context, context, recompute) + predictor.saved_values(tokens, rows, recompute)
    width = -(-values // 8) * 8
    patches = draw.images * draw.patches * width + context * width  # all patches, and the embedding's input
    return stacks + patches + 2 * rows * encoder.dim  # predictions and their gradient
