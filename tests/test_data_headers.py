"""Headers of image files: sizes as viewers show them, and the reasons against files that cannot be used."""

import io
import re

import pytest

pytest.importorskip("hypothesis")
pytest.importorskip("PIL")

from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from ijepa_fast.data.check import check, main
from ijepa_fast.data.headers import BadImage, read_header, screen
from tests.data_images import bad_kinds, good_kinds, write_photos, write_tar


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
