"""A set of images that lies decoded in memory, the host's or a GPU's, and is cropped there.

On the device a crop is two products: the rows and columns of an antialiased resize are weights of all rows and columns
of an image, zero outside of its window, so that windows of any size make one batch. Windows and mirroring are drawn
where they always are (data/crops.py): a run in memory sees the crops of one that reads files.
Shapes: B images, H x W pixels of one, h x w of a crop, C channels.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch

from ijepa_fast.data import Size, size_of
from ijepa_fast.data.arrays import INTERPOLATIONS

IN_PLACE = "device"  # the value of data.memory
SHARE = 0.5  # of the memory that is free when a run begins may be images; networks and batches want the rest
_REACH = dict(zip(INTERPOLATIONS, (1.0, 2.0)))  # of the filters, pixels
_CUBIC = -0.5  # the parameter of Pillow's bicubic filter, and of PyTorch's antialiased one
_MOST = {torch.uint8: 255, torch.uint16: 65535}


class Room:
    """What of a device's memory images may take, and whether all of a set will: asked image by image."""

    def __init__(self, device: str | torch.device, count: int, free: int | None = None):
        self.device, self.count = torch.device(device), count
        self.bytes = int(SHARE * (free_bytes(self.device) if free is None else free))
        self.held = self.images = 0

    def take(self, size: int) -> None:
        """Count an image of `size` bytes. Raises ValueError as soon as the set is seen not to fit."""
        self.held, self.images = self.held + size, self.images + 1
        # Of the first images only their mean is known of the others; it decides early where the case is clear.
        expected = self.held if self.images < 32 else self.held / self.images * self.count
        if max(self.held, expected) > self.bytes:
            whole = self.held / self.images * self.count
            other = "true, which keeps them in the host's, or false" if self.device.type == "cuda" else "false"
            raise ValueError(
                f"data.memory: {self.count} decoded images take some {_size(whole)}, and {_size(self.bytes)} of the "
                f"memory of {self.device} may be theirs; set data.memory={other}"
            )


def free_bytes(device: torch.device) -> int:
    """Free memory, bytes: of a GPU; of the host this process's share, within the limit of its container."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        found += [int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")]
    except OSError:
        pass
    try:
        limit, used = (Path(f"/sys/fs/cgroup/memory.{name}").read_text().strip() for name in ("max", "current"))
        found += [] if limit == "max" else [int(limit) - int(used)]
    except (OSError, ValueError):
        pass
    return max(0, min(found)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


class ResidentDecoder:
    """Stands where decode.Decoder does: crops images that lie on the device, tensors (H, W, C), and decodes nothing."""

    def __init__(
        self,
        *,
        crop: int | Size,
        interpolation: str,
        flip: bool,
        device: str | torch.device,
        threads: int = 1,
        hw_decoder_load: float = 0.0,
    ):
        if interpolation not in INTERPOLATIONS:
            raise ValueError(f"interpolation: expected one of {', '.join(INTERPOLATIONS)}, got {interpolation!r}")
        self.crop, self.interpolation, self.flip = size_of(crop), interpolation, flip
        self.device = torch.device(device)
        self.stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def run(self, works: Iterable[tuple], batch_size: int, depth: int = 2) -> Iterator[torch.Tensor]:
        """Per work a tensor (B, h, w, C) of the images' depth."""
        for images, start, shape, *flip in works:
            with torch.cuda.stream(self.stream):
                out = crops(images, start, shape, self.crop, self.interpolation, *flip)
            if self.stream is not None:
                self.stream.synchronize()  # only the loader's thread waits
            yield out

    def reason(self, error: RuntimeError, encoded: torch.Tensor) -> str:
        """Why an image cannot be cropped."""
        return str(error)

    def healthy(self) -> bool:
        """False: what fails here is the device's, and no file is at fault."""
        return False

    def close(self) -> None:
        """Nothing is held."""


def crops(
    images: list[torch.Tensor],
    start: np.ndarray,
    shape: np.ndarray,
    size: Size,
    interpolation: str,
    flip: np.ndarray | None = None,
) -> torch.Tensor:
    """Crops (B, h, w, C) of `size`, on the device and of the depth of `images`, B tensors (H, W, C).

    start, shape: (B, 2), x and y, width and height of each window. flip: (B,), 1 to mirror.
    """
    device, dtype = images[0].device, images[0].dtype
    if len({image.shape for image in images}) > 1:  # windows of them, side by side
        parts, (width, height) = [], shape.max(0).tolist()
        for image, (x, y), (w, h) in zip(images, start.tolist(), shape.tolist()):
            part = image.new_zeros(height, width, image.shape[2])
            part[:h, :w] = image[y : y + h, x : x + w]
            parts.append(part)
        images, start = parts, np.zeros_like(start)
    pixels = _wide(torch.stack([_narrow(image) for image in images]), dtype)
    rows = weights(start[:, 1], shape[:, 1], pixels.shape[1], size[0], interpolation, device)
    columns = weights(start[:, 0], shape[:, 0], pixels.shape[2], size[1], interpolation, device)
    if flip is not None:
        mirrored = torch.from_numpy(np.ascontiguousarray(flip)).to(device).bool()
        columns = torch.where(mirrored[:, None, None], columns.flip(1), columns)
    out = torch.einsum("bphw,bqw->bphq", pixels.permute(0, 3, 1, 2), columns)
    out = torch.einsum("bph,bchq->bpqc", rows, out)
    if dtype in _MOST:
        out = out.round_().clamp_(0, _MOST[dtype])
        return out.to(torch.uint8) if dtype == torch.uint8 else out.to(torch.int32).to(torch.int16).view(torch.uint16)
    return out.contiguous()


def weights(
    start: np.ndarray, length: np.ndarray, pixels: int, out: int, interpolation: str, device: torch.device
) -> torch.Tensor:
    """Float32 (B, out, pixels): what each pixel along one axis adds to each pixel of an antialiased resize.

    start, length: (B,) of the windows. A window's rows sum to one; what lies outside of it adds nothing.
    """
    first, count = (
        torch.from_numpy(np.ascontiguousarray(x)).to(device).double()[:, None, None] for x in (start, length)
    )
    scale = count / out
    place = torch.arange(pixels, device=device, dtype=torch.float64) - first
    centre = (torch.arange(out, device=device, dtype=torch.float64)[:, None] + 0.5) * scale
    x = ((place + 0.5 - centre) / scale.clamp_min(1)).abs_()
    if interpolation == "bilinear":
        filtered = (1 - x).clamp_min_(0)
    else:
        near = ((_CUBIC + 2) * x - (_CUBIC + 3)) * x * x + 1
        far = ((x - 5) * x + 8) * x * _CUBIC - 4 * _CUBIC
        filtered = torch.where(x < 1, near, torch.where(x < _REACH[interpolation], far, torch.zeros_like(x)))
    filtered = filtered * ((place >= 0) & (place < count))
    return (filtered / filtered.sum(2, keepdim=True)).float()


def _narrow(image: torch.Tensor) -> torch.Tensor:
    """A view that every op takes: few take 16-bit words without a sign."""
    return image.view(torch.int16) if image.dtype == torch.uint16 else image


def _wide(images: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What `_narrow` made, as float32."""
    return (images.to(torch.int32) & 0xFFFF).float() if dtype == torch.uint16 else images.float()


def on_device(pixels: np.ndarray, device: str | torch.device) -> torch.Tensor:
    """An image (H, W, C) as a tensor there."""
    return torch.from_numpy(np.ascontiguousarray(pixels)).to(device)
