"""I-JEPA's step in strong stock PyTorch: what a good engineer gets without a kernel of their own.

Against plain.py: uint8 images normalised on the device, only the kept patches embedded, the fastest attention there is,
bfloat16 autocast without a scaler, torch.compile, fused AdamW, a foreach EMA, and nothing read back from the device.
Sequences must be of equal length, so the context is truncated as published. Weights stored in bfloat16 instead of
autocast were tried on a CPU and are slower: .6 of the speed at the quickstart's sizes, .8 at S/16.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.baselines.plain import Encoder, Predictor
from bench.baselines.plain_vit import parameter_groups, set_rates, written_out_attention
from bench.timing import synchronise


def gather(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """x (B, N, D), mask (M, B, K) -> (M*B, K, D), mask-major."""
    image = torch.arange(len(x), device=x.device)[:, None]
    return x[image, mask].flatten(0, 1)


class StrongStep:
    """One training step of I-JEPA on one process.

    Args:
        encoder: of plain.py; so is predictor.
        predictor: likewise.
        compile: torch.compile, with dynamic token counts: "whole", the loss as one graph; "blocks", each block alone,
            which costs a model of 32 blocks minutes less to compile; None, nothing.
        mean: (3,) of the images, in units of 0..1.
        std: (3,) likewise.
        device: to run on.
        autocast: bfloat16 autocast.
    """

    def __init__(self, encoder: Encoder, predictor: Predictor, mean, std, device="cpu", autocast=False, compile=None):
        self.device, self.autocast = torch.device(device), autocast
        self.encoder = encoder.to(device)
        self.predictor = predictor.to(device)
        self.target_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
        self.patch, self.heads = encoder.patch_embed.proj.kernel_size[0], encoder.blocks[0].attn.heads
        self.mean, self.std = (torch.tensor(x, device=device)[:, None, None] for x in (mean, std))
        groups = parameter_groups(self.encoder, self.predictor)
        self.optimizer = torch.optim.AdamW(groups, fused=True)
        self.averaged = list(self.target_encoder.parameters())
        self.trained = list(self.encoder.parameters())
        self.loss = torch.compile(self._loss, dynamic=True) if compile == "whole" else self._loss
        if compile == "blocks":
            for block in (*self.encoder.blocks, *self.target_encoder.blocks, *self.predictor.predictor_blocks):
                block.compile(dynamic=True)

    def use_fastest_attention(self, batch: int, tokens: int, dim: int) -> str:
        """Measure the attentions on a training shape of the encoder and keep the fastest; -> its name."""
        name, attend = fastest_attention(batch, self.heads, tokens, dim // self.heads, self.device, self.autocast)
        for network in (self.encoder, self.predictor, self.target_encoder):
            for block in getattr(network, "blocks", None) or network.predictor_blocks:
                block.attn.attend = attend
        return name

    def patches(self, images: torch.Tensor) -> torch.Tensor:
        """`images` uint8 (B, H, W, 3) -> normalised patches (B, N, 3*P*P)."""
        x = (images.permute(0, 3, 1, 2) / 255.0 - self.mean) / self.std
        x = x.unflatten(3, (-1, self.patch)).unflatten(2, (-1, self.patch))  # (B, 3, h, P, w, P)
        return x.permute(0, 2, 4, 1, 3, 5).flatten(1, 2).flatten(2)

    def _encode(self, encoder: Encoder, patches: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        projection = encoder.patch_embed.proj
        x = F.linear(patches, projection.weight.flatten(1), projection.bias) + positions
        for block in encoder.blocks:
            x = block(x)
        return encoder.norm(x)

    def _loss(self, images, context, target) -> torch.Tensor:
        """`images` uint8 (B, H, W, 3), `context` (C, B, Kc), `target` (M, B, K) int64 -> smooth-L1 loss."""
        contexts, count, _ = context.shape
        patches = self.patches(images)
        with torch.no_grad():
            features = self._encode(self.target_encoder, patches, self.target_encoder.pos_embed)
            targets = gather(F.layer_norm(features, features.shape[-1:]), target).unflatten(0, (-1, 1, count))
        positions = self.encoder.pos_embed[0][context.flatten(0, 1)]
        x = self.predictor.predictor_embed(self._encode(self.encoder, gather(patches, context), positions))
        table = self.predictor.predictor_pos_embed[0]
        x = x + table[context.flatten(0, 1)]
        masked = (table[target] + self.predictor.mask_token[0])[:, None].expand(-1, contexts, -1, -1, -1)
        x = x.unflatten(0, (1, contexts, count)).expand(len(target), -1, -1, -1, -1)
        x = torch.cat([x, masked.to(x.dtype)], dim=3).flatten(0, 2)
        for block in self.predictor.predictor_blocks:
            x = block(x)
        x = self.predictor.predictor_norm(x[:, context.shape[2] :])
        predictions = self.predictor.predictor_proj(x).unflatten(0, (-1, contexts, count))
        return F.smooth_l1_loss(predictions, targets.expand_as(predictions))

    def loss_of(self, batch) -> torch.Tensor:
        """The loss of `batch` = (uint8 images, context (C, B, Kc), target (M, B, K)) in host memory."""
        batch = [x.to(self.device, non_blocking=True) for x in batch]
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.autocast):
            return self.loss(*batch)

    def __call__(self, batch, lr=1e-3, weight_decay=0.04, momentum=0.996) -> torch.Tensor:
        """One step on `batch`, see `loss_of` -> the loss, on the device."""
        set_rates(self.optimizer, lr, weight_decay)
        loss = self.loss_of(batch)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(self.averaged, self.trained, 1 - momentum)
        return loss.detach()


def sdpa(q, k, v, backend: SDPBackend):
    """scaled_dot_product_attention on one backend."""
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v)


def fastest_attention(batch, heads, tokens, head_dim, device, low_precision) -> tuple[str, Callable]:
    """The attention with the shortest forward and backward at (batch, heads, tokens, head_dim), and its name.

    On a CPU the one written out is among them: PyTorch's own backward in bfloat16 is the slower of the two there.
    """
    cuda = device.type == "cuda"
    names = ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION") if cuda else ("FLASH_ATTENTION", "MATH")
    choices = {name: partial(sdpa, backend=getattr(SDPBackend, name)) for name in names}
    if not cuda:
        choices["written out"] = written_out_attention
    dtype = torch.bfloat16 if low_precision else torch.float32
    q = torch.randn(batch, heads, tokens, head_dim, device=device, dtype=dtype, requires_grad=True)
    times = {}
    for name, attend in choices.items():
        try:
            for _ in range(3):
                attend(q, q, q).sum().backward()
        except RuntimeError:  # this build, GPU, dtype or head width is outside what the backend supports
            continue
        synchronise(device.type)
        start = time.perf_counter()
        for _ in range(10):
            attend(q, q, q).sum().backward()
        synchronise(device.type)
        times[name] = time.perf_counter() - start
    if not times:
        return "default", F.scaled_dot_product_attention
    best = min(times, key=times.get)
    return best, choices[best]
