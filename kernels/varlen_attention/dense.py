"""Attention inside whole images without a gradient: PyTorch's backends and this project's kernel, by measurement.

A target encoder attends so in every step, with one number of images and tokens. Which backend is fastest depends on the
width of its heads, on the device and on the versions of the libraries, so it is measured where it is used.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ijepa_fast.kernels.common.timing import seconds

SDPA = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
MARGIN = 1.03  # what is faster than the default by less is not taken: two starts of a run should choose alike
FASTEST: dict[tuple[int, int], str] = {}  # by number and width of the heads: of SDPA, "default" or "triton"


def attend(qkv: torch.Tensor, name: str) -> torch.Tensor:
    """(B, N, 3, H, d) -> (B, N, H, d) by one of SDPA, or by PyTorch's own choice, "default"."""
    q, k, v = qkv.transpose(1, 3).unbind(2)
    if name == "default":
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    with sdpa_kernel(SDPA[name]):
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


@torch.no_grad()
def measure(qkv: torch.Tensor, kernel: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
    """Seconds by backend of a batch `qkv`, the fastest first, which serves heads like these from now on.

    kernel: this project's. What a device, a dtype or a build does not have, or what differs from the default by more
    than bf16's rounding, is left out.
    """
    runs: dict[str, Callable[[], torch.Tensor]] = {"default": lambda: attend(qkv, "default")}
    runs |= {name: lambda name=name: attend(qkv, name) for name in SDPA}  # type: ignore[misc]
    runs["triton"] = lambda: kernel(qkv)
    expected, taken = runs["default"]().float(), {}
    for name, run in runs.items():
        try:
            apart = (run().float() - expected).norm() / expected.norm()
        except (RuntimeError, ImportError):
            continue
        if apart < 2e-2:
            taken[name] = run
    found = dict(sorted(seconds(taken, qkv.device).items(), key=lambda item: item[1]))
    best = next(iter(found))
    FASTEST[qkv.shape[3], qkv.shape[4]] = best if MARGIN * found[best] < found["default"] else "default"
    return found
