"""Data sets as a user writes them, for tests: functions that `data.source=tests.my_data:<name>` names."""

import numpy as np
import torch
from PIL import Image

from tests.data_images import encode, photographs

COUNT = 12


def picture(index: int) -> Image.Image:
    """A cut-out of a photograph, none like another."""
    return photographs()[index % 2].crop((index * 20, index * 10, index * 20 + 60, index * 10 + 50))


class Mine(torch.utils.data.Dataset):
    """Items made by a function of their number."""

    def __init__(self, make, **more):
        self.make = make
        self.__dict__.update(more)

    def __len__(self):
        return COUNT

    def __getitem__(self, index):
        if not 0 <= index < COUNT:
            raise IndexError(index)
        return self.make(index)


def pictures():
    """PIL images with labels, as torchvision's data sets give them."""
    targets = [index % 2 for index in range(COUNT)]
    return Mine(lambda i: (picture(i), i % 2), targets=targets, classes=["china", "flower"])


def arrays():
    """The same as uint8 (C, H, W)."""
    return Mine(lambda i: torch.from_numpy(np.asarray(picture(i)).copy()).permute(2, 0, 1))


def files():
    """The same as bytes of JPEG files."""
    return Mine(lambda i: {"image": {"bytes": encode(picture(i), quality=95), "path": None}})


def deep():
    """Five channels of 16 bits."""
    return Mine(lambda i: np.full((5, 40, 30), 1000 * i + 7, np.uint16) + np.arange(30, dtype=np.uint16))


class Column:
    """A feature of a Hugging Face data set."""

    names = ("china", "flower")


class HuggingFace:
    """What a datasets.Dataset is to a reader: a length, features, columns and rows."""

    def __init__(self):
        self.features = {"image": object(), "label": Column()}

    def __len__(self):
        return COUNT

    def __getitem__(self, key):
        if key == "label":
            return [index % 2 for index in range(COUNT)]
        return {"image": picture(key), "label": key % 2}


def stream():
    """A pipeline that can only be iterated over, as WebDataset's."""
    return ({"jpg": encode(picture(i), quality=95), "cls": i % 2, "__key__": str(i)} for i in range(COUNT))


def empty():
    """Nothing."""
    return []


def words():
    """No images."""
    return Mine(lambda i: {"text": "hello"})


def number():
    """No data set."""
    return 3
