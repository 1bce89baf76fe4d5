"""What bench/run.py times: of every op its cases, what each must move and compute at least, and who else can do it.

A case stands for one use of an op in one training step of a published model: the shapes come from masks drawn with the
default sampler, every context token kept. Bytes count each input and each output of a pass once.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from bench.case import Case
from ijepa_fast.config import ARCHITECTURES
from ijepa_fast.data import IMAGENET_MEAN, IMAGENET_STD
from ijepa_fast.kernels import adamw_ema as adamw_op
from ijepa_fast.kernels import fp8 as fp8_op
from ijepa_fast.kernels import mask_sampler as sampler_op
from ijepa_fast.kernels.adamw_ema import reference as adamw_reference
from ijepa_fast.kernels.bias_gelu import bias_gelu as bias_gelu_op
from ijepa_fast.kernels.bias_gelu import native as bias_gelu_native
from ijepa_fast.kernels.bias_gelu import reference as bias_gelu_reference
from ijepa_fast.kernels.common import native
from ijepa_fast.kernels.layer_norm import layer_norm as layer_norm_op
from ijepa_fast.kernels.layer_norm import native as layer_norm_native
from ijepa_fast.kernels.layer_norm import reference as layer_norm_reference
from ijepa_fast.kernels.linear import cpu as linear_cpu
from ijepa_fast.kernels.linear import linear as linear_op
from ijepa_fast.kernels.linear import reference as linear_reference
from ijepa_fast.kernels.mask_sampler import reference as sampler_reference
from ijepa_fast.kernels.masked_gather import masked_gather as masked_gather_op
from ijepa_fast.kernels.masked_gather import reference as masked_gather_reference
from ijepa_fast.kernels.patchify import patchify as patchify_op
from ijepa_fast.kernels.patchify import reference as patchify_reference
from ijepa_fast.kernels.predictor_tokens import predictor_readout, predictor_tokens
from ijepa_fast.kernels.predictor_tokens import reference as predictor_reference
from ijepa_fast.kernels.resize import cpu as resize_cpu
from ijepa_fast.kernels.resize import reference as resize_reference
from ijepa_fast.kernels.resize import resize_ as resize_op
from ijepa_fast.kernels.sigreg import reference as sigreg_reference
from ijepa_fast.kernels.sigreg import sigreg as sigreg_op
from ijepa_fast.kernels.target_loss import reference as target_loss_reference
from ijepa_fast.kernels.target_loss import target_loss as target_loss_op
from ijepa_fast.kernels.varlen_attention import native as attention_native
from ijepa_fast.kernels.varlen_attention import varlen_attention_qkv
from ijepa_fast.masks.packing import pack
from ijepa_fast.masks.samplers import make_sampler
from ijepa_fast.models.vit import Encoder

# Names of this project's own implementations: on a GPU, in C++, in PyTorch on a CPU.
OWN = ("triton", "csrc", "cpu")
PREDICTOR_DIM = 384
MOMENTUM, HYPERPARAMETERS = 0.996, dict(lr=1e-4, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.04, step=10)


@dataclass(frozen=True)
class Model:
    """A model, and the images of a GPU's batch as published (B/16, L/16 and S/16 as H/14)."""

    arch: str
    patch: int
    crop: int
    batch: int


MODELS = {
    "S/16": Model("vit_small", 16, 224, 128),
    "B/16": Model("vit_base", 16, 224, 128),
    "L/16": Model("vit_large", 16, 224, 128),
    "H/14": Model("vit_huge", 14, 224, 128),
    "H/16-448": Model("vit_huge", 16, 448, 16),
    "tiny": Model("vit_tiny", 16, 96, 2),  # for tests of the benchmark itself
}


class Batch:
    """Sizes, masks and random tensors of one training batch of a model."""

    def __init__(self, model: Model, images: int, device: torch.device, dtype: torch.dtype):
        self.model, self.images, self.device, self.dtype = model, images, device, dtype
        self.dim, self.depth, self.heads, self.ratio = ARCHITECTURES[model.arch]
        self.grid = (model.crop // model.patch,) * 2
        self.patches = self.grid[0] * self.grid[1]
        sampler = make_sampler("multiblock", self.grid, min_keep=min(10, self.patches // 16))
        self.packed = pack(sampler(images, 0, 0)).to(device)
        self.tokens = self.packed.context_index.shape[0]
        self.predictor_tokens = int(self.packed.predictor_cu_seqlens[-1])
        self.item = dtype.itemsize

    def random(self, *shape: int, grad: bool = True, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Normal numbers on the device, in the batch's dtype unless another is given."""
        return torch.randn(shape, device=self.device).to(dtype or self.dtype).requires_grad_(grad)

    @property
    def on_gpu(self) -> bool:
        """Whether Triton kernels can be timed."""
        return self.device.type == "cuda"


def patchify(b: Batch) -> list[Case]:
    """Both encoders' patches."""
    patch, crop, rows = b.model.patch, b.model.crop, b.images * b.patches
    width = (3 * patch * patch + 7) // 8 * 8
    images = torch.randint(256, (b.images, crop, crop, 3), dtype=torch.uint8, device=b.device)
    arguments = patch, IMAGENET_MEAN, IMAGENET_STD, b.dtype, width
    return [
        Case(
            "images",
            f"{b.images} x {crop} x {crop} x 3 -> {rows} x {width}",
            (images,),
            eager=lambda images: patchify_reference.patchify(images, *arguments),
            own=_triton(b, lambda images: patchify_op(images, *arguments)),
            bytes=(images.numel() + rows * width * b.item, 0),
        )
    ]


def masked_gather(b: Batch) -> list[Case]:
    """Rows of the context, with positions."""
    rows, period, index = b.images * b.patches, b.patches, b.packed.context_index
    x, positions = b.random(rows, b.dim), b.random(period, b.dim, grad=False)
    moved = b.tokens * b.dim * b.item
    return [
        Case(
            "context",
            f"{b.tokens} of {rows} x {b.dim}",
            (x, index, positions),
            eager=lambda x, index, positions: masked_gather_reference.masked_gather(x, index, positions, period),
            own=_triton(b, lambda x, index, positions: masked_gather_op(x, index, positions, unique=True)),
            libraries={"F.embedding": lambda x, i, positions: F.embedding(i, x) + F.embedding(i % period, positions)},
            bytes=(2 * moved + period * b.dim * b.item + 4 * b.tokens, moved + rows * b.dim * b.item + 4 * b.tokens),
        )
    ]


def varlen_attention(b: Batch) -> list[Case]:
    """Self-attention in the context encoder and in the predictor."""
    p, head, narrow = b.packed, b.dim // b.heads, PREDICTOR_DIM // b.heads
    return [
        _attention(b, "context", p.context_cu_seqlens, p.context_max_seqlen, head),
        _attention(b, "predictor", p.predictor_cu_seqlens, p.predictor_max_seqlen, narrow),
    ]


def _attention(b: Batch, part: str, cu_seqlens: torch.Tensor, longest: int, head_dim: int) -> Case:
    tokens, lengths = int(cu_seqlens[-1]), cu_seqlens.diff()
    qkv = b.random(tokens, 3, b.heads, head_dim)
    backends = {"torch varlen": "torch", "flash-attn 2": "flash2", "flash-attn 4": "flash4", "xformers": "xformers"}
    size = tokens * b.heads * head_dim * b.item
    work = 4 * int((lengths.long() ** 2).sum()) * b.heads * head_dim

    def of(backend):
        return lambda qkv: varlen_attention_qkv(qkv, cu_seqlens, longest, backend=backend)

    own = _own(b, attention_native.unsupported(qkv, 1.0), of("triton" if b.on_gpu else "native"))
    return Case(
        part,
        f"{lengths.numel()} x {int(lengths.min())}-{longest} tokens, {b.heads} heads of {head_dim}",
        (qkv,),
        eager=_padded(cu_seqlens, longest, _written_out),
        libraries={"SDPA, padded": _padded(cu_seqlens, longest, F.scaled_dot_product_attention)}
        | {name: of(backend) for name, backend in backends.items() if b.on_gpu},
        own=own or {"cpu": of("sdpa")},
        bytes=(4 * size, 8 * size),
        flops=(work, work * 5 // 2),
    )


def _padded(cu_seqlens: torch.Tensor, longest: int, attention: Callable) -> Callable:
    """Attention without ragged kernels: sequences padded to the longest, keys masked.

    The op's reference goes sequence by sequence, which nobody would train with; tests hold this to it.
    """
    kept = torch.arange(longest, device=cu_seqlens.device) < cu_seqlens.diff()[:, None]
    rows = kept.flatten().nonzero()[:, 0]
    mask = kept[:, None, None]

    def packed_attention(qkv):
        padded = qkv.new_zeros(kept.numel(), *qkv.shape[1:]).index_copy(0, rows, qkv)
        q, k, v = padded.unflatten(0, kept.shape).permute(2, 0, 3, 1, 4)
        return attention(q, k, v, mask).transpose(1, 2).flatten(0, 1).index_select(0, rows)

    return packed_attention


def _written_out(q, k, v, mask):
    scores = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(~mask, float("-inf"))
    return scores.softmax(-1) @ v


def layer_norm(b: Batch) -> list[Case]:
    """Residual addition and LayerNorm, in the context encoder and in the predictor."""
    return [_layer_norm(b, *part) for part in (("context", b.tokens, b.dim), ("predictor", b.predictor_tokens, 384))]


def _layer_norm(b: Batch, part: str, tokens: int, width: int) -> Case:
    libraries = {}
    if b.on_gpu and importlib.util.find_spec("flash_attn"):
        libraries["flash-attn's"] = _flash_layer_norm
    size = tokens * width * b.item
    x, residual, weight, bias = b.random(tokens, width), b.random(tokens, width), b.random(width), b.random(width)
    return Case(
        part,
        f"{tokens} x {width}",
        (x, residual, weight, bias),
        eager=lambda x, residual, weight, bias: layer_norm_reference.layer_norm(x, weight, bias, 1e-6, residual),
        own=_own(
            b,
            layer_norm_native.unsupported(x, weight),
            lambda x, residual, weight, bias: layer_norm_op(x, weight, bias, 1e-6, residual),
        ),
        libraries=libraries,
        bytes=(4 * size, 4 * size),
    )


def _flash_layer_norm(x, residual, weight, bias):
    from flash_attn.ops.triton.layer_norm import layer_norm_fn

    return layer_norm_fn(x, weight, bias, residual=residual, eps=1e-6, prenorm=True)


def bias_gelu(b: Batch) -> list[Case]:
    """Between the two products of the context encoder's MLP."""
    width = int(b.dim * b.ratio)
    size = b.tokens * width * b.item
    x, bias = b.random(b.tokens, width), b.random(width)
    return [
        Case(
            "context",
            f"{b.tokens} x {width}",
            (x, bias),
            eager=bias_gelu_reference.bias_gelu,
            own=_own(b, bias_gelu_native.unsupported(x, bias), bias_gelu_op),
            bytes=(2 * size, 3 * size),
        )
    ]


def predictor_ops(b: Batch) -> list[Case]:
    """The predictor's input, and the read-out of its mask tokens."""
    p, width = b.packed, PREDICTOR_DIM
    layout = p.context_index, p.context_cu_seqlens, p.target_index, p.sequences
    readout = p.context_cu_seqlens, p.targets, p.sequences, p.target_size
    positions = b.random(b.patches, width, grad=False)
    masked = p.target_index.numel() * p.contexts
    row = width * b.item
    return [
        Case(
            "tokens",
            f"{b.tokens} -> {b.predictor_tokens} x {width}",
            (b.random(b.tokens, width), b.random(width)),
            eager=lambda context, mask: predictor_reference.predictor_tokens(
                context, mask, positions, *layout, p.patches
            ),
            own=_triton(b, lambda context, mask: predictor_tokens(context, mask, positions, p)),
            bytes=((b.tokens + b.predictor_tokens + b.patches) * row, (b.tokens + b.predictor_tokens) * row),
        ),
        Case(
            "read-out",
            f"{b.predictor_tokens} -> {masked} x {width}",
            (b.random(b.predictor_tokens, width),),
            eager=lambda tokens: predictor_reference.predictor_readout(tokens, *readout),
            own=_triton(b, lambda tokens: predictor_readout(tokens, p)),
            bytes=(2 * masked * row, (masked + b.predictor_tokens) * row),
        ),
    ]


def target_loss(b: Batch) -> list[Case]:
    """The loss; its forward makes the gradient, so that only both passes together compare."""
    index, rows = b.packed.prediction_rows, b.packed.union_index.shape[0]
    features = b.random(rows, b.dim, grad=False)
    count = index.shape[0]
    return [
        Case(
            "smooth L1",
            f"{count} of {rows} x {b.dim}",
            (b.random(count, b.dim), features, index),
            eager=lambda predictions, features, index: target_loss_reference.target_loss(
                predictions, features, index, "smooth_l1"
            ),
            own=_triton(
                b, lambda predictions, features, index: target_loss_op(predictions, features, index, "smooth_l1")
            ),
            bytes=((2 * count + rows) * b.dim * b.item, 0),
        )
    ]


def sigreg(b: Batch) -> list[Case]:
    """Of the images' pooled features, along 256 directions."""
    slices, directions = 256, F.normalize(b.random(b.dim, 256, grad=False, dtype=torch.float32), dim=0)
    seen = 4 * b.images * slices
    return [
        Case(
            "pooled",
            f"{b.images} x {b.dim} along {slices}",
            (b.random(1, b.images, b.dim, dtype=torch.float32), directions),
            eager=sigreg_reference.sigreg,
            own={"triton" if b.on_gpu else "cpu": sigreg_op},
            bytes=(seen + 4 * b.dim * (b.images + slices), 2 * seen + 4 * b.dim * (b.images + slices)),
        )
    ]


def adamw_ema(b: Batch) -> list[Case]:
    """The encoder's parameters: flat, as ZeRO holds them, for Triton and the reference; a list for all others."""
    with torch.device("meta"):
        encoder = Encoder(b.model.crop, b.model.patch, b.dim, b.depth, b.heads, b.ratio)
    shapes = [p.shape for p in encoder.parameters()]
    count = sum(shape.numel() for shape in shapes)
    low = b.dtype != torch.float32
    flat = {name: b.random(count, grad=False, dtype=torch.float32) for name in ("param", "exp_avg", "ema")}
    flat |= {"grad": b.random(count, grad=False), "exp_avg_sq": flat["param"].square()}
    if low:
        flat |= {name: torch.empty_like(flat["grad"]) for name in ("param_out", "ema_out")}
    lists = _lists(shapes, b)
    momentum = dict(momentum=MOMENTUM)
    own = _triton(b, lambda: adamw_op.adamw_ema_(**flat, **HYPERPARAMETERS, **momentum))
    if not b.on_gpu and native.available():
        own = {"csrc": lambda: adamw_op.adamw_ema_multi_(**lists, **HYPERPARAMETERS, **momentum)}
    scalars = adamw_op.step_scalars(**HYPERPARAMETERS, **momentum)
    return [
        Case(
            "encoder",
            f"{count:,} parameters in {len(shapes)} tensors",
            (),
            eager=partial(adamw_reference.adamw_ema_, **flat, scalars=scalars),
            libraries=_optimisers(lists, low),
            own=own,
            comparable=False,
            bytes=(count * (b.item + 32 + (2 * b.item if low else 0)), 0),
        )
    ]


def _lists(shapes, b: Batch) -> dict[str, list[torch.Tensor]]:
    """Arguments of adamw_ema_multi_: a tensor per parameter."""

    def made(dtype=torch.float32):
        return [b.random(*shape, grad=False, dtype=dtype) for shape in shapes]

    lists = {"params": made(), "grads": made(b.dtype), "exp_avgs": made(), "emas": made()}
    lists["exp_avg_sqs"] = [p.square() for p in lists["params"]]
    if b.dtype != torch.float32:
        lists |= {"param_out": made(b.dtype), "ema_out": made(b.dtype)}
    return lists


def _optimisers(lists: dict[str, list[torch.Tensor]], low: bool) -> dict[str, Callable]:
    """The published loop, which makes no low-precision copies, and the fastest that PyTorch has."""
    params, emas = lists["params"], lists["emas"]
    for param, grad in zip(params, lists["grads"]):
        param.grad = grad.float()
    h = HYPERPARAMETERS
    options = dict(lr=h["lr"], betas=(h["beta1"], h["beta2"]), eps=h["eps"], weight_decay=h["weight_decay"])
    plain, fused = torch.optim.AdamW(params, **options), torch.optim.AdamW(params, **options, fused=True)

    @torch.no_grad()
    def published():
        plain.step()
        for ema, param in zip(emas, params):
            ema.mul_(MOMENTUM).add_((1 - MOMENTUM) * param)

    @torch.no_grad()
    def library():
        fused.step()
        torch._foreach_lerp_(emas, params, 1 - MOMENTUM)
        if low:
            torch._foreach_copy_(lists["param_out"], params)
            torch._foreach_copy_(lists["ema_out"], emas)

    return {"published loop": published, "AdamW fused, foreach": library}


def mask_sampler(b: Batch) -> list[Case]:
    """Blocks of the middle of the published scales, for a published batch on every device. NumPy is the reference."""
    images = b.model.batch
    target = tuple(round(side * 0.175**0.5) for side in b.grid)
    context = tuple(round(side * 0.925**0.5) for side in b.grid)
    arguments = images, b.grid, 4, target, 1, context, min(10, b.patches // 16), False
    key = sampler_op.Key(0, 0, 0)

    def reference():
        return tuple(torch.from_numpy(x) for x in sampler_reference.sample_blocks(key, *arguments))

    own = {"csrc": partial(sampler_op.sample_blocks, key, *arguments)} if native.available() else {}
    own |= _triton(b, partial(sampler_op.sample_blocks, key, *arguments, device=b.device))
    shape = f"{images} images of {b.grid[0]} x {b.grid[1]}"
    return [Case("blocks", shape, (), eager=reference, own=own, compiles=False)]


def fp8(b: Batch) -> list[Case]:
    """In the target encoder: residual addition, LayerNorm and the MLP's first product, whose rival is bf16's."""
    rows, hidden = b.images * b.patches, int(b.dim * b.ratio)
    tensors = b.random(rows, b.dim, grad=False), b.random(rows, b.dim, grad=False)
    weights = b.random(b.dim, grad=False), b.random(b.dim, grad=False)
    matrix = b.random(hidden, b.dim, grad=False)
    quantised = fp8_op.quantise(matrix)

    def eager(x, residual, weight, bias):
        return F.linear(layer_norm_reference.layer_norm(x, weight, bias, 1e-6, residual)[0], matrix)

    def own(x, residual, weight, bias):
        values, scale, _ = fp8_op.layer_norm_quantise(x, residual, weight, bias, 1e-6)
        return fp8_op.scaled_linear((values, scale), quantised)

    return [
        Case(
            "target",
            f"{rows} x {b.dim} -> {hidden}",
            (*tensors, *weights),
            eager=eager,
            own=_triton(b, own),
            bytes=((3 * rows * b.dim + rows * hidden) * b.item + hidden * b.dim, 0),
            flops=(2 * rows * b.dim * hidden, 0),
        )
    ]


def linear(b: Batch) -> list[Case]:
    """The first product of the context encoder's MLP. On a GPU the op is the reference, cuBLAS's."""
    hidden = int(b.dim * b.ratio)
    x, weight, bias = b.random(b.tokens, b.dim), b.random(hidden, b.dim), b.random(hidden)
    moved = (b.tokens * (b.dim + hidden) + hidden * b.dim) * b.item
    return [
        Case(
            "context",
            f"{b.tokens} x {b.dim} -> {hidden}",
            (x, weight, bias),
            eager=linear_reference.linear,
            own={"cpu": linear_op} if linear_cpu.unsupported(x, weight) is None else {},
            bytes=(moved + hidden * b.item, moved + (b.tokens * b.dim + hidden * b.dim + hidden) * b.item),
            flops=(2 * b.tokens * b.dim * hidden, 4 * b.tokens * b.dim * hidden),
        )
    ]


def resize(b: Batch) -> list[Case]:
    """Crop windows to the size of training, on the CPU, where the data loader does it."""
    if b.on_gpu:
        return []
    images = [torch.randint(256, (300, 400, 3), dtype=torch.uint8) for _ in range(b.images)]
    out = torch.empty(b.images, b.model.crop, b.model.crop, 3, dtype=torch.uint8)
    return [
        Case(
            "windows",
            f"{b.images} x 300 x 400 -> {b.model.crop} x {b.model.crop}",
            (),
            eager=partial(resize_reference.resize_, out, images, "bilinear"),
            libraries={"F.interpolate": partial(resize_cpu.resize_cpu_, images, False, out)},
            own={"csrc": partial(resize_op, out, images, "bilinear")} if native.available() else {},
            compiles=False,
            comparable=False,
            bytes=(sum(image.numel() for image in images) + out.numel(), 0),
        )
    ]


def _triton(b: Batch, function: Callable) -> dict[str, Callable]:
    return {"triton": function} if b.on_gpu else {}


def _own(b: Batch, unsupported: str | None, function: Callable) -> dict[str, Callable]:
    """An op that csrc has loops for, too, on a CPU, unless they do not take the tensors."""
    return {"csrc": function} if unsupported is None else _triton(b, function)


# In the order in which they matter to a step; the names are those of the folders in kernels/.
OPS: dict[str, Callable[[Batch], list[Case]]] = {
    "varlen_attention": varlen_attention,
    "layer_norm": layer_norm,
    "adamw_ema": adamw_ema,
    "predictor_tokens": predictor_ops,
    "target_loss": target_loss,
    "bias_gelu": bias_gelu,
    "masked_gather": masked_gather,
    "patchify": patchify,
    "mask_sampler": mask_sampler,
    "fp8": fp8,
    "sigreg": sigreg,
    "linear": linear,
    "resize": resize,
}
