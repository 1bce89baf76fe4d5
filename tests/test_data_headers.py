"""Headers of image files: sizes as viewers show them, and the reasons against files that cannot be used."""

import io
import re
import struct
import zlib

import numpy as np
import pytest

pytest.importorskip("hypothesis")
pytest.importorskip("PIL")

from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from ijepa_fast.data.check import check, main
from ijepa_fast.data.headers import BadImage, read_header, screen
from tests.data_images import bad_kinds, encode, good_kinds, photographs, write_photos, write_tar


@pytest.mark.parametrize("name", list(good_kinds()))
def test_sizes_are_those_after_turning(name):
    data = good_kinds()[name]
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert screen(data) == (image.height, image.width)


def test_big_endian_exif_counts_too():
    photo = Image.new("RGB", (40, 20))
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
    file = io.BytesIO()
    photo.save(file, "JPEG", exif=exif)
    assert screen(file.getvalue()) == (40, 20)


def tiff(entries, order=">", cut=0, at=8):
    """An EXIF block whose first directory has these entries (tag, type, count, value), without its last `cut` bytes."""
    block = struct.pack(order + "2sHI", b"MM" if order == ">" else b"II", 42, at) + bytes(at - 8)
    block += struct.pack(order + "H", len(entries)) + b"".join(
        struct.pack(order + ("HHIHH" if kind == 3 else "HHII"), tag, kind, count, value, *[0] * (kind == 3))
        for tag, kind, count, value in entries
    )
    block += bytes(4)
    return block[: len(block) - cut]


def with_exif(kind, block, copies=1, late=False):
    """A file of 60 x 40 pixels with this EXIF block."""
    photo = photographs()[0].resize((60, 40))
    if kind == "jpeg":
        data, segment = encode(photo), b"Exif\0\0" + block
        at = data.index(b"\xff\xda") if late else 2
        return data[:at] + copies * (b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment) + data[at:]
    if kind == "png":
        data, chunk = encode(photo, "PNG"), b"eXIf" + block
        at = len(data) - 12 if late else 33
        chunk = struct.pack(">I", len(block)) + chunk + struct.pack(">I", zlib.crc32(chunk))
        return data[:at] + copies * chunk + data[at:]
    pixels = encode(photo, "WEBP")[12:]
    extended = b"VP8X" + struct.pack("<II", 10, 8) + (59).to_bytes(3, "little") + (39).to_bytes(3, "little")
    chunk = copies * (b"EXIF" + struct.pack("<I", len(block)) + block + bytes(len(block) % 2))
    body = b"WEBP" + extended + (pixels + chunk if late else chunk + pixels)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def decoded_size(data):
    """Height and width of the image that the decoder makes."""
    dali = pytest.importorskip("nvidia.dali")
    pipe = dali.Pipeline(1, 1, None)
    with pipe:
        pipe.set_outputs(dali.fn.decoders.image(dali.fn.external_source(lambda: [np.frombuffer(data, np.uint8)])))
    return np.asarray(pipe.run()[0][0]).shape[:2]


TAGS = [0x112, 0x10F, 0x11A, 0x128, 0x131, 0x213, 0x8769, 0x9999]
ENTRY = st.tuples(st.sampled_from(TAGS), st.sampled_from([2, 3, 4, 5]), st.integers(0, 9), st.integers(0, 60))


@settings(max_examples=100, deadline=None)
@given(
    kind=st.sampled_from(["jpeg", "png", "webp"]),
    entries=st.lists(ENTRY, max_size=3),
    turn=st.integers(0, 9),
    place=st.integers(0, 3),
    order=st.sampled_from("<>"),
    cut=st.sampled_from([0, 0, 0, 4, 5, 6, 14]),
    at=st.sampled_from([8, 9, 12]),
    copies=st.sampled_from([1, 1, 2]),
    late=st.booleans(),
)
def test_sizes_are_those_of_the_decoder_whatever_the_exif(kind, entries, turn, place, order, cut, at, copies, late):
    entries = [*entries[:place], (0x112, 3, 1, turn), *entries[place:]]
    data = with_exif(kind, tiff(entries, order, cut, at), copies, late)
    try:
        size = screen(data)
    except BadImage as error:
        assert kind == "png"
        assert "eXIf" in str(error)  # noqa: PT017
    else:
        assert size == decoded_size(data)


@pytest.mark.parametrize("late", [False, True], ids=["before the image data", "after them"])
@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
@pytest.mark.parametrize("turn", range(1, 9))
def test_every_turn_in_every_format(turn, kind, late):
    data = with_exif(kind, tiff([(0x10F, 2, 4, 0), (0x112, 3, 1, turn)]), late=late)
    expected = (60, 40) if turn > 4 else (40, 60)
    assert screen(data) == decoded_size(data) == expected


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (lambda: with_exif("png", tiff([(0x112, 3, 1, 6)]), copies=2), "two eXIf chunks"),
        (lambda: with_exif("png", tiff([(0x112, 3, 1, 6), (0x10F, 2, 99, 1 << 31)])), "eXIf chunk is damaged"),
        (lambda: with_exif("png", tiff([(0x112, 3, 1, 6)] * 9, cut=60)), "eXIf chunk is damaged"),
    ],
    ids=["two", "wild offset", "cut"],
)
def test_exif_that_would_end_the_decoders_process_is_refused(data, reason):
    with pytest.raises(BadImage, match=reason):
        screen(data())


REASONS = {
    "empty.jpg": "empty file",
    "text.jpg": "not a JPEG, PNG or WebP",
    "gif.jpg": "not a JPEG, PNG or WebP",
    "header_only.jpg": "no image size",
    "no_data.jpg": "no image size",
    "bomb.png": "declares 60000 x 60000 pixels",
    "bomb.jpg": "declares 60000 x 60000 pixels",
    "half_progressive.jpg": "cut short",
    "half_zeros.jpg": r"cut short: its last \d+ bytes are zeros",
    "half.jpg": "cut short",
    "half.png": "cut short",
    "half.webp": "cut short",
}


@pytest.mark.parametrize("name", list(REASONS))
def test_reasons(name):
    with pytest.raises(BadImage, match=REASONS[name]):
        screen(bad_kinds()[name])


def test_the_bound_on_pixels_is_a_setting():
    data = good_kinds()["baseline.jpg"]
    assert screen(data, max_pixels=640 * 427) == (427, 640)
    with pytest.raises(BadImage, match="over the bound of 273279"):
        screen(data, max_pixels=640 * 427 - 1)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_bytes_of_any_kind_give_a_header_or_bad_image(data):
    whole = good_kinds()[data.draw(st.sampled_from(["exif6.jpg", "rgb.png", "turned.webp", "lossless.webp"]))][:700]
    cut = bytearray(whole[: data.draw(st.integers(0, len(whole)))])
    for at, value in data.draw(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 255)), max_size=6)):
        if at < len(cut):
            cut[at] = value
    try:
        header = read_header(bytes(cut))
    except BadImage:
        return
    assert header.height > 0
    assert header.width > 0


def test_check_names_each_bad_file_with_its_reason(tmp_path, capfd):
    write_photos(tmp_path, 70, size=40)
    assert check(str(tmp_path), 2) == 0
    assert "70 files, 0 bad" in capfd.readouterr().out
    for name, data in bad_kinds().items():
        (tmp_path / "class1" / name).write_bytes(data)
    assert main([str(tmp_path), "--processes", "2"]) == 1
    out = capfd.readouterr().out
    assert f"{70 + len(bad_kinds())} files, {len(bad_kinds())} bad" in out
    for name in bad_kinds():
        (line,) = [line for line in out.splitlines() if line.startswith(f"{tmp_path}/class1/{name}: ")]
        assert re.search(REASONS.get(name, ": .{5}"), line)


def test_check_of_nothing_but_bad_files_and_of_shards(tmp_path, capfd):
    write_tar(
        tmp_path / "a.tar", {f"{number}{name}": data for number in range(4) for name, data in bad_kinds().items()}
    )
    assert check(str(tmp_path), 2) == 1
    out = capfd.readouterr().out
    assert f"{4 * len(bad_kinds())} files, {4 * len(bad_kinds())} bad" in out
    assert f"{tmp_path}/a.tar:0empty.jpg: empty file" in out


def test_check_of_a_wrong_path_is_one_sentence_and_exit_2(tmp_path, capfd):
    assert main([str(tmp_path / "nothing")]) == 2
    assert "does not exist; expected a folder" in capfd.readouterr().err
