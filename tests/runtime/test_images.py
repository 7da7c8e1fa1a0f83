from __future__ import annotations

import io
import struct
import zlib
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from moiie_runtime.errors import MoiieError
from moiie_runtime.images import load_image, pixel_values, resized
from moiie_runtime.vision_settings import ImageSettings

PAD = ImageSettings(384, "pad", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 0.00392156862745098, "bicubic")


def golden_settings(golden) -> ImageSettings:
    side = golden.about["pixel_values"]["shape"][-1]
    return replace(PAD, image_size=side, aspect_ratio=golden.about["image_aspect_ratio"])


def test_pixel_values_equal_the_authors_bit_for_bit(golden):
    if not golden.images:
        pytest.skip("a case without pictures")
    found = pixel_values([load_image(path) for path in golden.images], golden_settings(golden))
    assert list(found.shape) == golden.about["pixel_values"]["shape"]
    [name] = [name for name in golden.expected if name.startswith("pixel_values_stride")]
    stride = int(name.removeprefix("pixel_values_stride"))
    np.testing.assert_array_equal(found[:, :, ::stride, ::stride], golden.expected[name], strict=True)
    assert found.sum(dtype=np.float64) == golden.about["pixel_values"]["sum"]


def test_the_resized_picture_equals_the_authors(golden):
    for index, path in enumerate(golden.path.glob("expected_resized_*.png")):
        found = resized(load_image(golden.images[index]), golden_settings(golden))
        np.testing.assert_array_equal(np.asarray(found), np.asarray(Image.open(path)))


@settings(max_examples=40, deadline=None)
@given(
    width=st.integers(1, 90),
    height=st.integers(1, 90),
    size=st.integers(1, 60),
    mean=st.tuples(*[st.floats(0, 1)] * 3),
    band=st.integers(1, 4000),
    seed=st.integers(0, 9),
)
def test_resizing_in_bands_equals_resizing_the_padded_square(width, height, size, mean, band, seed):
    array = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    side = max(width, height)
    square = Image.new("RGB", (side, side), tuple(int(value * 255) for value in mean))
    square.paste(Image.fromarray(array), ((side - width) // 2, (side - height) // 2))
    expected = square.resize((size, size), Image.Resampling.BICUBIC)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moiie_runtime.images._BAND_PIXELS", band)
        found = resized(load_image(array), replace(PAD, image_size=size, mean=mean))
    np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))


@pytest.mark.parametrize("shape", [(1, 10000, 3), (10000, 1, 3)])
def test_a_very_long_picture_works(shape):
    found = resized(load_image(np.zeros(shape, np.uint8)), PAD)
    assert found.getpixel((0, 0)) == (127, 127, 127)
    assert found.getpixel((192, 192)) < (127, 127, 127)


def test_square_aspect_stretches():
    array = np.zeros((10, 30, 3), np.uint8)
    found = resized(load_image(array), replace(PAD, aspect_ratio="square", image_size=8))
    np.testing.assert_array_equal(np.asarray(found), np.zeros((8, 8, 3)))


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_all_sources_give_the_same_picture(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(array), "PNG")
    (tmp_path / "a.png").write_bytes(data)
    for source in (
        array,
        array[:, ::-1][:, ::-1],
        data,
        tmp_path / "a.png",
        str(tmp_path / "a.png"),
        Image.fromarray(array),
    ):
        np.testing.assert_array_equal(np.asarray(load_image(source)), array)


def test_other_modes_become_rgb():
    palette = Image.fromarray(np.zeros((2, 2), np.uint8), "L").convert("P")
    for image in (
        Image.new("L", (2, 2), 128),
        Image.new("RGBA", (2, 2), (1, 2, 3, 0)),
        Image.open(io.BytesIO(encoded(palette, "PNG", transparency=b"\0\1"))),
    ):
        assert load_image(image).mode == "RGB"


def test_the_stored_pixels_are_used_whatever_the_exif_orientation():
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate by 90 degrees to view"
    assert load_image(encoded(Image.new("RGB", (8, 4)), "JPEG", exif=exif)).size == (8, 4)


def png_header(width: int, height: int) -> bytes:
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(30000, 30000), (13400, 13400), (13400, 1), (1, 2**30)])
def test_a_decompression_bomb_is_refused_by_its_header(size):
    with pytest.raises(MoiieError, match="the picture is too large") as caught:
        load_image(png_header(*size))
    assert caught.value.hint


def test_pictures_that_cannot_be_read(tmp_path):
    text = tmp_path / "notes.txt"
    text.write_text("What is shown in the picture?")
    with pytest.raises(MoiieError, match=r"notes\.txt: is not a picture that can be read"):
        load_image(text)
    with pytest.raises(MoiieError, match=r"missing\.png: no such file"):
        load_image(tmp_path / "missing.png")
    with pytest.raises(MoiieError, match="found a directory"):
        load_image(tmp_path)
    with pytest.raises(MoiieError) as caught:
        load_image("https://example.org/a.png")
    assert "download" in caught.value.hint
    with pytest.raises(MoiieError, match="image of 0 bytes: is not a picture"):
        load_image(b"")
    with pytest.raises(MoiieError, match="must be a path, bytes, a PIL image or a numpy array, got int"):
        load_image(3)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"])
def test_a_truncated_picture_is_refused(kind):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), kind)
    load_image(data)
    with pytest.raises(MoiieError, match="damaged or cut short|is not a picture"):
        load_image(data[: len(data) // 2])


@settings(max_examples=150, deadline=None)
@given(data=st.binary(max_size=60), kind=st.sampled_from(["PNG", "JPEG", "GIF", "BMP"]), cut=st.integers(0, 200))
def test_damaged_bytes_give_a_picture_or_a_clear_error(data, kind, cut):
    sound = encoded(Image.new("RGB", (9, 5)), kind)
    try:
        image = load_image(sound[:cut] + data + sound[cut + len(data) :])
    except MoiieError:
        return
    assert image.mode == "RGB"


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 4, 3), np.float32),
        np.zeros((4, 4), np.uint8),
        np.zeros((3, 4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
    ],
)
def test_arrays_of_another_kind_are_refused(array):
    with pytest.raises(MoiieError, match=r"must be uint8 \[height, width, 3\].*, got"):
        load_image(array)


def test_an_empty_array_is_refused():
    with pytest.raises(MoiieError, match="picture is empty"):
        load_image(np.zeros((0, 4, 3), np.uint8))
