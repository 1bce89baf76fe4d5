"""resize: checks, dispatch and registration. csrc implements the schema for x86 with AVX2."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ijepa_fast.kernels.common import native
from ijepa_fast.kernels.common.checks import check_tensor
from ijepa_fast.kernels.common.dispatch import choice
from ijepa_fast.kernels.resize import cpu, reference

native.register("resize_cpu_(Tensor[] images, bool bicubic, Tensor(a!) out) -> ()", cpu)


def resize_(out: torch.Tensor, images: Sequence[torch.Tensor], interpolation: str) -> None:
    """Resize images of any sizes to one size, antialiased as by Pillow, on the calling thread.

    Of bytes of three channels csrc and PyTorch's interpolation differ from Pillow by some levels of 255: they round
    differently. Other images are filtered in fp32, and rounded once where they are integers.

    Args:
        out: (n, H, W, C) uint8, uint16 or float32 on the CPU, written.
        images: n tensors (height, width, C) of the same dtype on the CPU, none of them empty.
        interpolation: bilinear | bicubic. The filter widens where an image shrinks.

    Raises:
        ValueError: for a wrong dtype, shape, device, layout or interpolation.
    """
    device = torch.device("cpu")
    check_tensor("resize", "out", out, (len(images), None, None, None), reference.DTYPES, device)
    for i, image in enumerate(images):
        check_tensor("resize", f"images[{i}]", image, (None, None, out.shape[-1]), out.dtype, device)
        if image.numel() == 0 or out.numel() == 0:
            raise ValueError(f"resize: expected sizes from 1, got {tuple(image.shape)} -> {tuple(out.shape[1:])}")
    if interpolation not in reference.FILTERS:
        wanted = ", ".join(reference.FILTERS)
        raise ValueError(f"resize: interpolation: expected one of {wanted}, got {interpolation!r}")
    if choice("resize") == "reference":
        reference.resize_(out, images, interpolation)
    else:
        torch.ops.ijepa_fast.resize_cpu_(list(images), interpolation == "bicubic", out)
