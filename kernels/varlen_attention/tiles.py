"""Which tiles the Triton kernels use: a table by device family and head dim, never by the number of tokens.

The tiles are the largest that compile for the device without spilling registers. fp32's is for checks only, and its
backward spills. They have not been tuned on a device yet.
"""

from __future__ import annotations

from typing import NamedTuple

MAX_HEAD_DIM = 128


class Tile(NamedTuple):
    """Rows of a query tile and of a key tile, and how its programs are compiled."""

    queries: int
    keys: int
    warps: int
    stages: int


# The columns of the tables: classes of the width that `split` makes of a head dim.
WIDTHS = (32, 64, 80, 96, 128)
FP32 = Tile(32, 32, 4, 1)
FWD = dict.fromkeys(WIDTHS, Tile(64, 64, 4, 2))
BWD_QUERIES = {
    "ampere": {**dict.fromkeys((32, 64, 80), Tile(64, 64, 4, 2)), **dict.fromkeys((96, 128), Tile(64, 64, 8, 2))},
    "hopper": dict.fromkeys(WIDTHS, Tile(64, 64, 4, 2)),
    "blackwell": dict.fromkeys(WIDTHS, Tile(64, 64, 4, 2)),
}
BWD_KEYS = {
    "ampere": {**dict.fromkeys((32, 64), Tile(32, 64, 4, 2)), **dict.fromkeys((80, 96, 128), Tile(32, 64, 8, 2))},
    "hopper": {**dict.fromkeys((32, 64, 80), Tile(64, 64, 4, 2)), 96: Tile(64, 64, 8, 2), 128: Tile(32, 64, 8, 2)},
}
BWD_KEYS["blackwell"] = {**BWD_KEYS["hopper"], 80: Tile(64, 64, 8, 2)}
# The one-pass backward, by the number of keys it holds; a width that is missing would spill.
WHOLE = {
    "ampere": {
        32: (Tile(64, 64, 8, 1), Tile(64, 128, 8, 1), Tile(32, 256, 8, 1)),
        64: (Tile(32, 64, 8, 1), Tile(32, 128, 8, 1)),
    },
    "hopper": {
        32: (Tile(64, 64, 4, 1), Tile(64, 128, 8, 1), Tile(32, 256, 8, 1)),
        64: (Tile(64, 64, 4, 1), Tile(64, 128, 8, 1)),
        80: (Tile(64, 64, 8, 1), Tile(64, 128, 8, 1)),
        96: (Tile(64, 64, 8, 1), Tile(64, 128, 8, 2)),
    },
}
# 64 x 128 at width 96 asks for more tensor memory than a Blackwell multiprocessor has.
WHOLE["blackwell"] = {**WHOLE["hopper"], 96: (Tile(64, 64, 8, 1), Tile(32, 128, 8, 1))}


def split(head_dim: int) -> dict[str, int]:
    """The parts a head dim is multiplied in: one power of two, or two where that is narrower (80 = 64 + 16)."""
    whole = _power_of_2(head_dim)
    half = whole // 2
    tail = _power_of_2(head_dim - half)
    return {"HEAD": half, "TAIL": tail} if half >= 16 and half + tail < whole else {"HEAD": whole, "TAIL": 0}


def fwd_tile(head_dim: int, itemsize: int) -> Tile:
    """Tile of the forward kernel; `itemsize` is that of an element in bytes."""
    return FP32 if itemsize > 2 else FWD[_width(head_dim)]


def bwd_tiles(capability: int, head_dim: int, itemsize: int) -> tuple[Tile, Tile]:
    """Tiles of the backward's query and key kernels on a device of compute capability `capability`.x."""
    if itemsize > 2:
        return FP32, FP32
    family, width = _family(capability), _width(head_dim)
    return BWD_QUERIES[family][width], BWD_KEYS[family][width]


def whole_tiles(capability: int, head_dim: int, itemsize: int) -> tuple[Tile, ...]:
    """Tiles of the one-pass backward, fewest keys first; may be empty."""
    return (FP32,) if itemsize > 2 else WHOLE[_family(capability)].get(_width(head_dim), ())


def _power_of_2(number: int) -> int:
    """The smallest power of two that holds `number`, at least the 16 of a matrix instruction."""
    return max(16, 1 << (number - 1).bit_length())


def _width(head_dim: int) -> int:
    parts = split(head_dim)
    return min(width for width in WIDTHS if width >= parts["HEAD"] + parts["TAIL"])


def _family(capability: int) -> str:
    """Without wgmma (9.x) or tcgen05 (10.x) operands are held in registers: as on Ampere, whatever the age."""
    return {9: "hopper", 10: "blackwell"}.get(capability, "ampere")
