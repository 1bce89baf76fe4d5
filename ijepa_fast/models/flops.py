"""Work of one training step in floating-point operations, from plain sizes and real token counts.

Counted as torch.utils.flop_counter counts: two operations for each multiply-add of a matrix product, attention
included, element-wise work left out. The backward pass of a product costs twice its forward, or once where no gradient
flows to the input (patch embedding). Nothing is counted for recomputation. Functions take the sequences of a batch and
return the work of the batch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

# Dense peak of a GPU in bf16 (fp16 on a V100), FLOP/s: data sheets.
PEAKS = {"H200": 989e12, "H100": 989e12, "GH200": 989e12, "A100": 312e12, "V100": 125e12}


@dataclass(frozen=True)
class Transformer:
    """Sizes of a stack of pre-norm blocks."""

    dim: int
    depth: int
    mlp_ratio: float = 4.0

    def forward(self, lengths: Iterable[int], queries: Iterable[int] | None = None) -> int:
        """Forward work on sequences of `lengths` tokens. Where `queries` is given, the last block computes only that
        many rows of each sequence; its keys and values are still those of all tokens.
        """
        lengths = list(lengths)
        full = sum(self._block(n, n) for n in lengths)
        if queries is None or not self.depth:
            return self.depth * full
        last = sum(self._block(n, q) for n, q in zip(lengths, queries, strict=True))
        return (self.depth - 1) * full + last

    def _block(self, tokens: int, queries: int) -> int:
        hidden = int(self.dim * self.mlp_ratio)
        keys_values = 2 * tokens * self.dim * 2 * self.dim
        queries_and_projection = 2 * queries * self.dim * 2 * self.dim
        attention = 2 * queries * tokens * 2 * self.dim
        return keys_values + queries_and_projection + attention + 2 * queries * self.dim * 2 * hidden


@dataclass(frozen=True)
class Work:
    """Forward work of the parts of a step, for a batch."""

    teacher: int  # forward only: I-JEPA's target encoder, iBOT's teacher
    trained: dict[str, int]  # forward and backward, by part
    no_input_gradient: int  # the part of `trained` that embeds pixels

    @property
    def forward(self) -> int:
        """Forward work alone."""
        return self.teacher + sum(self.trained.values())

    @property
    def total(self) -> int:
        """Forward and backward."""
        return self.teacher + 3 * sum(self.trained.values()) - self.no_input_gradient


def linear(rows: int, inputs: int, outputs: int) -> int:
    """A matrix product of (rows, inputs) by (inputs, outputs)."""
    return 2 * rows * inputs * outputs


def ijepa(
    encoder: Transformer,
    predictor: Transformer,
    *,
    patch: int,
    patches: int,
    context: list[int],
    targets: int,
    target_size: int,
    images: int,
    unions: list[int] | None = None,
    embed_all: bool = False,
    pixels: bool = False,
) -> Work:
    """Work of an I-JEPA step.

    Args:
        encoder: of both encoders.
        predictor: the narrow one.
        patch: side of a patch, pixels.
        patches: patches an image, N.
        context: tokens of each context, C*B of them in order (c, b).
        targets: blocks an image, M.
        target_size: patches a block, K.
        images: B.
        unions: distinct target patches of each image. Where given, the last blocks of target encoder and predictor
            compute only the rows that are used, as this engine does; None counts the published computation.
        embed_all: the context side embeds all patches, as the published code does.
        pixels: they are predicted, so there is no target encoder.
    """
    row, kept = 3 * patch**2, images * patches if embed_all else sum(context)
    embedding = linear(kept, row, encoder.dim)
    teacher = linear(images * patches, row, encoder.dim) + encoder.forward([patches] * images, unions)
    sequences = targets * [length + target_size for length in context]
    predicted = targets * len(context) * target_size
    narrow = predictor.forward(sequences, [target_size] * len(sequences) if unions is not None else None)
    narrow += linear(sum(context), encoder.dim, predictor.dim)
    narrow += linear(predicted, predictor.dim, row if pixels else encoder.dim)
    return Work(
        0 if pixels else teacher, {"context": embedding + encoder.forward(context), "predictor": narrow}, embedding
    )


def mae(
    encoder: Transformer,
    decoder: Transformer,
    *,
    patch: int,
    patches: int,
    visible: int,
    images: int = 1,
    embed_all: bool = True,
    used_rows_only: bool = False,
) -> Work:
    """Work of an MAE step that keeps `visible` patches an image, with a class token.

    embed_all: all patches are embedded before masking, as published. used_rows_only: the decoder's last block and its
    prediction compute only the masked patches, as this project's rendering does.
    """
    pixels, masked = 3 * patch**2, patches - visible
    embedding = linear(patches if embed_all else visible, pixels, encoder.dim)
    narrow = linear(1 + visible, encoder.dim, decoder.dim)
    narrow += decoder.forward([1 + patches], [masked] if used_rows_only else None)
    narrow += linear(masked if used_rows_only else 1 + patches, decoder.dim, pixels)
    trained = {"encoder": embedding + encoder.forward([1 + visible]), "decoder": narrow}
    return Work(0, {name: images * work for name, work in trained.items()}, images * embedding)


@dataclass(frozen=True)
class Head:
    """iBOT's projection head: two hidden layers, a bottleneck, the prototypes."""

    hidden: int = 2048
    bottleneck: int = 256
    prototypes: int = 8192

    def forward(self, inputs: int, rows: int, prototype_rows: int) -> int:
        """`rows` through the layers up to the bottleneck, `prototype_rows` of them on to the prototypes."""
        narrow = linear(rows, inputs, self.hidden) + linear(rows, self.hidden, self.hidden)
        return (
            narrow
            + linear(rows, self.hidden, self.bottleneck)
            + linear(prototype_rows, self.bottleneck, self.prototypes)
        )


def ibot(
    encoder: Transformer,
    head: Head,
    *,
    patch: int,
    global_patches: int,
    local_patches: int,
    globals_: int = 2,
    locals_: int = 10,
    masked: int | None = None,
    images: int = 1,
) -> Work:
    """Work of an iBOT step on `globals_` large and `locals_` small crops an image.

    masked: masked patches of the batch. None: every token of every crop goes through the whole head, as published.
    A number: the student's head sees class tokens and masked patches alone; so does the teacher's last layer, with one
    row more for the patch centre, as this project's rendering does.
    """
    crops = images * [1 + global_patches] * globals_ + images * [1 + local_patches] * locals_
    pixels = 3 * patch**2
    large, small = images * globals_, images * locals_
    embedding = linear(sum(crops) - len(crops), pixels, encoder.dim)
    tokens = large * (1 + global_patches)
    student_rows, prototype_rows = sum(crops), tokens
    if masked is not None:
        student_rows, prototype_rows = large + small + masked, large + masked + 1
    student_head = head.forward(encoder.dim, student_rows, student_rows)
    teacher = linear(large * global_patches, pixels, encoder.dim) + encoder.forward(crops[:large])
    teacher += head.forward(encoder.dim, tokens, prototype_rows)
    return Work(teacher, {"student": embedding + encoder.forward(crops), "head": student_head}, embedding)
