"""The target encoder in fp8: three of a block's four products, which are eleven twelfths of their work.

Shapes: B images, N patches per image, T = B*N tokens, D width, H heads.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from ijepa_fast.kernels.common.timing import seconds
from ijepa_fast.kernels.fp8 import bias_gelu_quantise, layer_norm_quantise, quantise, scaled_linear
from ijepa_fast.kernels.varlen_attention import dense_attention
from ijepa_fast.models.blocks import Block
from ijepa_fast.models.layouts import Dense


class FP8Block(nn.Module):
    """A Block whose qkv, fc1 and fc2 multiply e4m3 rows by e4m3 weights; for dense images and without gradient.

    What attention gives is projected in the model's own precision: it has no producer of this project to quantise it.
    It is compiled where `block` is.
    """

    def __init__(self, block: Block):
        super().__init__()
        self.block = block
        self.layers = block.attn.qkv, block.mlp.fc1, block.mlp.fc2
        with torch.no_grad():
            self.weights = [quantise(layer.weight) for layer in self.layers]
        if block._compiled_call_impl is not None:
            self.compile(dynamic=True)

    @torch.no_grad()
    def refresh(self) -> None:
        """Quantise the weights again, after they changed; in place, as a CUDA graph reads them."""
        for layer, quantised in zip(self.layers, self.weights, strict=True):
            quantise(layer.weight, out=quantised)

    @torch.no_grad()
    def forward(
        self, x: torch.Tensor, branch: torch.Tensor | None, sequences: Dense
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `Block.forward`: residual stream (T, D) and the branch to add to it (T, D) -> the same two."""
        attention, mlp = self.block.attn, self.block.mlp
        norm1, norm2, dtype = self.block.norm1, self.block.norm2, x.dtype
        qkv_weight, fc1_weight, fc2_weight = self.weights
        values, scale, x = layer_norm_quantise(x, branch, norm1.weight, norm1.bias, norm1.eps)
        qkv = scaled_linear((values, scale), qkv_weight, attention.qkv.bias, dtype)
        head_dim = x.shape[1] // attention.heads
        out = dense_attention(qkv.view(sequences.count, -1, 3, attention.heads, head_dim))
        branch = attention.proj(out.reshape(-1, x.shape[1]))
        values, scale, x = layer_norm_quantise(x, branch, norm2.weight, norm2.bias, norm2.eps)
        hidden = scaled_linear((values, scale), fc1_weight, None, dtype)
        return x, scaled_linear(bias_gelu_quantise(hidden, mlp.fc1.bias), fc2_weight, mlp.fc2.bias, dtype)


@torch.no_grad()
def seconds_of(block: Block, images: int, tokens: int) -> tuple[float, float]:
    """Of `block` as it is and in fp8, on `images` sequences of `tokens` random tokens."""
    weight = block.norm1.weight
    x, branch = torch.randn(2, images * tokens, len(weight), device=weight.device, dtype=weight.dtype)
    runs = {name: partial(way, x, branch, Dense(images)) for name, way in (("plain", block), ("fp8", FP8Block(block)))}
    for run in runs.values():  # which compiles
        run()
    found = seconds(runs, weight.device)
    return found["plain"], found["fp8"]
