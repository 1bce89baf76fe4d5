"""Image files for the tests of the data loader: real photographs of every supported kind, and broken files."""

import functools
import io
import tarfile

import numpy as np
from PIL import Image


@functools.cache
def photographs() -> list[Image.Image]:
    """The two photographs that scikit-learn carries, 640 x 427."""
    from sklearn.datasets import load_sample_images

    return [Image.fromarray(image) for image in load_sample_images().images]


def encode(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    """`image` as the bytes of a file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def rotated(image: Image.Image, orientation: int, kind: str = "JPEG") -> bytes:
    """A file whose EXIF says how to turn it."""
    exif = Image.Exif()
    exif[0x112] = orientation
    return encode(image, kind, quality=90, exif=exif)


@functools.cache
def good_kinds() -> dict[str, bytes]:
    """One file of each kind that must decode."""
    photo = photographs()[0]
    kinds = {
        "baseline.jpg": encode(photo, quality=90),
        "progressive.jpg": encode(photo, quality=90, progressive=True),
        "sharp_chroma.jpg": encode(photo, quality=90, subsampling=0),
        "grey.jpg": encode(photo.convert("L"), quality=90),
        "cmyk.jpg": encode(photo.convert("CMYK"), quality=90),
        "rgb.png": encode(photo, "PNG"),
        "alpha.png": encode(photo.convert("RGBA"), "PNG"),
        "palette.png": encode(photo.convert("P"), "PNG"),
        "grey.png": encode(photo.convert("L"), "PNG"),
        "lossy.webp": encode(photo, "WEBP", quality=90),
        "lossless.webp": encode(photo, "WEBP", lossless=True),
        "alpha.webp": encode(photo.convert("RGBA"), "WEBP", quality=90),
        "turned.webp": rotated(photo, 6, "WEBP"),
        "no_end_marker.jpg": encode(photo, quality=90) + b"\0" * 500,
    }
    return kinds | {f"exif{turn}.jpg": rotated(photo, turn) for turn in range(1, 9)}


@functools.cache
def bad_kinds() -> dict[str, bytes]:
    """One file of each kind that cannot be used."""
    photo = photographs()[0]
    jpeg, png, webp = encode(photo, quality=90), encode(photo, "PNG"), encode(photo, "WEBP")
    bomb, jpeg_bomb = bytearray(png), bytearray(jpeg)
    bomb[16:24] = (60000).to_bytes(4, "big") * 2
    size_at = jpeg.index(b"\xff\xc0") + 5
    jpeg_bomb[size_at : size_at + 4] = (60000).to_bytes(2, "big") * 2
    broken_inside = bytearray(png)
    broken_inside[len(png) // 2 : len(png) // 2 + 4000] = bytes(4000)
    return {
        "empty.jpg": b"",
        "text.jpg": b"this is no image\n" * 40,
        "header_only.jpg": jpeg[:40],
        "no_data.jpg": b"\xff\xd8\xff" + b"x" * 1000,
        "half.jpg": jpeg[: len(jpeg) // 2],
        "half_progressive.jpg": (progressive := encode(photo, progressive=True))[: len(progressive) // 2],
        "half_zeros.jpg": jpeg[: len(jpeg) // 2] + bytes(len(jpeg) // 2),
        "half.png": png[: len(png) // 2],
        "half.webp": webp[: len(webp) // 2],
        "bomb.png": bytes(bomb),
        "bomb.jpg": bytes(jpeg_bomb),
        "broken_inside.png": bytes(broken_inside),
        "gif.jpg": encode(photo.convert("P"), "GIF"),
    }


def write_photos(folder, count: int, seed: int = 0, size: int = 96) -> None:
    """`count` JPEG cut-outs of the photographs, of sizes about `size`, in two class folders."""
    rng, photos = np.random.default_rng(seed), photographs()
    for number in range(count):
        photo = photos[number % 2]
        width, height = rng.integers(size * 2 // 3, size * 4 // 3, 2).tolist()
        x, y = rng.integers(0, (photo.width - width, photo.height - height)).tolist()
        file = folder / f"class{number % 2}" / f"{number:04d}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        photo.crop((x, y, x + width, y + height)).save(file, quality=90)


def write_tar(path, members: dict[str, bytes], format: int = tarfile.GNU_FORMAT) -> None:
    """A tar file of these members."""
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
