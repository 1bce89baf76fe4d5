"""I-JEPA's step in strong stock PyTorch: what a good engineer gets without a kernel of their own.

Against plain.py: uint8 images normalised on the device, only the kept patches embedded, the fastest backend of
scaled_dot_product_attention, bfloat16 autocast without a scaler, torch.compile, fused AdamW, a foreach EMA, and nothing
read back from the device. Sequences must be of equal length, so the context is truncated as published.
"""

from __future__ import annotations

import copy
import time
from functools import partial

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.baselines.plain import Encoder, Predictor
from bench.baselines.plain_vit import parameter_groups, set_rates


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
        self.backend = None

    def use_fastest_attention(self, batch: int, tokens: int, dim: int) -> str:
        """Measure the attention backends on a training shape of the encoder and keep the fastest; -> its name."""
        self.backend = fastest_backend(batch, self.heads, tokens, dim // self.heads, self.device, self.autocast)
        attend = partial(sdpa, backend=self.backend)
        for network in (self.encoder, self.predictor, self.target_encoder):
            for block in getattr(network, "blocks", None) or network.predictor_blocks:
                block.attn.attend = attend
        return self.backend.name if self.backend else "default"

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


def sdpa(q, k, v, backend=None):
    """scaled_dot_product_attention on one backend, or on PyTorch's own choice."""
    if backend is None:
        return F.scaled_dot_product_attention(q, k, v)
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v)


def fastest_backend(batch, heads, tokens, head_dim, device, low_precision) -> SDPBackend | None:
    """The backend with the shortest forward and backward at (batch, heads, tokens, head_dim); None on a CPU."""
    if device.type != "cuda":
        return None
    dtype = torch.bfloat16 if low_precision else torch.float32
    q = torch.randn(batch, heads, tokens, head_dim, device=device, dtype=dtype, requires_grad=True)
    times = {}
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
        try:
            for _ in range(3):
                sdpa(q, q, q, backend).sum().backward()
        except RuntimeError:  # this build, GPU, dtype or head width is outside what the backend supports
            continue
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(10):
            sdpa(q, q, q, backend).sum().backward()
        torch.cuda.synchronize(device)
        times[backend] = time.perf_counter() - start
    return min(times, key=times.get) if times else None
