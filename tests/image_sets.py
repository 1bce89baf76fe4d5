"""Small sets of images that are not RGB of eight bits, in every format, for the tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

COUNT = 24


def bands(channels: int = 13, dtype: str = "uint16", count: int = COUNT, seed: int = 0) -> np.ndarray:
    """Images (count, 40, 44, channels) of two kinds by turns, fine and coarse, no two alike."""
    rng = np.random.default_rng(seed)
    out = []
    for number in range(count):
        cell = 4 if number % 2 else 2
        coarse = rng.integers(100, 4000, (40 // cell, 44 // cell, channels))
        out.append(np.kron(coarse, np.ones((cell, cell, 1), np.int64)))
    return np.stack(out).astype(dtype)


def write_tiff(folder: Path) -> Path:
    """13 channels of 16 bits, a plane after the other, in two class folders."""
    import tifffile

    for number, image in enumerate(bands()):
        path = folder / "ab"[number % 2] / f"{number}.tif"
        path.parent.mkdir(parents=True, exist_ok=True)
        tifffile.imwrite(path, image.transpose(2, 0, 1), photometric="minisblack", compression="zlib")
    return folder


def write_png(folder: Path) -> Path:
    """Grey of 16 bits, in two class folders."""
    for number, image in enumerate(bands(1)):
        path = folder / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[..., 0]).save(path)
    return folder


def write_hdf5(folder: Path) -> Path:
    """Five channels of floats, (N, H, W, C), with labels beside."""
    import h5py

    folder.mkdir(parents=True)
    with h5py.File(folder / "set.h5", "w") as file:
        file["images"], file["labels"] = bands(5, "float32") / 1000, np.arange(COUNT) % 2
    return folder / "set.h5"


def write_zarr(folder: Path) -> Path:
    """Four channels of 16 bits, (N, C, H, W), with labels beside."""
    import zarr

    group = zarr.open_group(folder / "set.zarr", mode="w")
    group.create_array("images", data=bands(4).transpose(0, 3, 1, 2))
    group.create_array("labels", data=np.arange(COUNT) % 2)
    return folder / "set.zarr"


def write_large(folder: Path, side: int = 8000) -> Path:
    """One tiled TIFF, RGB of eight bits."""
    import tifffile

    folder.mkdir(parents=True)
    cells = np.random.default_rng(0).integers(0, 256, (side // 20, side // 20, 3), dtype=np.uint8)
    image = cells.repeat(20, 0).repeat(20, 1)
    tifffile.imwrite(folder / "large.tif", image, tile=(512, 512), photometric="rgb", compression="zlib")
    return folder / "large.tif"
