# SPDX-License-Identifier: Apache-2.0
"""Image files of all kinds: Pillow's pixels, and TensorFlow's of what is handed to it."""

import io

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, ImageCms

from balpoe_jax.data.images import decoding
from balpoe_jax.data.records import photographs

HEIGHT, WIDTH = 12, 17


def picture(mode: str = "RGB") -> Image.Image:
    random = np.random.default_rng(0)
    coarse = Image.fromarray(random.integers(0, 256, (3, 4, 3)).astype(np.uint8))
    return coarse.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC).convert(mode)


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def deep(colours: bool) -> bytes:
    """A PNG of 16 bits whose lower eight are not its upper ones."""
    values = np.asarray(picture("RGB" if colours else "L"), np.uint16) * 256 + 200
    return tf.io.encode_png(values if colours else values[..., None]).numpy()


def oriented(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(picture(), "JPEG", quality=95, exif=exif)


# Content, and the mode in which it shows the picture, where it does so without loss.
KINDS = {
    "PNG": (encoded(picture()), "RGB"),
    "grey PNG": (encoded(picture("L")), "L"),
    "PNG with a palette": (encoded(picture().quantize(32)), None),
    "PNG with transparency": (encoded(picture("RGBA")), "RGB"),
    "grey PNG with transparency": (encoded(picture("LA")), "L"),
    "PNG with a transparent colour": (encoded(picture(), transparency=(1, 2, 3)), "RGB"),
    "grey PNG of 16 bits": (deep(False), "L"),
    "colour PNG of 16 bits": (deep(True), "RGB"),
    "PNG of one bit": (encoded(picture("1")), "1"),
    "JPEG": (encoded(picture(), "JPEG"), None),
    "progressive JPEG": (encoded(picture(), "JPEG", progressive=True), None),
    "grey JPEG": (encoded(picture("L"), "JPEG"), None),
    "CMYK JPEG": (encoded(picture("CMYK"), "JPEG"), None),
    "WebP": (encoded(picture(), "WEBP", lossless=True), "RGB"),
    "WebP with losses": (encoded(picture(), "WEBP"), None),
    "BMP": (encoded(picture(), "BMP"), "RGB"),
    **{f"orientation {number}": (oriented(number), None) for number in range(1, 9)},
}


@pytest.mark.parametrize("kind", KINDS)
def test_tensorflow_decodes_what_it_is_handed_as_pillow_does(kind: str) -> None:
    content, mode = KINDS[kind]
    pixels = photographs.pixels(content)
    assert pixels.dtype == np.uint8
    if mode is not None:
        np.testing.assert_array_equal(pixels, np.asarray(picture(mode).convert("RGB")))
    handed = tf.constant(photographs.plain(content))
    shape = decoding.image_shape(handed).numpy()
    np.testing.assert_array_equal(shape, pixels.shape[:2])
    whole = tf.constant([0, 0, *shape])
    np.testing.assert_array_equal(decoding._decode_window(handed, whole), pixels)


@pytest.mark.parametrize("kind", ["PNG", "grey PNG", "JPEG", "grey JPEG", "progressive JPEG"])
def test_plain_files_are_handed_on_as_they_are(kind: str) -> None:
    content, _ = KINDS[kind]
    assert photographs.plain(content) is content


@pytest.mark.parametrize("number", range(1, 9))
def test_images_are_turned_upright(number: int) -> None:
    """Each orientation is undone by turns and mirrors of its own, written out here."""
    stored = photographs.pixels(oriented(1))
    turned = {
        1: stored, 2: stored[:, ::-1], 3: stored[::-1, ::-1], 4: stored[::-1],
        5: stored.swapaxes(0, 1), 6: np.rot90(stored, -1),
        7: stored[::-1, ::-1].swapaxes(0, 1), 8: np.rot90(stored),
    }  # fmt: skip
    content = oriented(number)
    np.testing.assert_array_equal(photographs.pixels(content), turned[number])
    header = photographs.read_header(content)
    assert (header.height, header.width) == turned[number].shape[:2]
    assert header.is_upright == (number == 1)


def test_an_orientation_that_there_is_not_counts_as_upright() -> None:
    assert photographs.read_header(oriented(9)).is_upright
    np.testing.assert_array_equal(photographs.pixels(oriented(9)), photographs.pixels(oriented(1)))


def test_headers_say_format_colours_and_size() -> None:
    header = photographs.read_header(KINDS["CMYK JPEG"][0])
    assert header == ("JPEG", "CMYK", HEIGHT, WIDTH, True)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "the file is empty"),
        (b"no image at all", "it is no image of a known format"),
        (KINDS["PNG"][0][:20], "it is no image of a known format|truncated|.+"),
    ],
)
def test_what_is_no_image_says_why(content: bytes, reason: str) -> None:
    for read in (photographs.read_header, photographs.pixels, photographs.plain):
        with pytest.raises(photographs.BadFile, match=reason):
            read(content)


@pytest.mark.parametrize("kind", ["PNG", "CMYK JPEG", "WebP", "BMP"])
def test_a_file_that_is_cut_off_is_found_when_it_is_decoded(kind: str) -> None:
    content, _ = KINDS[kind]
    with pytest.raises(photographs.BadFile):
        photographs.pixels(content[: len(content) * 2 // 3])


def test_colours_of_a_profile_stay_as_they_are_stored() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    content = encoded(picture(), icc_profile=profile)
    np.testing.assert_array_equal(photographs.pixels(content), np.asarray(picture()))
